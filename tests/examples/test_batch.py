"""The batch examples, each against a published schema or parser, and their command lines against lampctl's own."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lampctl.cli.exit_codes import DAMAGED, INTERRUPTED, PREEMPTED, RESOURCE, SUPERSEDED

from lampctl.cli.exit_codes import OTHER_RUN, USAGE, BUG  # isort: skip

ROOT = Path(__file__).parents[2]
BATCH = ROOT / "examples" / "batch"
AGAIN = {PREEMPTED, 137, 143}
NEVER_AGAIN = {BUG, USAGE, OTHER_RUN, DAMAGED, RESOURCE, SUPERSEDED}


def documents(name):
    return [document for document in yaml.safe_load_all((BATCH / name).read_text()) if document]


def job(name):
    return next(document for document in documents(name) if document["kind"] == "Job")


def command_lines() -> dict[str, list[str]]:
    """lampctl's arguments in every example."""
    container = [job(name)["spec"]["template"]["spec"]["containers"][0] for name in KUBERNETES]
    shell = {name: (BATCH / name).read_text() for name in ("slurm.sh", "skypilot.yaml")}
    found = {name: one["args"] for name, one in zip(KUBERNETES, container, strict=True)}
    found["aws-batch.json"] = json.loads((BATCH / "aws-batch.json").read_text())["containerProperties"]["command"]
    for name, text in shell.items():
        line = next(line for line in text.splitlines() if line.strip().startswith("lampctl run"))
        found[name] = shlex.split(line.rstrip("& "))[1:]
    found["docker-loop.sh"] = ["run", "facebook/opt-1.3b", "--sparsity", "0.7", "--run-dir", "runs/job"]
    return found


KUBERNETES = ("kubernetes.yaml", "kubernetes-bucket.yaml")


@pytest.mark.parametrize("name", [*KUBERNETES, "aws-batch.json", "slurm.sh", "skypilot.yaml", "docker-loop.sh"])
def test_the_command_line_is_one_that_lampctl_understands(name, monkeypatch):
    """Parsed by lampctl itself, up to the model, and its settings put together."""
    import typer

    from lampctl.app import app
    from lampctl.cli.options import Chosen

    arguments = command_lines()[name]
    command = typer.main.get_command(app).get_command(None, arguments[0])
    context = command.make_context(arguments[0], list(arguments[1:]))
    values = dict(context.params.items())
    own = {key: values.pop(key) for key in ("run_dir", "baseline", "as_json", "takeover")}
    gathered = Chosen(values).gather()
    assert gathered.values.sparsity
    assert own["run_dir"], "without a run directory of its own a job would not find its run again"


@pytest.mark.parametrize("name", KUBERNETES)
def test_kubernetes_accepts_it(name):
    import kubernetes_validate

    for document in documents(name):
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("name", KUBERNETES)
def test_kubernetes_goes_on_after_a_preemption_and_fails_where_trying_again_is_no_use(name):
    spec = job(name)["spec"]
    actions: dict[str, set[int]] = {}
    for rule in spec["podFailurePolicy"]["rules"]:
        if "onExitCodes" in rule:
            assert rule["onExitCodes"]["operator"] == "In"
            assert rule["onExitCodes"]["containerName"] == spec["template"]["spec"]["containers"][0]["name"]
            actions.setdefault(rule["action"], set()).update(rule["onExitCodes"]["values"])
        else:
            assert rule == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}
    assert actions == {"FailJob": NEVER_AGAIN, "Count": AGAIN}
    assert spec["backoffLimit"] >= 50
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] >= 30
    assert spec["template"]["spec"]["securityContext"]["runAsNonRoot"]


def test_aws_batch_accepts_it_and_tries_again_when_it_should():
    from botocore.loaders import Loader
    from botocore.model import ServiceModel
    from botocore.validate import ParamValidator

    definition = json.loads((BATCH / "aws-batch.json").read_text())
    model = ServiceModel(Loader().load_service_model("batch", "service-2"))
    report = ParamValidator().validate(definition, model.operation_model("RegisterJobDefinition").input_shape)
    assert not report.has_errors(), report.generate_report()
    known = set(model.operation_model("RegisterJobDefinition").input_shape.members)
    assert set(definition) <= known
    shape = model.operation_model("RegisterJobDefinition").input_shape.members["containerProperties"]
    assert set(definition["containerProperties"]) <= set(shape.members)
    rules = definition["retryStrategy"]["evaluateOnExit"]
    assert len(rules) <= 5
    assert {int(r["onExitCode"]) for r in rules if "onExitCode" in r and r["action"] == "RETRY"} == AGAIN
    assert rules[-1] == {"onReason": "*", "action": "EXIT"}
    assert definition["retryStrategy"]["attempts"] == 10  # as many as AWS allows


@pytest.mark.parametrize("name", ["docker-loop.sh", "slurm.sh"])
def test_shellcheck_has_nothing_to_say(name):
    subprocess.run(["bash", "-n", str(BATCH / name)], check=True)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    answer = subprocess.run([str(shellcheck), str(BATCH / name)], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout


def fake(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text("#!/usr/bin/env bash\n" + script)
    path.chmod(0o755)


def test_the_docker_loop_goes_on_until_it_is_done(tmp_path, monkeypatch):
    """With a docker that is preempted twice, then loses its machine, then is done."""
    (tmp_path / "bin").mkdir()
    fake(
        tmp_path / "bin",
        "docker",
        f'echo "$@" >> {tmp_path}/calls; n=$(wc -l < {tmp_path}/calls)\n'
        "case $n in 1|2) exit 75;; 3) exit 137;; *) exit ${LAST:-0};; esac\n",
    )
    fake(tmp_path / "bin", "sleep", "exit 0\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    command = [str(BATCH / "docker-loop.sh"), "facebook/opt-1.3b", "--sparsity", "0.7"]
    assert subprocess.run(command, capture_output=True).returncode == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 4
    assert len(set(calls)) == 1
    assert calls[0].endswith("lampctl run facebook/opt-1.3b --sparsity 0.7 --run-dir runs/job")
    (tmp_path / "calls").unlink()
    monkeypatch.setenv("LAST", "2")
    assert subprocess.run(command, capture_output=True).returncode == 2


@pytest.mark.parametrize(("code", "requeues"), [(0, False), (75, True), (137, True), (2, False)])
def test_the_slurm_job_queues_again(tmp_path, monkeypatch, code, requeues):
    (tmp_path / "bin").mkdir()
    fake(tmp_path / "bin", "lampctl", f'echo "$@" > {tmp_path}/lampctl\ntrap "exit 75" TERM\nsleep 0.2\nexit {code}\n')
    fake(tmp_path / "bin", "scontrol", f'echo "$@" > {tmp_path}/scontrol\n')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setenv("SLURM_SUBMIT_DIR", str(tmp_path))
    ended = subprocess.run([str(BATCH / "slurm.sh")], capture_output=True)
    assert ended.returncode == (0 if requeues else code)
    assert (tmp_path / "scontrol").exists() == requeues
    if requeues:
        assert (tmp_path / "scontrol").read_text() == "requeue 42\n"


def test_slurm_passes_its_signal_on_and_queues_again(tmp_path, monkeypatch):
    import time

    (tmp_path / "bin").mkdir()
    fake(
        tmp_path / "bin",
        "lampctl",
        f'trap "sleep 0.3; exit 75" TERM\ntouch {tmp_path}/began\nwhile true; do sleep 0.05; done\n',
    )
    fake(tmp_path / "bin", "scontrol", f'echo "$@" > {tmp_path}/scontrol\n')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setenv("SLURM_SUBMIT_DIR", str(tmp_path))
    job = subprocess.Popen([str(BATCH / "slurm.sh")])
    while not (tmp_path / "began").exists():
        time.sleep(0.02)
    job.terminate()
    assert job.wait(timeout=20) == 0
    assert (tmp_path / "scontrol").read_text() == "requeue 42\n"


def test_slurm_directives_are_ones_that_sbatch_has():
    text = (BATCH / "slurm.sh").read_text()
    directives = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.+))?$", text, re.M))
    assert set(directives) <= {
        *("job-name", "gres", "cpus-per-task", "mem", "time", "requeue", "open-mode", "output", "signal"),
    }
    assert re.fullmatch(r"B:TERM@\d+", directives["signal"])
    assert "requeue" in directives


def test_skypilot_recovers_on_the_codes_that_mean_again():
    task = documents("skypilot.yaml")[0]
    assert set(task) <= {"name", "resources", "envs", "setup", "run", "file_mounts", "workdir", "num_nodes"}
    assert set(task["resources"]["job_recovery"]["recover_on_exit_codes"]) == AGAIN
    assert task["resources"]["use_spot"]


def test_the_readme_lists_every_example():
    text = (BATCH / "README.md").read_text()
    for path in BATCH.iterdir():
        assert path.name == "README.md" or f"]({path.name})" in text


def dockerfile():
    """(instruction, arguments) of the Dockerfile, continued lines joined."""
    text = re.sub(r"\\\n\s*", "", re.sub(r"(?m)^\s*#.*\n", "", (ROOT / "Dockerfile").read_text()))
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def test_the_image_has_no_root_and_is_told_to_stop_by_sigterm():
    instructions = dockerfile()
    assert [i for i, _ in instructions].count("FROM") == 2
    last = dict(instructions)
    assert last["USER"] == "10001:10001"
    assert json.loads(last["ENTRYPOINT"]) == ["lampctl"]
    assert last["STOPSIGNAL"] == "SIGTERM"
    assert last["WORKDIR"] == "/work"
    order = [rest for instruction, rest in instructions if instruction in ("RUN", "COPY")]
    torch = next(i for i, rest in enumerate(order) if "TORCH" in rest)
    code = next(i for i, rest in enumerate(order) if rest.startswith("lampctl /src"))
    assert torch < code, "a change of the code must not install torch again"


def test_what_the_image_is_made_of_is_not_ignored():
    lines = (ROOT / ".dockerignore").read_text().split()
    kept = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        source
        for instruction, rest in dockerfile()
        if instruction == "COPY" and "--from" not in rest
        for source in rest.split()[:-1]
    }
    assert copied <= kept
    assert INTERRUPTED not in AGAIN
