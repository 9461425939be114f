"""--bos in runs: measured once, kept in a commit, the same in calibration, evaluations and baselines."""

import json
from types import SimpleNamespace

import pytest

from lampctl.output.comparison import compare
from pipeline.config.run_config import Recorded, RunConfig, with_recorded_defaults
from pipeline.errors import ConfigMismatch
from pipeline.runs.comparison import summary_of
from pipeline.runs.lifecycle import reopen
from pipeline.runs.same_run import require_same
from pipeline.runs.status import status
from pipeline.steps.bos_choice import recorded_bos
from pipeline.steps.committed import measurements_of
from pipeline.steps.results import CalibrateResult
from pipeline.steps.run_facts import facts_of
from stages import choose_bos
from tests.bos_model import BOS, TEXT, save_needing_bos
from tests.pipeline.runs.golden_copy import GOLDEN, copy_of_golden

SIZE = ("--num-samples", "4", "--seqlen", "16", "--eval-max-tokens", "160", "--sparsity", "0.3", "--device", "cpu")


@pytest.fixture(scope="module")
def needing_bos(tmp_path_factory):
    return save_needing_bos(tmp_path_factory.mktemp("models") / "needs-bos")


@pytest.fixture
def prune(lampctl, needing_bos, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)

    def call(name, *flags):
        data = ("--calibration", "text:text.txt", "--evaluate", "text:text.txt", "--method", "wanda")
        return lampctl("run", needing_bos, *data, *SIZE, "--run-dir", tmp_path / name, *flags)

    return call


def values(run):
    return {measured.which: measured.value for measured in measurements_of(run)}


def test_auto_measures_once_and_keeps_the_choice(prune, tmp_path, monkeypatch):
    answer = prune("run", "--baseline", "magnitude")
    assert answer.code == 0, answer.err
    assert "BOS stands at the head of each window" in " ".join(answer.err.split())
    run, config = reopen(tmp_path / "run")
    assert config.bos == "auto"
    kept = run.commit_for("calibrate").result_as(CalibrateResult).bos
    assert kept.mode == "window"
    assert kept.perplexity_with < 2 < 10 < kept.perplexity_without
    samples = run.open_stream("calibration")
    assert [int(samples[index][0]) for index in range(4)] == [BOS] * 4
    assert values(run)["dense"] < 2
    baseline, _ = reopen(tmp_path / "run-magnitude")
    assert recorded_bos(baseline) == "window"
    assert baseline.commit_for("calibrate") is None
    assert all(measured.details.bos == "window" for measured in measurements_of(baseline))

    def never(*args, **kwargs):
        raise AssertionError("measured again")

    monkeypatch.setattr(choose_bos, "choose_bos", never)
    monkeypatch.setenv("LAMPCTL_EVAL_MAX_TOKENS", "80")
    assert prune("run").code == 0  # another evaluation of a finished run


def test_stream_is_as_published_and_compared_under_another_heading(prune, tmp_path):
    assert prune("stream", "--bos", "stream").code == 0
    assert prune("window", "--bos", "window").code == 0
    opened = [reopen(tmp_path / name) for name in ("stream", "window")]
    assert values(opened[0][0])["dense"] > 5 * values(opened[1][0])["dense"]
    table = compare([summary_of(status(*both)) for both in opened])
    titles = [column.title.replace("\n", " ") for column in table.columns if column.key.startswith("perplexity")]
    assert len(titles) == 2
    assert [("with BOS" in title) for title in titles] == [False, True]
    answer = prune("stream", "--bos", "window")
    assert answer.code == 3
    assert "bos: 'stream' there, 'window' asked for" in answer.err


def test_a_run_without_calibration_measures_at_its_first_evaluation(prune, tmp_path):
    assert prune("run", "--method", "magnitude").code == 0
    run, _ = reopen(tmp_path / "run")
    first, *others = measurements_of(run)
    assert first.bos.mode == "window"
    assert first.bos.perplexity_with is not None
    assert all(other.bos.mode == "window" and other.bos.perplexity_with is None for other in others)


def test_evaluate_of_a_model_chooses_too(lampctl, needing_bos, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    common = ("evaluate", needing_bos, "--data", "text:text.txt", "--seqlen", "16", "--max-tokens", "160", "--json")
    auto, stream = (lampctl(*common, *flags).json["measured"][0] for flags in ((), ("--bos", "stream")))
    assert (auto["bos"], stream["bos"]) == ("window", "stream")
    assert auto["perplexity"] < 2 < stream["perplexity"]


def test_runs_of_older_versions_are_stream(tmp_path):
    """Their run.json has no such setting. An unfinished one resumes so; the same command is the same run."""
    for schema in (1, 2):
        recorded = json.loads((GOLDEN / f"schema-{schema}" / "records" / "run.json").read_text())
        assert "bos" not in recorded["config"]
        run, config = reopen(copy_of_golden(tmp_path / f"run-{schema}", 4, schema))
        assert config.bos == "stream"
        assert recorded_bos(run) == "stream"
    assert RunConfig.recorded({"model": "m", "seqlen": 8, "eval_seqlen": 8, "sparsity": 0.5}).bos == "stream"


def test_the_command_of_an_older_run_resumes_it(tmp_path):
    run, config = reopen(copy_of_golden(tmp_path / "run", 4))
    facts, recorded = facts_of(run), Recorded(config, {})
    now = with_recorded_defaults(config.changed(bos="auto"), {}, recorded)
    require_same(
        run, SimpleNamespace(config=now, model=SimpleNamespace(files=facts.identity.model), data=facts.identity.data)
    )
    asked = SimpleNamespace(
        config=config.changed(bos="window"), model=SimpleNamespace(files=facts.identity.model), data=facts.identity.data
    )
    with pytest.raises(ConfigMismatch, match="bos: 'stream' there, 'window' asked for"):
        require_same(run, asked)


def test_the_papers_preset_is_stream():
    from pipeline.config.gather import gather

    assert gather({"model": "m"}, preset="paper", environ={}).values.bos == "stream"
    assert gather({"model": "m"}, preset="quick", environ={}).values.bos is None


def test_a_damaged_calibration_set_is_drawn_again_as_it_was(lampctl, needing_bos, tmp_path, monkeypatch):
    """By the choice in its commit: another measurement could decide otherwise."""
    (tmp_path / "text.txt").write_text(TEXT)
    data = ("--calibration", "text:text.txt", "--evaluate", "", "--method", "wanda")
    assert lampctl("init", needing_bos, *data, *SIZE, "--run-dir", tmp_path / "run").code == 0
    assert lampctl("calibrate", tmp_path / "run").code == 0
    run, _ = reopen(tmp_path / "run")
    before = [run.open_stream("calibration")[index].tolist() for index in range(4)]
    chunks = [*(tmp_path / "run" / "data").rglob("c.*")]
    assert chunks
    for path in chunks:
        path.write_bytes(b"damaged")
    monkeypatch.setattr(choose_bos, "choose_bos", None)
    answer = lampctl("capture", tmp_path / "run")
    assert answer.code == 0, answer.err
    assert "calibration is made again" in " ".join(answer.err.split())
    run, _ = reopen(tmp_path / "run")
    assert [run.open_stream("calibration")[index].tolist() for index in range(4)] == before
