"""What every data source provides: a name, a check, a digest. `TextSource` and `ImageSource` say how it is read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from stages.errors import UsageError

if TYPE_CHECKING:
    from pydantic import JsonValue

    from stages.models.base import BlockModel

    # What tells the contents of a data source from others. It is stored and compared, never read.
    SourceDigest = dict[str, JsonValue]


class DataSource(ABC):
    """Data that a user named, by ``KIND`` or ``KIND:PATH``.

    A subclass is one kind of data source; an object is one source of that kind. Base classes of kinds:
    `stages.data.text_source.TextSource` and `stages.data.image_source.ImageSource`.
    """

    # Name in the registry: what stands before the colon.
    kind: ClassVar[str]
    title: ClassVar[str]  # for people
    help: ClassVar[str]  # one line
    # What it holds: "text", "images". Models of every task on such contents read it (`stages.tasks.base.Task`).
    contents: ClassVar[str]
    # Whether a path follows the colon.
    path: ClassVar[Literal["none", "optional", "required"]] = "none"
    # What the path is in help texts.
    path_metavar: ClassVar[str] = "PATH"
    # How calibration samples are drawn unless the user says.
    default_sampling: ClassVar[Literal["contiguous", "random"]] = "contiguous"

    name: str  # canonical: KIND, or KIND:PATH with an absolute path

    @classmethod
    def forms(cls) -> tuple[str, ...]:
        """How a user may write it: ("c4", "c4:PATH")."""
        with_path = f"{cls.kind}:{cls.path_metavar}"
        return {"none": (cls.kind,), "optional": (cls.kind, with_path), "required": (with_path,)}[cls.path]

    @classmethod
    @abstractmethod
    def named(cls, path: str | None) -> Self:
        """The source that a user named.

        Args:
            path: What follows the colon, not empty; None where there is no colon.

        Raises:
            UsageError: Nothing is at this path.
        """

    @property
    @abstractmethod
    def is_local(self) -> bool:
        """Whether it can be read without the hub."""

    @abstractmethod
    def check(self) -> None:
        """Make sure that it can be read. Downloads nothing.

        Raises:
            UsageError: It is not there, cannot be read, or holds nothing.
            ResourceError: The hub cannot be reached.
        """

    @abstractmethod
    def digest(self) -> SourceDigest | None:
        """What tells this source's contents from others, ready for JSON; None where the contents are not local."""


def require_contents(source: DataSource, contents: str, model: BlockModel) -> None:
    """Raise UsageError where a data source holds other contents than those that a kind of model reads."""
    if source.contents != contents:
        raise UsageError(f"{source.name} holds {source.contents}, and what {model.source.name} reads is {contents}")
