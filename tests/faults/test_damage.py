"""Every file of a run damaged in every way: always noticed, and made again bit for bit where that can be done."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.engine.plan import is_stream, releasable
from pipeline.engine.verify import verify
from pipeline.errors import ConfigMismatch, DamagedData, NotARun, RunNotFound
from pipeline.runs.garbage import collect_garbage
from pipeline.runs.lifecycle import reopen
from pipeline.steps.lamp_plan import steps_of

TINY_OPT = Path(__file__).parents[2] / "examples" / "tiny-opt"
FLAGS = (
    *("--sparsity", "0.6", "--calibration", "pydocs", "--num-samples", "3", "--seqlen", "32"),
    *("--epochs", "1", "--refine-epochs", "1", "--evaluate", "", "--device", "cpu"),
)
STEPS = (
    *("calibrate", "capture", "prune-block", "refine-block", "compensate-block", "prune-block", "refine-block"),
    *("compensate-block", "prune-block"),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """`half`: stopped after the third block was pruned; `whole`: the same run, finished."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LAMPCTL_CACHE", str(folder / "cache"))
        _lampctl(patch, "init", TINY_OPT, *FLAGS, "--run-dir", "half")
        for step in STEPS:
            _lampctl(patch, step, "half")
        shutil.copytree("half", "whole")
        _lampctl(patch, "resume", "whole")
    return folder


def _lampctl(patch: pytest.MonkeyPatch, *arguments: object) -> None:
    from lampctl.app import main

    patch.setattr("sys.argv", ["lampctl", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def delete(path: Path) -> None:
    path.unlink()


def swap(path: Path) -> None:
    """With another file beside it, or one anywhere, as a careless copy would leave them."""
    root = next(parent for parent in path.parents if (parent / "run.json").exists())
    others = sorted(p for p in (*path.parent.iterdir(), *root.rglob("*")) if p.is_file())
    other = next(p for p in others if p.read_bytes() != path.read_bytes() and p.name != "events.jsonl")
    data = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(data)


DAMAGES = (flip, truncate, empty, delete, swap)


def damage_copy(original: Path, copy: Path, key: str, damage: Callable[[Path], None]) -> None:
    """A copy of a run with one of its files damaged, each file of it apart from all others."""
    if copy.exists():
        shutil.rmtree(copy)
    shutil.copytree(original, copy)
    damage(copy / key)


def is_noticed(path: Path) -> bool:
    try:
        run, config = reopen(path)
        return bool(verify(run, steps_of(run, config), is_deep=True).damages)
    except (DamagedData, NotARun, RunNotFound, ConfigMismatch):
        return True


@pytest.mark.parametrize(
    ("which", "every"), [("half", 1), ("whole", 5), pytest.param("whole", 1, marks=pytest.mark.slow)]
)
def test_verify_detects_every_damage_to_every_file(runs, tmp_path, which, every):
    keys = sorted(p.relative_to(runs / which).as_posix() for p in (runs / which).rglob("*") if p.is_file())
    newest = max(key for key in keys if key.startswith("commits/"))
    num_noticed = num_harmless = 0
    for key in keys[::every]:
        if key.startswith("model/"):
            continue  # a view: see below
        for damage in DAMAGES:
            damage_copy(runs / which, tmp_path / "run", key, damage)
            noticed = is_noticed(tmp_path / "run")
            if key == "events.jsonl" or (key == newest and damage is delete):
                num_harmless += 1  # a lost newest commit is a step to do again, which is shown below
                assert not noticed or damage is swap, (key, damage.__name__)
            else:
                assert noticed, (key, damage.__name__)
                num_noticed += 1
    print(f"{which}: {num_noticed} damages to {len(keys)} files, all noticed; {num_harmless} harmless ones")
    assert num_noticed > 100 / every


def payload_files(run_path: Path) -> dict[str, str]:
    """One file of each payload that is there, by payload."""
    run, _ = reopen(run_path)
    names = dict.fromkeys(name for commit in run.commits for name in commit.payloads)
    return {n: run.payload(n).files[-1].path for n in names if run.storage.exists(run.payload(n).root)}


def weights(run: Path) -> dict[str, str]:
    commits = [json.loads(path.read_text()) for path in sorted((run / "commits").iterdir())]
    export = next(commit for commit in commits if commit["step"] == "export")
    return {Path(f["path"]).name: f["sha256"] for f in export["payloads"]["model"]["files"]}


def test_resume_rebuilds_every_damaged_payload_bit_for_bit(runs, tmp_path, lampctl):
    """All at once: each needs others that are damaged, too, or have been released."""
    expected = weights(runs / "whole")
    shutil.copytree(runs / "half", "run")
    damages = (delete, flip, truncate, empty)
    for number, key in enumerate(payload_files(Path("run")).values()):
        damages[number % len(damages)](Path("run") / key)
    commits_before = sorted(path.name for path in Path("run/commits").iterdir())
    digests_before = [path.read_bytes() for path in sorted(Path("run/commits").iterdir())]
    assert lampctl("verify", "run", "--deep").code == 4
    resumed = lampctl("resume", "run")
    assert resumed.code == 0, resumed.err
    assert "is made again" in resumed.err
    assert weights(Path("run")) == expected
    # The chain is the same one, gone on with: nothing that was committed was committed again.
    after = sorted(Path("run/commits").iterdir())
    assert [path.name for path in after[: len(commits_before)]] == commits_before
    assert [path.read_bytes() for path in after[: len(commits_before)]] == digests_before
    assert lampctl("verify", "run", "--deep").code == 0


def test_check_all_rebuilds_the_model_of_a_finished_run(runs, tmp_path, lampctl):
    shutil.copytree(runs / "whole", "run")
    expected = {p.name: p.read_bytes() for p in Path("run/model").rglob("*") if p.is_file()}
    flip(Path("run") / payload_files(Path("run"))["pruned/1"])
    flip(Path("run/model/model-00003-of-00007.safetensors"))
    for key in payload_files(Path("run")).items():
        if key[0] == "model":
            flip(Path("run") / key[1])
    seen = lampctl("verify", "run", "--deep", "--json")
    assert seen.code == 4
    assert {damage["payload"] for damage in seen.json["damages"]} >= {"pruned/1", "model"}
    mended = lampctl("resume", "run", "--check-all")
    assert mended.code == 0, mended.err
    assert {p.name: p.read_bytes() for p in Path("run/model").rglob("*") if p.is_file()} == expected
    assert lampctl("verify", "run", "--deep").code == 0


def test_lost_newest_commit_repeats_one_step(runs, tmp_path, lampctl, monkeypatch):
    monkeypatch.setattr("pipeline.rundir.commit_log._STILL_WRITING_S", 0.01)
    expected = weights(runs / "whole")
    for damage in (flip, truncate, empty, delete):
        damage_copy(runs / "half", Path("run").absolute(), f"commits/{len(STEPS) - 1:06d}.json", damage)
        resumed = lampctl("resume", "run")
        assert resumed.code == 0, (damage.__name__, resumed.err)
        assert weights(Path("run")) == expected


def test_damaged_middle_commit_is_exit_4_and_changes_nothing(runs, tmp_path, lampctl):
    damage_copy(runs / "half", Path("run").absolute(), "commits/000003.json", flip)
    before = {p: p.stat().st_mtime_ns for p in Path("run").rglob("*")}
    refused = lampctl("resume", "run")
    assert refused.code == 4
    assert "commits/000003.json is damaged" in refused.err
    assert {p: p.stat().st_mtime_ns for p in Path("run").rglob("*")} == before


def test_step_with_other_weights_is_revoked_with_all_later_steps(runs, tmp_path, lampctl, monkeypatch):
    """As on another machine: the block is pruned anew, and the chain says so."""
    import stages.pruners.alps

    shutil.copytree(runs / "half", "run")
    flip(Path("run") / payload_files(Path("run"))["pruned/1"])
    alps = stages.pruners.alps.alps

    def elsewhere(*arguments, **more):
        """Other last bits, as another processor has."""
        weight, mask = alps(*arguments, **more)
        return weight * (1 + 1e-6), mask

    monkeypatch.setattr(stages.pruners.alps, "alps", elsewhere)
    resumed = lampctl("resume", "run")
    assert resumed.code == 0, resumed.err
    assert "are done again" in resumed.err
    log = [json.loads(path.read_text()) for path in sorted(Path("run/commits").iterdir())]
    taken_back = [record for record in log if record["step"] == "invalidate"]
    assert [record["result"]["reason"].split(" ")[0] for record in taken_back] == ["pruned/1", "unrefined/1"]
    again = [record["step"] for record in log if record["number"] > taken_back[-1]["number"]]
    assert again[:3] == ["prune-block/1", "refine-block/1", "compensate-block/2"]
    assert [record["number"] for record in log] == list(range(len(log)))
    state = lampctl("status", "run", "--json").json
    assert state["is_finished"]
    assert state["num_masked"] == round(0.6 * state["num_prunable"])
    assert lampctl("verify", "run", "--deep").code == 0


def test_damage_in_an_unfinished_run_is_repaired_by_resume(runs, tmp_path, lampctl):
    """The step commands compare sizes only; the digest fails when the step reads the file."""
    shutil.copytree(runs / "half", "run")
    flip(Path("run") / payload_files(Path("run"))["unrefined/2"])
    refined = lampctl("refine-block", "run")
    assert refined.code == 0, refined.err
    assert "is made again" in refined.err
    assert lampctl("resume", "run").code == 0
    assert weights(Path("run")) == weights(runs / "whole")


def test_gc_deletes_only_what_no_step_needs(runs, tmp_path, lampctl):
    shutil.copytree(runs / "half", "run")
    stray = Path("run/data/000002-00000000/pruned-0")
    stray.mkdir(parents=True)
    (stray / "block.safetensors").write_bytes(b"x" * 1000)
    to_come = Path(f"run/data/{len(STEPS):06d}-00000000")
    to_come.mkdir()
    listed = lampctl("gc", "run", "--dry-run", "--json")
    assert listed.json["deleted"] == {"data/000002-00000000": 1000}
    assert stray.exists()
    assert lampctl("gc", "run").code == 0
    assert not stray.exists()
    assert to_come.exists(), "somebody may be about to commit it"
    run, config = reopen(Path("run"))
    assert collect_garbage(run, config, is_dry_run=True) == {}
    assert lampctl("verify", "run", "--deep").code == 0


def test_keep_activations_keeps_every_stream(runs, tmp_path, lampctl):
    shutil.copytree(runs / "half", "run")
    answer = lampctl("run", TINY_OPT, *FLAGS, "--run-dir", "run", "--keep-activations")
    assert answer.code == 0, answer.err
    run, config = reopen(Path("run"))
    steps = steps_of(run, config)
    gone = releasable(steps, [commit.step for commit in run.commits])
    later = [name for name in gone if is_stream(name, steps) and int(name.partition("/")[2]) > 3]
    assert later
    assert all(not run.is_released(name) for name in later)
    assert len(run.open_stream("biased/5")) == 3


def test_too_small_disk_is_refused_before_the_first_step(runs, tmp_path, lampctl, monkeypatch):
    monkeypatch.setattr("pipeline.runs.disk_room.free_bytes", lambda path: 1000)
    refused = lampctl("run", TINY_OPT, *FLAGS, "--run-dir", "new")
    assert refused.code == 5
    assert "nothing was begun" in refused.err
    assert not list(Path("new").glob("data/*"))
