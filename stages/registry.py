"""Registry of named entries that are imported only when they are used.

Built-in entries are ``"module:object"`` strings. Other packages add entries by entry points of the same form, in the
group ``lampctl.<kind>``, for example in their pyproject.toml::

    [project.entry-points."lampctl.pruners"]
    random = "my_package.random_pruner:RandomPruner"

An entry is one class that carries everything its users ask: name, title, help, needs and options. Listing the names
imports nothing, so that ``lampctl --help`` stays fast.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from stages.entry_points import entry_points_of
from stages.errors import UsageError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

T = TypeVar("T")
log = logging.getLogger(__name__)


class Registry(Generic[T]):
    """Named entries of one kind: pruners, tasks, metrics, ...

    Built-in names come first, in the order given; then those of entry points, in alphabetical order. A built-in or
    reserved name cannot be replaced by an entry point. A package whose entry is broken takes away that entry only.
    """

    def __init__(
        self,
        kind: str,
        builtin: Mapping[str, str],
        *,
        group: str | None = None,
        base: str | None = None,
        reserved: tuple[str, ...] = (),
    ) -> None:
        """Declare a registry.

        Args:
            kind: What one entry is called in messages, in the singular: "pruner".
            builtin: ``"module:object"`` by name.
            group: Entry point group; default: ``lampctl.<kind>s`` with spaces as underscores.
            base: ``"module:object"`` of the class that every entry of a package is a subclass of, with every attribute
                and method that it declares; None: not checked.
            reserved: Names that no entry may have, because they mean something else where a name is chosen.
        """
        self.kind = kind
        self.group = group or f"lampctl.{kind.replace(' ', '_')}s"
        self._base = base
        self._reserved = reserved
        self._builtin = dict(builtin)
        self._loaded: dict[str, T] = {}
        self._broken: set[str] = set()

    def __repr__(self) -> str:
        return f"Registry({self.kind!r}, {list(self.names)})"

    def __contains__(self, name: object) -> bool:
        return name in self._builtin or name in self._loaded or name in self._plugins

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    @property
    def names(self) -> tuple[str, ...]:
        """Every name. Imports no entry."""
        registered = (name for name in self._loaded if name not in self._builtin and name not in self._plugins)
        return (*self._builtin, *self._plugins, *registered)

    @property
    def builtin_names(self) -> tuple[str, ...]:
        """The names of built-in entries."""
        return tuple(self._builtin)

    @property
    def added_names(self) -> tuple[str, ...]:
        """The names of other packages' entries, and of those that `register` added. Imports no entry."""
        return self.names[len(self._builtin) :]

    def get(self, name: str) -> T:
        """Import the entry of this name, once.

        Raises:
            UsageError: No entry has this name, with the nearest name; or the entry of a package is broken.
        """
        if name not in self._loaded:
            if name in self._builtin:
                self._loaded[name] = _load(self._builtin[name])
            elif name in self._plugins:
                self._loaded[name] = self._load_plugin(name)
            else:
                raise UsageError(self._unknown(name))
        return self._loaded[name]

    def entries(self) -> tuple[T, ...]:
        """Every entry that works, imported, in the order of `names`. A broken one of a package is logged, once."""
        return tuple(entry for _, entry in self.items())

    def items(self) -> tuple[tuple[str, T], ...]:
        """Name and entry of every entry that works, as `entries`."""
        found = []
        for name in self.names:
            if name in self._broken:
                continue
            try:
                found.append((name, self.get(name)))
            except UsageError as error:
                self._broken.add(name)
                log.warning("%s", error)
        return tuple(found)

    def register(self, name: str, entry: T) -> None:
        """Add an entry by hand, for this process: in a notebook or a test.

        Raises:
            ValueError: The name is taken.
        """
        if name in self or name in self._reserved:
            raise ValueError(f"{self.kind} {name!r} exists already")
        self._loaded[name] = entry

    def unregister(self, name: str) -> None:
        """Remove an entry that `register` added. Raises KeyError for any other name."""
        if name in self._builtin or name in self._plugins:
            raise KeyError(name)
        del self._loaded[name]

    @cached_property
    def _plugins(self) -> dict[str, EntryPoint]:
        found = entry_points_of(self.group)
        taken = {*self._builtin, *self._reserved}
        for point in found:
            if point.name in taken:
                log.warning(
                    "%s %s of the package %s is ignored: the name is taken", self.kind, point.name, _owner(point)
                )
        return {point.name: point for point in found if point.name not in taken}

    def _load_plugin(self, name: str) -> T:
        point = self._plugins[name]
        package = _owner(point)
        try:
            entry = point.load()
        except (Exception, SystemExit) as error:  # a package that is not ours may raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UsageError(
                f"{self.kind} {name} of the package {package} cannot be imported ({reason}): "
                f"update or uninstall {package}"
            ) from error
        fault = _fault_of(entry, self._base) if self._base is not None else None
        if fault is not None:
            raise UsageError(f"{self.kind} {name} of the package {package} {fault}: update or uninstall {package}")
        return cast(T, entry)

    def _unknown(self, name: str) -> str:
        near = difflib.get_close_matches(name, self.names, n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        return f"no {self.kind} is called {name}{meant}: choose one of {', '.join(self.names)}"


def _fault_of(entry: object, base: str) -> str | None:
    """Why an entry is no complete subclass of `base` ("module:object"); None: it is one."""
    parent = _load(base)
    if not (isinstance(entry, type) and issubclass(entry, parent)):
        return f"is no subclass of {base.replace(':', '.')}"
    declared = (inspect.get_annotations(owner) for owner in parent.__mro__)
    described = {name for own in declared for name, kind in own.items() if str(kind).startswith("ClassVar")}
    absent = sorted(
        {*getattr(entry, "__abstractmethods__", ()), *(name for name in described if not hasattr(entry, name))}
    )
    return f"lacks {', '.join(absent)}" if absent else None


def _owner(point: EntryPoint) -> str:
    """The package that an entry point belongs to."""
    return point.dist.name if point.dist is not None else point.module


def _load(reference: str) -> Any:
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)
