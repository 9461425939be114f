"""The room that a run will need, worked out from its plan."""

import pytest

from pipeline.engine.disk_budget import most_needed, require_room
from pipeline.engine.plan import next_steps
from pipeline.errors import OutOfDisk
from pipeline.steps.lamp_plan import chain

STREAM, BLOCK = 1000, 10


def size_of(name: str) -> int:
    return STREAM if name.startswith(("biased/", "dense/")) else BLOCK


def need(steps, committed=(), **more):
    return most_needed(steps, committed, size_of, lambda step: 0, **more)


def test_streams_are_released_and_weights_pile_up():
    short, long = need(chain(8, compensates=True, refines=True)), need(chain(32, compensates=True, refines=True))
    assert short.activations == long.activations <= 6 * STREAM
    assert long.weights > short.weights >= 8 * 2 * BLOCK


def test_the_most_is_what_a_walk_through_the_plan_holds():
    """Against a slow walk that keeps a ledger of every payload."""
    from pipeline.engine.plan import releasable

    steps = chain(3, compensates=True, refines=True)
    there, most = set(), 0
    for number, step in enumerate(steps):
        there |= set(step.writes)
        most = max(most, sum(map(size_of, there)))
        there -= set(releasable(steps, [s.name for s in steps[: number + 1]]))
    assert need(steps).total == most


def test_what_is_there_already_is_not_asked_for_again():
    steps = chain(4, compensates=False)
    done = [step.name for step in steps[:4]]
    assert need(steps, done).total < need(steps).total
    assert need(steps, [step.name for step in steps]).total == 0
    assert not next_steps(steps, [step.name for step in steps])


def test_activations_that_are_kept_pile_up():
    steps = chain(8, compensates=True)
    assert need(steps, keeps_activations=True).activations > 2 * need(steps).activations


def test_a_steps_own_streams_count():
    steps = chain(1, compensates=False, reads_data=False)
    assert most_needed(steps, (), size_of, lambda step: 7).activations == 7


def test_too_little_room_is_told_with_the_numbers():
    require_room("here", 5, 5, "weights")
    with pytest.raises(OutOfDisk, match=r"here will need 3.00 GB for weights, and has 2.00 GB: nothing was begun"):
        require_room("here", 3_000_000_000, 2_000_000_000, "weights")
