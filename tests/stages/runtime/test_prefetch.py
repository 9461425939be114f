"""Prefetching and writing in the background: order, errors, and the end of the threads."""

import threading
import time

import pytest
import torch

from stages.in_memory import ListStream
from stages.runtime.prefetch import DEPTH, Reading, Writing

CPU = torch.device("cpu")


def filled(num_samples: int, shape: tuple[int, ...] = (3, 2)) -> ListStream:
    stream = ListStream(num_samples, shape, torch.float32)
    for index in range(num_samples):
        stream.write(index, torch.full(shape, float(index)))
    return stream


class Watched(ListStream):
    """Remembers which samples were read, and by which thread."""

    def __init__(self, num_samples: int) -> None:
        super().__init__(num_samples, (1,), torch.float32)
        for index in range(num_samples):
            self.write(index, torch.tensor([float(index)]))
        self.read: list[int] = []
        self.threads: set[str] = set()

    def __getitem__(self, index: int, /) -> torch.Tensor:
        self.read.append(index)
        self.threads.add(threading.current_thread().name)
        return super().__getitem__(index)


def num_threads() -> int:
    return sum(thread.name in ("reader", "writer") for thread in threading.enumerate())


def collect(order: list[list[int]], stream: ListStream, seen: list[list[int]], fail_at: int | None = None) -> None:
    """Read in this order; divide by zero at the micro-batch `fail_at`."""
    with Reading(order, (stream,), CPU) as batches:
        for numbers, _ in batches:
            seen.append(list(numbers))
            _ = 1 // (len(seen) - 1 - fail_at if fail_at is not None else 1)


def write_all(stream: ListStream, fail_at: int | None = None) -> None:
    """Write zeros to every sample; divide by zero after sample `fail_at`."""
    with Writing(stream, CPU) as out:
        for index in range(len(stream)):
            out.write([index], torch.zeros(1, 1))
            _ = 1 // (index - fail_at if fail_at is not None else 1)


def test_samples_come_in_the_order_asked_for_from_every_stream():
    left, right = filled(5), filled(5, (1,))
    order = [[3], [0, 4], [2], [1]]
    with Reading(order, (left, right), CPU) as batches:
        seen = [(list(numbers), a[:, 0, 0].tolist(), b[:, 0].tolist()) for numbers, (a, b) in batches]
    assert seen == [(numbers, [float(n) for n in numbers], [float(n) for n in numbers]) for numbers in order]


def test_reads_ahead_of_the_computation_but_no_further():
    stream = Watched(12)
    with Reading([[i] for i in range(12)], (stream,), CPU) as batches:
        for numbers, _ in batches:
            if numbers == [4]:
                time.sleep(0.3)
                assert stream.read == list(range(5 + DEPTH))
                break
    assert stream.threads == {"reader"}
    assert not num_threads()


def test_what_reading_raises_comes_out_where_the_sample_was_wanted():
    stream = ListStream(3, (1,), torch.float32)
    stream.write(0, torch.zeros(1))
    seen: list[list[int]] = []
    with pytest.raises(KeyError, match="sample 1 was never written"):
        collect([[0], [1], [2]], stream, seen)
    assert seen == [[0]]
    assert not num_threads()


def test_an_error_in_the_loop_ends_the_reader_at_once():
    seen: list[list[int]] = []
    with pytest.raises(ZeroDivisionError):
        collect([[i % 4] for i in range(1000)], filled(4), seen, fail_at=1)
    assert seen == [[0], [1]]
    assert not num_threads()


def test_everything_is_written_when_the_loop_is_left():
    slow = SlowStream(6)
    with Writing(slow, CPU) as out:
        for index in range(0, 6, 2):
            out.write([index, index + 1], torch.tensor([[float(index)], [index + 1.0]]))
    assert [slow[i].item() for i in range(6)] == [0, 1, 2, 3, 4, 5]
    assert not num_threads()


class SlowStream(ListStream):
    """A slow stream that cannot write sample `broken`."""

    def __init__(self, num_samples: int, broken: int | None = None) -> None:
        super().__init__(num_samples, (1,), torch.float32)
        self.broken = broken
        self.num_written = 0

    def write(self, index: int, sample: torch.Tensor, /) -> None:
        time.sleep(0.02)
        if index == self.broken:
            raise OSError("no room left")
        super().write(index, sample)
        self.num_written += 1


@pytest.mark.parametrize("broken", [0, 3, 5])
def test_what_writing_raises_comes_out_at_the_latest_when_the_loop_is_left(broken):
    slow = SlowStream(6, broken)
    with pytest.raises(OSError, match="no room left"):
        write_all(slow)
    assert slow.num_written == broken
    assert not num_threads()


def test_a_loop_that_fails_does_not_wait_for_what_is_queued():
    slow = SlowStream(6)
    with pytest.raises(ZeroDivisionError):
        write_all(slow, fail_at=1)
    assert slow.num_written <= 2
    assert not num_threads()
