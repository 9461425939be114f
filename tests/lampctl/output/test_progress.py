"""What people see while a run goes on."""

import io
import re

import pytest
from rich.console import Console

from lampctl.output import progress
from lampctl.output.progress import LiveListener, PlainListener
from lampctl.output.units import duration, size, time_left
from tests.small_models import save

FLAGS = (
    *("--sparsity", "0.5", "--calibration", "text:words.txt", "--num-samples", "4", "--seqlen", "64", "--epochs", "1"),
    *("--evaluate", "text:words.txt", "--eval-max-tokens", "256", "--device", "cpu", "--run-dir", "r"),
    *("--distill-lr", "0.1%"),  # a search may find nothing on one held-out sample, and warns
)


def test_progress_in_a_log_is_one_line_per_block(lampctl, tmp_path, words):
    answer = lampctl("run", save(tmp_path / "m", "llama"), *FLAGS)
    assert answer.code == 0, answer.err
    lines = answer.err.splitlines()
    blocks = [line for line in lines if re.match(r"\[\d+/16\] block \d of 3: \d\d\.\d\d% masked", line)]
    assert len(blocks) == 3
    assert ", loss" not in blocks[0]
    losses = r"loss [\d.e-]+ (-> [\d.e-]+|\(no epoch improved it; kept the weights from before\))"
    assert re.search(f"masked, refined {losses}, ", blocks[0])
    assert re.search(f"masked, {losses}, refined {losses}, ", blocks[1])
    assert not any("\x1b" in line or "\r" in line for line in lines)
    # What began the run, the blocks, and the steps that belong to none: calibrate, capture, generate, distill, export,
    # the end loss, two evaluations.
    assert len(lines) == 1 + 3 + 8
    assert re.search(r"about [\d.]+ s until generate$", blocks[1])
    assert "evaluate/pruned/text:words.txt@64:256: perplexity" in answer.err


class EveryFrame(LiveListener):
    """Draws at each report: by the clock, a quick step may never be on the screen."""

    def step_started(self, *args):
        super().step_started(*args)
        self._progress.refresh()

    def step_progress(self, *args):
        super().step_progress(*args)
        self._progress.refresh()


def test_progress_on_a_terminal_shows_steps_metrics_and_remaining_time(lampctl, tmp_path, words):
    from lampctl.cli.exit_codes import end_now
    from pipeline.engine.stop import StopRequest
    from pipeline.runs.lifecycle import reopen, resume

    assert lampctl("init", save(tmp_path / "m", "llama"), *FLAGS).code == 0
    run, config = reopen(tmp_path / "r")
    screen = io.StringIO()
    with EveryFrame(Console(file=screen, force_terminal=True, width=120)) as listener:
        listener.attach(run, config)
        listener.warn("mind [this]")
        listener.warn("mind [this]")
        resume(run, config, listener, StopRequest(end_now))
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    for expected in ("compensate-block/1", "loss ", "epoch 1", "block 1 of 3", "16/16", "warning: mind [this]"):
        assert expected in shown, expected
    assert re.search(r"about [\d.]+ s until generate", shown)
    assert re.search(r"about [\d.]+ s left", shown)
    assert shown.count("mind [this]") == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.96, "10 s"),
        (99.4, "99 s"),
        (99.6, "1 min 40 s"),
        (3599.7, "1 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_duration_formats_seconds(seconds, text):
    assert duration(seconds) == text


def test_the_time_left_may_end_before_a_step_of_unknown_time():
    assert time_left(None, None) == time_left(None, "distill") == ""
    assert time_left(90, None) == f"about {duration(90)} left"
    assert time_left(90, "distill") == f"about {duration(90)} until distill"


def test_size_formats_bytes():
    assert size(812e6) == "812 MB"
    assert size(7.812e9) == "7.81 GB"


def test_a_log_says_how_far_a_long_step_is_and_when_it_will_be_done(lampctl, tmp_path, words, monkeypatch):
    monkeypatch.setattr(progress, "_HEARTBEAT_S", 0)
    monkeypatch.setattr(progress, "_WATCHED_S", 0)
    answer = lampctl("run", save(tmp_path / "m", "llama"), *FLAGS)
    assert answer.code == 0, answer.err
    spoken = [line for line in answer.err.splitlines() if line.startswith("  distill: ")]
    pattern = r"  distill: \d+% of [\d,]+ passes(, loss [\d.e-]+, epoch \d)?(, done in about [\d.]+ s)?"
    assert all(re.fullmatch(pattern, line) for line in spoken), spoken
    assert spoken[-1].startswith("  distill: 100% of ")
    assert "done in about 0.0 s" in spoken[-1]
    assert any(line.startswith("  generate: ") for line in answer.err.splitlines())


def test_the_time_left_of_a_step_does_not_count_what_a_checkpoint_had_done(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    pace, heartbeat = progress.Pace(), progress.Heartbeat()
    assert pace.time_left(500, 1000) == ""
    now[0] += 4
    assert pace.time_left(510, 1000) == ""  # too early to tell
    now[0] += 6
    assert pace.time_left(600, 1000) == "done in about 40 s"
    assert pace.time_left(600, 2000) == "done in about 2 min 20 s"  # there is more to do than was known
    assert heartbeat.line(1, 100, "passes", {}) is None
    now[0] += 60
    assert heartbeat.line(25, 100, "passes", {"loss": 0.5}) == "25% of 100 passes, loss 0.5, done in about 3 min 08 s"
    assert heartbeat.line(26, 100, "passes", {}) is None


def test_a_resumed_step_says_so():
    from pipeline.engine.plan import Step

    shown = io.StringIO()
    PlainListener(Console(file=shown)).step_resumed(Step("distill"))
    assert shown.getvalue() == "distill: resumed from its last checkpoint\n"
