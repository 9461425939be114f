"""The speed benchmark: rows replaced by figure, a table that says what was reached, seconds attributed."""

import time

import pytest

import benchmarks.performance.__main__ as performance
from benchmarks.durability.stop_watch import StopWatch
from benchmarks.performance.watched_run import since_start


@pytest.fixture
def speed(tmp_path, monkeypatch):
    monkeypatch.setattr(performance, "TABLE", tmp_path / "speed.csv")
    return performance


def test_measuring_a_figure_again_replaces_its_rows_and_keeps_the_others(speed):
    speed.put("P9", [{"case": "a", "value": 1.4, "unit": "ratio", "met": True}])
    speed.put("P1", [{"case": "b", "value": 0.5, "unit": "share", "met": False}])
    speed.put(
        "P9", [{"case": "c", "value": 2.0, "unit": "ratio", "met": False}, {"case": "d", "value": 3, "unit": "s"}]
    )
    assert [(row["figure"], row["case"], row["met"]) for row in speed.read()] == [
        ("P1", "b", "False"),
        ("P9", "c", "False"),
        ("P9", "d", ""),
    ]


def test_the_table_says_what_was_reached_and_what_was_missed(speed):
    speed.put("P1", [{"case": "capture", "value": 0.731, "unit": "share", "met": True}])
    speed.put(
        "P9", [{"case": "help", "value": 1.6, "unit": "ratio", "met": False}, {"case": "s", "value": 0.07, "unit": "s"}]
    )
    text = "\n".join(speed.markdown(speed.read()))
    assert (
        "| P1 | model FLOP over the machine's best rate for these products | 0.70 or more | capture | 73.1% | reached |"
        in text
    )
    assert "| help | 1.60 | missed |" in text
    assert "|  |  |  | s | 0.07 s |  |" in text


def test_every_figure_of_the_list_has_a_target(speed):
    assert list(speed.FIGURES) == [f"P{number}" for number in range(1, 13)]
    assert all(figure.title and figure.target for figure in speed.FIGURES.values())


def test_a_watch_counts_inner_seconds_once():
    watch = StopWatch(main_only=True)
    with watch.timing("outer"):
        time.sleep(0.02)
        with watch.timing("inner"):
            time.sleep(0.03)
    assert watch.seconds["inner"] >= 0.03
    assert 0.02 <= watch.seconds["outer"] < 0.05


def test_a_process_knows_when_it_was_begun():
    first = since_start()
    time.sleep(0.02)
    assert first > 0
    assert since_start() - first >= 0.01
