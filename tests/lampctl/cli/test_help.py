"""`--help`: at once, and with examples."""

import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from stages.version import VERSION

ROOT = Path(__file__).parents[3]

COMMANDS = [
    *("run", "resume", "status", "init", "calibrate", "capture", "prune-block", "compensate-block", "export"),
    *("evaluate", "compare", "report"),
]


@pytest.mark.long
def test_help_answers_in_half_a_second():
    times = []
    for _ in range(5):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "lampctl", "--help"], capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.5
    assert all(command in done.stdout for command in COMMANDS)


def test_help_imports_neither_torch_nor_transformers():
    code = (
        "import sys; sys.argv = ['lampctl', 'run', '--help']\n"
        "from lampctl.app import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'zarr', 'datasets'} & set(sys.modules), 'too much is imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, env=dict(os.environ))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example(lampctl, command):
    shown = lampctl(command, "--help")
    assert shown.code == 0
    assert f"lampctl {command}" in shown.out.split("Usage:", 1)[1].split("\n", 1)[1]


def test_run_help_lists_every_setting(lampctl):
    from pipeline.config.declarations import options

    only_in_files = {"layer_sparsity", "damping", "column_block"}
    shown = lampctl("run", "--help").out
    for name in set(options()) - only_in_files - {"model"}:
        assert f"--{name.replace('_', '-')}" in shown, name


def test_help_of_held_out_says_that_training_continues(lampctl):
    words = " ".join(lampctl("run", "--help").out.replace("│", " ").split())
    assert "undo an epoch that did not help and continue at a lower learning rate" in words
    assert "stop early" not in words


def test_version_prints_name_and_number(lampctl):
    assert lampctl("--version").out == f"lampctl {VERSION}\n"


def test_no_distribution_of_the_name_lampctl_is_asked_for(monkeypatch):
    """On the package index that name belongs to another project."""
    from pipeline.runs.environment import environment_record
    from tests.blocks import FP32

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["name"] == "lampctl-prune"
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "stages.version.VERSION"}
    asked = []
    monkeypatch.setattr("importlib.metadata.version", lambda name: asked.append(name) or "1.0")
    assert environment_record(FP32).packages["lampctl"] == VERSION
    assert asked == ["torch", "transformers", "zarr"]
    for path in (path for folder in ("lampctl", "pipeline", "stages") for path in (ROOT / folder).rglob("*.py")):
        assert "pip install 'lampctl[" not in path.read_text(), path


def test_every_error_of_ours_has_an_exit_code():
    import pipeline.errors
    import stages.errors
    from lampctl.cli.exit_codes import BUG, exit_code

    for module in (pipeline.errors, stages.errors):
        for name, kind in vars(module).items():
            if isinstance(kind, type) and name not in ("PipelineError", "StageError"):
                assert exit_code(kind("x")) != BUG, name
    assert exit_code(RuntimeError()) == BUG


def test_too_little_memory_is_no_bug_whichever_library_lacks_it():
    import torch

    from lampctl.cli.exit_codes import RESOURCE, exit_code, message

    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert exit_code(caught.value) == RESOURCE
    assert message(caught.value) == "there is not enough memory: use a smaller --seqlen"
    for text in (
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    ):
        assert exit_code(RuntimeError(text)) == RESOURCE
        assert message(RuntimeError(text)).startswith("the GPU has not enough memory")


def test_help_of_sweep_lists_its_commands_and_every_option_of_a_sweep(lampctl):
    shown = lampctl("sweep", "--help").out
    run = lampctl("sweep", "run", "--help").out
    options = run[run.index("Arguments:") :]
    assert "--grid" in options
    assert "--sparsity" in options
    assert options in shown
    assert "\n  resume  Continue an interrupted sweep" in shown
    assert "MODEL | COMMAND" in shown
    assert shown.count("--help") == 1
