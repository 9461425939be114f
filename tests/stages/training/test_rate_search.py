"""The search along a line: it brackets the lowest loss from either side, and asks for each distance once."""

import math

import pytest

from stages.training.rate_search import USUAL_TRIALS, search


class Line:
    """A loss along a line, and the distances that were asked for."""

    def __init__(self, loss) -> None:
        self._loss, self.asked = loss, []

    def __call__(self, distance: float) -> float:
        assert distance not in self.asked
        self.asked.append(distance)
        return self._loss(distance)

    def found(self, first=1e-3) -> float:
        return search(self, self._loss(0.0), first)


def parabola(lowest):
    return lambda distance: 3 + (distance / lowest - 1) ** 2


@pytest.mark.parametrize("lowest", [2e-5, 3e-4, 7e-4, 1e-3, 1.2e-3, 3e-3, 8e-3, 0.3])
def test_the_lowest_place_of_a_parabola_is_found_from_anywhere(lowest):
    assert Line(parabola(lowest)).found() == pytest.approx(lowest)


@pytest.mark.parametrize("lowest", [7e-4, 1e-3, 1.3e-3])
def test_a_first_guess_that_is_right_takes_few_trials(lowest):
    line = Line(parabola(lowest))
    line.found()
    assert len(line.asked) <= USUAL_TRIALS


def test_a_first_guess_that_makes_it_worse_is_never_doubled():
    line = Line(parabola(1e-4))
    line.found()
    assert max(line.asked) == 1e-3


def test_losses_that_overflow_are_far_too_large_distances():
    line = Line(lambda distance: parabola(1e-5)(distance) if distance < 5e-5 else math.inf)
    assert line.found() == pytest.approx(1e-5, rel=0.3)


def test_a_curve_that_is_no_parabola_ends_between_the_neighbours_of_the_lowest_trial():
    def loss(distance):
        return 1 - distance * 100 if distance < 4e-3 else math.exp(distance * 500)

    line = Line(loss)
    found = line.found()
    lowest = min(line.asked, key=loss)
    assert lowest / 2 <= found <= lowest * 2


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(lambda distance: 1.0, id="flat"),
        pytest.param(lambda distance: 1 + distance, id="rising"),
        pytest.param(lambda distance: 1 + distance - 1e-7 * (distance < 1e-4), id="rising but for rounding"),
        pytest.param(lambda distance: math.inf if distance else 1.0, id="infinite"),
    ],
)
def test_a_line_on_which_the_loss_is_lower_nowhere_says_nothing(loss):
    line = Line(loss)
    assert line.found() is None
    assert len(line.asked) < 10


def test_a_loss_that_falls_for_ever_ends():
    line = Line(lambda distance: 10 - distance)
    found = line.found()
    assert 0.5 < found < 2
    assert len(line.asked) < 15
