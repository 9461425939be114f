"""Records of a run directory: what a run is, and what each step has committed.

A record is a JSON object whose `digest` is the sha256 of the rest of it in canonical form (sorted keys, no white space,
ASCII). JSON has no NaN or infinity: in a step's result they become null, since an overflowed perplexity is no reason to
discard a finished step; anywhere else they are refused with ValueError.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)

from pipeline.errors import ConfigError, ConfigMismatch, DamagedData
from pipeline.rundir.migrations import migrate

# Steps of records that are no work: commits that are no longer valid; from here on, another machine or other versions,
# or other runtime settings.
INVALIDATE = "invalidate"
ENVIRONMENT = "environment"
SETTINGS = "settings"

JsonObject = dict[str, JsonValue]

StreamDtype = Literal["float32", "float16", "bfloat16", "int64", "int32"]


def relative_path(path: str) -> str:
    """The same path, if it is a plain POSIX path that stays in the folder it starts from; else ValueError."""
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in path or "\0" in path:
        raise ValueError(f"{path!r} is not a plain relative path inside the run directory")
    return path


def require_text(text: str) -> str:
    """The same text, if a record can hold it; else ValueError. A name of a file that is not UTF-8 is none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{text!a} is not UTF-8") from None
    return text


RelativePath = Annotated[str, AfterValidator(relative_path)]
# More than any machine has, and little enough that sums stay finite.
Bytes = Annotated[int, Field(ge=0, le=2**60)]
Seconds = Annotated[float, Field(ge=0, le=1e10, allow_inf_nan=False)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PayloadFile(_Part):
    """A file that a commit vouches for. `path` is relative to the run directory."""

    path: RelativePath
    size: Bytes
    sha256: Sha256


class StreamSpec(_Part):
    """What an activation stream holds: `num_samples` tensors of `sample_shape`, of one dtype."""

    num_samples: int = Field(ge=1, le=2**40)
    sample_shape: tuple[Annotated[int, Field(ge=1, le=2**40)], ...]
    dtype: StreamDtype


class Payload(_Part):
    """A named result of a step: the files under `root`, a folder of its own in the run directory."""

    kind: Literal["stream", "file", "folder"]
    root: RelativePath
    files: tuple[PayloadFile, ...] = Field(min_length=1)
    stream: StreamSpec | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        paths = {file.path for file in self.files}
        if len(paths) != len(self.files) or not all(path.startswith(f"{self.root}/") for path in paths):
            raise ValueError(f"the files of a payload must be distinct and lie under its root {self.root}")
        if (self.stream is not None) != (self.kind == "stream"):
            raise ValueError("a payload has a stream description if, and only if, it is a stream")
        if self.stream is not None and len(self.files) != self.stream.num_samples + 1:
            raise ValueError(f"a stream of {self.stream.num_samples} samples has one file more than samples")
        if self.kind == "file" and len(self.files) != 1:
            raise ValueError("a payload of kind file has one file")
        return self

    def inner(self, file: PayloadFile) -> str:
        """The path of one of its files, relative to the payload's root."""
        return file.path.removeprefix(f"{self.root}/")

    def file(self, inner: str) -> PayloadFile:
        """The file at this path relative to the root. Raises KeyError."""
        for file in self.files:
            if self.inner(file) == inner:
                return file
        raise KeyError(inner)


class Result(BaseModel):
    """Base of what a kind of step reports in its commit. Each kind has a subclass of its own."""

    # "constants" lets NaN through, which a commit makes null; pydantic's default refuses nothing and says nothing.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


R = TypeVar("R", bound=Result)


class Invalidation(Result):
    """Result of a record that invalidates the commits from `from_number` on."""

    from_number: int = Field(ge=0)
    reason: str


class EnvironmentChange(Result):
    """Result of a record after which another machine, or other versions, do the steps."""

    environment: JsonObject
    changes: tuple[str, ...]


class Replacement(Result):
    """Result of a record whose payload replaces one of commit `replaces`, with other bits."""

    replaces: int = Field(ge=0)


class Record(BaseModel):
    """A JSON file with a schema version and its own digest. Build one with `new`, read one with `from_bytes`."""

    # "constants" lets NaN through to json.dumps, which refuses it; the default makes it null unasked.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")
    newest_schema: ClassVar[int] = 2

    schema_version: Literal[2] = 2
    digest: Sha256

    @classmethod
    def new(cls, **fields: Any) -> Self:
        """The record of these fields, with its digest.

        Raises:
            ConfigError: A text is not UTF-8, as the name of a file may be.
            ValueError: What JSON cannot say.
        """
        _require_texts(fields)  # a key that JSON cannot say would be changed unasked
        body = cls(digest="0" * 64, **fields).model_dump(mode="json", exclude={"digest"})
        _require_texts(body)
        # Through JSON and back, so that what is in memory is what a reader will find.
        return cls.model_validate_json(json.dumps({**body, "digest": _digest(body)}), strict=True)

    def to_bytes(self) -> bytes:
        """The file's bytes: the same for the same record, always."""
        return _file_bytes(self.model_dump(mode="json"))

    @classmethod
    def from_bytes(cls, data: bytes, path: Path | str, remedy: str = "") -> Self:
        """The record in these bytes of the file `path`, checked.

        Raises DamagedData, ConfigMismatch (too new). `remedy` is added to the message of DamagedData: what the user
        can do about it.
        """
        try:
            raw = json.loads(data, parse_constant=_refuse_constant)
            if not isinstance(raw, dict):
                raise ValueError("it is no JSON object")
            version = raw.get("schema_version")
            if type(version) is int and version > cls.newest_schema:
                raise ConfigMismatch(
                    f"{path} was written by a newer lampctl (schema {version}; this one knows up to "
                    f"{cls.newest_schema}). Nothing was changed: update lampctl and run the command again"
                )
            body = {key: value for key, value in raw.items() if key != "digest"}
            # The bytes, too: a digest of the contents knows nothing of white space.
            if raw.get("digest") != _digest(body) or data != _file_bytes(raw):
                raise ValueError("its contents do not match its digest")
            if version != cls.newest_schema:
                data = json.dumps(migrate(cls.__name__, raw, cls.newest_schema)).encode()
            return cls.model_validate_json(data, strict=True)
        except (ValueError, RecursionError) as error:
            lines = [first_reason(error)] if isinstance(error, ValidationError) else str(error).splitlines()
            reason = lines[0] if lines else type(error).__name__
            raise DamagedData(f"{path} is damaged: {reason[:200]}. {remedy}".rstrip()) from error


class RunManifest(Record):
    """run.json: what a run is. Written once, before the first step.

    The run directory does not interpret these parts. `pipeline.steps.run_facts` does.
    """

    created_at: AwareDatetime
    config: JsonObject
    provenance: dict[str, str]
    identity: JsonObject
    model: JsonObject
    environment: JsonObject
    budget: list[JsonValue]
    plan: list[str]


class StepCommit(Record):
    """commits/NNNNNN.json: a step is done, and these are its results.

    Attributes:
        number: Its place in the chain, from 0.
        step: Name of the step.
        parent: Digest of the record before, or of run.json.
        attempt: The folder in data/ that was written for it.
        payloads: What the step wrote, by name.
        result: What the step reports, in the form that its kind defines. Read it by `result_as`.
        free: The runtime settings in force, by the name that this key has had on disk since schema 1.
        started_at: When the step began.
        elapsed_s: Seconds of work.
        peak_memory_bytes: Peak memory of the process.
        peak_device_bytes: Peak memory of the GPU.
    """

    number: int = Field(ge=0)
    step: str = Field(min_length=1)
    parent: Sha256
    attempt: str = Field(pattern=r"^[0-9]{6}-[0-9a-f]{8}$")
    payloads: dict[str, Payload]
    result: JsonObject
    free: JsonObject
    started_at: AwareDatetime
    elapsed_s: Seconds
    peak_memory_bytes: Bytes | None = None
    peak_device_bytes: Bytes | None = None

    @field_validator("result", mode="before")
    @classmethod
    def _finite(cls, result: object) -> object:
        return finite_or_null(result)

    def result_as(self, model: type[R]) -> R:
        """The step's result in the form of its kind.

        Raises:
            DamagedData: The result does not have this form.
        """
        try:
            return model.model_validate_json(json.dumps(self.result), strict=True)
        except (ValidationError, RecursionError) as error:
            reason = str(error) if isinstance(error, RecursionError) else first_reason(error)
            raise DamagedData(
                f"commits/{self.number:06d}.json is damaged: its result is not that of {self.step[:100]}: {reason}"
            ) from error

    @model_validator(mode="after")
    def _payloads_in_data(self) -> Self:
        for name, payload in self.payloads.items():
            if payload.root.split("/")[:2] != ["data", self.attempt] or payload.root.count("/") != 2:
                raise ValueError(f"payload {name} does not lie in data/{self.attempt}/")
        return self

    @model_validator(mode="after")
    def _says_what_it_changes(self) -> Self:
        if self.step == INVALIDATE:
            number = self.result.get("from_number")
            if self.payloads or type(number) is not int or not 0 <= number < self.number:
                raise ValueError("a record that invalidates names an earlier commit, and has no payloads")
        if self.step == ENVIRONMENT and (self.payloads or not isinstance(self.result.get("environment"), dict)):
            raise ValueError("a record of another environment says which, and has no payloads")
        if self.step == SETTINGS and (self.payloads or self.result):
            raise ValueError("a record of other settings has neither payloads nor a result")
        return self


def finite_or_null(value: Any) -> Any:
    """The same JSON value with None for every float that JSON cannot say, and lists for tuples."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite_or_null(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(inner) for inner in value]
    return value


def first_reason(error: ValidationError) -> str:
    """The first thing that a validation found, in one short line."""
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(str(part) for part in first['loc'])[:200]}: {first['msg'][:200]}"


def _require_texts(value: object) -> None:
    """Raise ConfigError for a text in it that JSON cannot say."""
    if isinstance(value, str):
        try:
            require_text(value)
        except ValueError as error:
            raise ConfigError(f"{error}, and no record can hold it: rename it") from error
    elif isinstance(value, dict):
        for key, entry in value.items():
            _require_texts(key)
            _require_texts(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            _require_texts(entry)


def _digest(body: Mapping[str, object]) -> str:
    """The sha256, in hexadecimal, of the body in canonical JSON. ValueError for NaN and infinities."""
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _file_bytes(fields: Mapping[str, object]) -> bytes:
    return (json.dumps(fields, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def _refuse_constant(name: str) -> float:
    raise ValueError(f"it holds {name}, which is no JSON")
