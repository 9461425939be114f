"""Errors that the pipeline raises. `lampctl/cli/exit_codes.py` alone says which exit code each becomes."""

from stages.errors import one_line


class PipelineError(Exception):
    """Base of all errors raised on purpose in `pipeline`. Each argument is one line of the message."""

    def __str__(self) -> str:
        return "\n".join(one_line(str(line)) for line in self.args)


class ConfigError(PipelineError):
    """A setting is wrong, or two contradict each other; the message names them as the user knows them."""


class RunNotFound(PipelineError):
    """There is no run where one was expected."""


class NotARun(PipelineError):
    """A folder holds something that is no run. It is not changed."""


class StepOrderError(PipelineError):
    """A step was requested before the steps that it needs, or a second time."""


class ConfigMismatch(PipelineError):
    """The run directory holds another configuration or environment, or was written by a newer lampctl."""


class DamagedData(PipelineError):
    """A stored file is not what was committed. The message names it."""


class MissingChunk(DamagedData):
    """A sample of an activation stream is missing. It is never read as zeros or a fill value."""


class ResourceExhausted(PipelineError):
    """A resource outside the program is used up or does not work."""


class DiskError(ResourceExhausted):
    """The disk refused an operation. The message says which, on what path, and the system's reason."""


class FileGone(DiskError):
    """A file or folder does not exist any more."""


class OutOfDisk(DiskError):
    """The disk, or the quota on it, is full. What was committed before is untouched."""


class BucketError(DiskError):
    """The object store refused an operation, or did not answer. The message says which, and on what address."""


class BucketRefused(BucketError):
    """The object store refuses for good: there is no such bucket, or the credentials do not allow it."""


class UnsupportedPlace(ConfigError):
    """A run directory cannot be stored at this kind of address, or a required package is not installed."""


class FileExists(PipelineError):
    """A create-only write found its name taken. The caller reads the file back: it may be its own."""


class Occupied(PipelineError):
    """Another process is working on this run now."""


class Superseded(PipelineError):
    """Another process has committed the step this one was working on. Its data is not damaged."""


class Preempted(PipelineError):
    """The machine is about to be taken away, or the allowed run time is over. The run can be resumed."""


class Interrupted(PipelineError):
    """The user pressed Ctrl-C. The run can be resumed."""
