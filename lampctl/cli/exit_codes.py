"""The exit code of each error. This is the only table of exit codes."""

from __future__ import annotations

import errno
import os
import sys

from pipeline import errors as pipeline_errors
from pipeline.rundir.redact import scrub
from stages import errors as stage_errors
from stages.errors import one_line
from stages.formats.disk_errors import PASSING

BUG = 1
USAGE = 2
OTHER_RUN = 3
DAMAGED = 4
RESOURCE = 5
SUPERSEDED = 6
SOME_FAILED = 7  # trials of a sweep; the others are done
PREEMPTED = 75
INTERRUPTED = 130

# The first class that fits decides.
EXIT_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (pipeline_errors.ConfigMismatch, OTHER_RUN),
    (pipeline_errors.DamagedData, DAMAGED),
    (pipeline_errors.ResourceExhausted, RESOURCE),
    (stage_errors.DamagedFileError, DAMAGED),
    (stage_errors.ResourceError, RESOURCE),
    (stage_errors.StorageUnavailableError, PREEMPTED),
    (MemoryError, RESOURCE),
    (pipeline_errors.Superseded, SUPERSEDED),
    (pipeline_errors.Occupied, SUPERSEDED),
    (pipeline_errors.Preempted, PREEMPTED),
    (pipeline_errors.Interrupted, INTERRUPTED),
    (KeyboardInterrupt, INTERRUPTED),
    (pipeline_errors.ConfigError, USAGE),
    (pipeline_errors.RunNotFound, USAGE),
    (pipeline_errors.NotARun, USAGE),
    (pipeline_errors.StepOrderError, USAGE),
    (pipeline_errors.FileExists, USAGE),
    (stage_errors.UsageError, USAGE),
    (stage_errors.NumericalError, USAGE),
)


# Errors of the operating system at a file that the user named.
_OS_ERRORS = {
    errno.ENOSPC: RESOURCE,
    errno.EDQUOT: RESOURCE,
    errno.EACCES: RESOURCE,
    errno.EPERM: RESOURCE,
    errno.EROFS: RESOURCE,
    errno.ENAMETOOLONG: USAGE,
    **dict.fromkeys(PASSING, PREEMPTED),
}
_CPU_ALLOCATOR = "DefaultCPUAllocator"
# In RuntimeErrors of PyTorch: cuBLAS, cuSOLVER and cuDNN without work space, pinned memory, memory of the processor.
_OUT_OF_MEMORY = ("STATUS_ALLOC_FAILED", "CUDA error: out of memory", _CPU_ALLOCATOR)


def exit_code(error: BaseException) -> int:
    """The exit code of an error; 1, a bug of ours, for an error that is not in the tables."""
    for kind, code in EXIT_CODES:
        if isinstance(error, kind):
            return code
    if isinstance(error, OSError) and error.errno in _OS_ERRORS:
        return _OS_ERRORS[error.errno]
    return RESOURCE if _is_out_of_memory(error) else BUG


def message(error: BaseException) -> str:
    """The error message for the user, after ``lampctl: ``, without secrets."""
    return scrub(_message(error))


def _message(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; the same command continues where it stopped"
    if _is_out_of_memory(error):
        if _CPU_ALLOCATOR in str(error):
            return "there is not enough memory: use a smaller --seqlen"
        return "the GPU has not enough memory for one block: use a smaller --seqlen, or --device cpu"
    if isinstance(error, MemoryError):
        return "there is not enough memory: use a smaller --seqlen"
    if isinstance(error, OSError):
        where = str(error.filename or "")
        return one_line(f"{error.strerror}: {where if len(where) < 200 else where[:200] + '...'}")
    return str(error)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch got no memory: it has an error of its own only for its allocator on a GPU."""
    # Compared by name, because importing torch only for this would take seconds.
    if type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OUT_OF_MEMORY)


def end_now(error: BaseException) -> None:
    """End this process at once, whatever its threads are doing. Only for errors after which no work is lost."""
    print(f"lampctl: {message(error)}", file=sys.stderr, flush=True)
    os._exit(exit_code(error))
