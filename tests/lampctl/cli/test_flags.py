"""The flags of `lampctl run`, panel by panel, and the flags of release 0.1.0."""

import subprocess
import sys

import typer.main

from lampctl.app import app
from lampctl.cli.options import parameters_of, with_changes
from pipeline.config.declarations import flag_of, former_names, options, variable_of
from pipeline.config.option import Option

PANELS = {
    "What to prune": (
        "sparsity pattern bits group-size alpha beta budget budget-spread ignore prune-all revision trust-remote-code "
        "export-dtype"
    ),
    "Method": "method pruner baseline",
    "Calibration": (
        "calibration num-samples seqlen calibration-sampling calibration-skip bos chat-template "
        "moe-calibrate-all-experts seed"
    ),
    "Training": "effort epochs lr lr-decay loss held-out refine refine-epochs refine-lr "
    "distill distill-epochs distill-lr distill-batch distill-samples distill-generated from-run",
    "Evaluation": (
        "evaluate metrics evaluate-dense eval-seqlen eval-max-tokens eval-points eval-max-images tasks task-data "
        "task-limit end-loss"
    ),
    "Machine": "device dtype train-dtype threads micro-batch compile memory-limit allow-environment-change",
    "Stopping": "checkpoint-minutes max-runtime watch-preemption preemption-url takeover",
    "Storage": "keep-activations scratch-dir run-dir",
    "Options": "config preset json help",
}

# `lampctl run` of 0.1.0. Flags may be added; none may be lost.
RELEASED = """
allow-environment-change alpha baseline beta bits budget budget-spread calibration calibration-sampling
calibration-skip checkpoint-minutes compile config device dtype effort epochs eval-max-images eval-max-tokens
eval-points eval-seqlen evaluate evaluate-dense export-dtype group-size hold-aside ignore json keep-activations loss lr
lr-decay max-runtime memory-limit method micro-batch no-compile no-evaluate-dense no-hold-aside no-refine
no-trust-remote-code num-samples pattern preemption-url preset pruner refine refine-epochs refine-lr
refuse-environment-change release-activations revision run-dir scratch-dir seed seqlen sparsity takeover task-data
task-limit tasks threads trust-remote-code watch-preemption
"""
RELEASED_RESUME = """
allow-environment-change check-all checkpoint-minutes json max-runtime preemption-url refuse-environment-change
scratch-dir takeover watch-preemption
"""


def panels_of(text: str) -> dict[str, str]:
    """Flags by panel, read from the text of --help, as `PANELS` has them."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line and not line.startswith(" ") and line.endswith(":"):
            found[panel := line[:-1]] = []
        elif found and line.startswith("  -"):
            found[panel].append(next(word[2:] for word in line.split() if word.startswith("--")))
    return {name: " ".join(flags) for name, flags in found.items() if flags}


def flags_of(command: str) -> set[str]:
    """All flags that a command accepts, hidden ones included."""
    parameters = typer.main.get_command(app).get_command(None, command).params
    return {flag for p in parameters for flag in (*p.opts, *p.secondary_opts) if flag.startswith("--")}


def named(text: str) -> set[str]:
    return {f"--{name}" for name in text.split()}


def test_run_help_has_each_flag_in_its_panel(lampctl):
    assert panels_of(lampctl("run", "--help").out) == PANELS


def test_every_setting_is_in_exactly_one_panel():
    placed = [f"--{flag}" for flags in PANELS.values() for flag in flags.split()]
    for name, option in options().items():
        if option.form != "file only" and name != "model":
            assert placed.count(flag_of(name)) == 1, name


def test_every_flag_of_the_release_still_works():
    assert named(RELEASED) - flags_of("run") == set()
    assert named(RELEASED_RESUME) - flags_of("resume") == set()


def test_former_names_are_hidden_flags():
    hidden = {flag for p in typer.main.get_command(app).get_command(None, "run").params if p.hidden for flag in p.opts}
    assert hidden == {flag_of(former) for former in former_names()}


def test_resume_takes_its_help_from_the_declarations(lampctl):
    words = " ".join(lampctl("resume", "--help").out.split())
    for name in ("scratch_dir", "max_runtime", "checkpoint_minutes", "watch_preemption", "preemption_url"):
        assert f"{options()[name].help} [default: as last used in this run]" in words, name


def test_changes_hold_only_what_the_user_gave(monkeypatch):
    received = []

    @with_changes("checkpoint_minutes", "allow_environment_change", environment=("allow_environment_change",))
    def command(changes: dict) -> None:
        received.append(changes)

    application = typer.Typer()
    application.command()(command)
    call = typer.main.get_command(application)
    call([], standalone_mode=False)
    call(["--checkpoint-minutes", "3"], standalone_mode=False)
    monkeypatch.setenv(variable_of("allow_environment_change"), "1")
    call([], standalone_mode=False)
    call(["--refuse-environment-change"], standalone_mode=False)
    assert received == [
        {},
        {"checkpoint_minutes": 3.0},
        {"allow_environment_change": True},
        {"allow_environment_change": False},
    ]


def test_a_setting_for_files_only_has_no_flag():
    file_only = [name for name, option in options().items() if option.form == "file only"]
    assert file_only == ["layer_sparsity", "damping", "column_block"]
    assert [parameter for name in file_only for parameter in parameters_of(name)] == []
    assert Option("x.", "Machine").full_help == "x."


def test_the_command_table_repeats_the_first_sentence_of_each_command():
    group = typer.main.get_command(app)
    for name, lazy in group.lazy.items():
        text = " ".join(group.get_command(None, name).help.split())
        assert text.startswith(lazy.help), name
        assert lazy.help.endswith("."), name


def test_help_imports_no_command_and_no_pydantic(lampctl):
    code = (
        "import sys; sys.argv = ['lampctl', '--help']\n"
        "from lampctl.app import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "loaded = {name for name in sys.modules if name.startswith('lampctl.commands')}\n"
        "assert not loaded, loaded\n"
        "assert not {'pydantic', 'pipeline.config.declarations', 'importlib.metadata'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_help_of_a_command_imports_that_command_and_what_its_flags_need():
    code = (
        "import sys; sys.argv = ['lampctl', 'run', '--help']\n"
        "from lampctl.app import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "loaded = {name for name in sys.modules if name.startswith('lampctl.commands.')}\n"
        "assert loaded == {'lampctl.commands.run'}, loaded\n"
        "slow = {'pydantic', 'annotated_types', 'importlib.metadata', 'email', 'hashlib', 'json'}\n"
        "assert not slow & set(sys.modules), slow & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_a_wrong_command_is_refused_with_the_nearest_name(lampctl):
    answer = lampctl("stats")
    assert answer.code == 2
    assert "'status'" in answer.err
