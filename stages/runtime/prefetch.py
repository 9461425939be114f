"""Read the next samples and write the last results while the device computes.

    reader thread    j+1    ->    compute j    ->    j-1    writer thread

Two micro-batches of every stream are in memory: the one in use, and the next one (of an output stream: the one that is
computed, and the one that is written). On CUDA both threads copy through pinned memory on their own CUDA streams, so
that copies in both directions and computation overlap. The order of the samples, and so the result, does not change.
"""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from stages.interfaces import Samples, Stream

# Micro-batches of a stream that are read ahead of their use, or that wait to be written.
DEPTH = 1
_POLL_S = 0.1


class Reading:
    """Prefetches micro-batches of samples from one or more streams to the device.

    A context manager: leaving it ends the thread. Iterating yields the sample numbers of each micro-batch and one
    tensor per stream, (samples, ...). An error of reading is raised in the loop, at the micro-batch that failed.
    """

    def __init__(self, batches: Iterable[Sequence[int]], streams: Sequence[Samples], device: torch.device) -> None:
        self._batches, self._streams, self._device = batches, streams, device
        self._room = threading.Semaphore(DEPTH)  # acquired before reading, released when the result is in use
        self._ready: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, name="reader", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def __iter__(self) -> Iterator[tuple[Sequence[int], tuple[Tensor, ...]]]:
        while True:
            item = self._take()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            numbers, tensors, copied = item
            if copied is not None:
                current = torch.cuda.current_stream(self._device)
                current.wait_event(copied)
                for tensor in tensors:
                    tensor.record_stream(current)
            del item
            yield numbers, tensors
            del tensors  # before the next one is waited for

    def _take(self) -> Any:
        """Wait for the next micro-batch, and let the thread read another one."""
        item = self._ready.get()
        self._room.release()
        return item

    def _read(self) -> None:
        try:
            upload = _Upload(self._device) if self._device.type == "cuda" else None
            for numbers in self._batches:
                if not self._has_room():
                    return
                tensors = tuple(_stacked(stream, numbers) for stream in self._streams)
                if upload is None:
                    self._ready.put((numbers, tensors, None))
                else:
                    self._ready.put((numbers, *upload.start(tensors)))
                del tensors
            self._ready.put(None)
        except BaseException as error:  # raised again in the main thread
            self._ready.put(error)

    def _has_room(self) -> bool:
        """Wait until another micro-batch may be read. Returns False when the loop has ended."""
        while not self._stop.is_set():
            if self._room.acquire(timeout=_POLL_S):
                return True
        return False


class Writing:
    """Writes samples to a stream in a background thread.

    A context manager: leaving it waits until everything is written, and raises an error of writing. After an error in
    the `with` block, queued samples are discarded. The next `write` raises an error of writing, too.
    """

    def __init__(self, stream: Stream, device: torch.device) -> None:
        self._stream, self._device = stream, device
        self._room = threading.Semaphore(DEPTH)
        self._waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._is_given_up = False
        self._download = _Download(device) if device.type == "cuda" else None
        self._thread = threading.Thread(target=self._write, name="writer", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_given_up = error is not None
        self._finish()
        if self._error is not None and error is None:
            raise self._error

    def _finish(self) -> None:
        """Wait until everything is written."""
        self._waiting.put(None)
        self._thread.join()

    def write(self, numbers: Sequence[int], samples: Tensor) -> None:
        """Queue `samples` (len(numbers), ...) for writing. The caller must not change them afterwards."""
        self._wait_for_room()
        if self._error is not None:
            raise self._error
        self._waiting.put((numbers, *self._on_its_way(samples)))

    def _wait_for_room(self) -> None:
        """Wait until the queue has room for another micro-batch."""
        self._room.acquire()

    def _on_its_way(self, samples: Tensor) -> tuple[Tensor, Any]:
        return (samples, None) if self._download is None else self._download.start(samples)

    def _write(self) -> None:
        while (item := self._waiting.get()) is not None:
            numbers, samples, copied = item
            del item
            try:
                if self._error is None and not self._is_given_up:
                    if copied is not None:
                        copied.synchronize()
                    for number, sample in zip(numbers, samples, strict=True):
                        self._stream.write(number, sample)
            except BaseException as error:  # raised again in the main thread
                self._error = error
            finally:
                del samples, copied
                self._room.release()  # after an error, too: the main thread must not wait forever


class _Upload:
    """Copies from host to device through a ring of pinned buffers; a buffer is reused when its copy has ended."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = _side_stream(device, "to the device")
        self._buffers: dict[tuple[Any, ...], list[tuple[Tensor, torch.cuda.Event]]] = {}

    def start(self, tensors: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], torch.cuda.Event]:
        """Start the copies. Returns the tensors on the device, and the event that marks the end of the copies."""
        events = []
        moved = []
        for place, tensor in enumerate(tensors):
            pinned, event = self._buffer(place, tensor)
            pinned.copy_(tensor)
            with torch.cuda.stream(self._side):
                moved.append(pinned.to(self._device, non_blocking=True))
                event.record(self._side)
            events.append(event)
        return tuple(moved), events[-1]  # copies on one CUDA stream end in their order

    def _buffer(self, place: int, like: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        ring = self._buffers.setdefault((place, tuple(like.shape), like.dtype), [])
        if len(ring) <= DEPTH:
            ring.append((torch.empty_like(like, pin_memory=True), torch.cuda.Event()))
            return ring[-1]
        ring.append(ring.pop(0))
        ring[-1][1].synchronize()
        return ring[-1]


class _Download:
    """Copies from device to host through pinned memory, after the computation queued so far."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = _side_stream(device, "from the device")

    def start(self, samples: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """Start the copy. Returns the samples in pinned memory, and the event that marks the end of the copy."""
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            pinned = torch.empty(samples.shape, dtype=samples.dtype, pin_memory=True)
            pinned.copy_(samples, non_blocking=True)
            samples.record_stream(self._side)
            event = torch.cuda.Event()
            event.record(self._side)
        return pinned, event


@functools.cache
def _side_stream(device: torch.device, direction: str) -> torch.cuda.Stream:
    """The CUDA stream of all copies in one direction. The allocator keeps freed memory for the stream that had it."""
    return torch.cuda.Stream(device)


def _stacked(stream: Samples, numbers: Sequence[int]) -> Tensor:
    """The samples as one tensor (samples, ...), in memory allocated by torch."""
    if len(numbers) == 1:
        return stream[numbers[0]][None]
    return torch.stack([stream[number] for number in numbers])
