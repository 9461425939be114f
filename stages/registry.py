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
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from stages.errors import UsageError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

T = TypeVar("T")


class Registry(Generic[T]):
    """Named entries of one kind: pruners, tasks, metrics, ...

    Built-in names come first, in the order given; then those of entry points, in alphabetical order. A built-in name
    cannot be replaced by an entry point.
    """

    def __init__(self, kind: str, builtin: Mapping[str, str], *, group: str | None = None) -> None:
        """Declare a registry.

        Args:
            kind: What one entry is called in messages, in the singular: "pruner".
            builtin: ``"module:object"`` by name.
            group: Entry point group; default: ``lampctl.<kind>s`` with spaces as underscores.
        """
        self.kind = kind
        self.group = group or f"lampctl.{kind.replace(' ', '_')}s"
        self._builtin = dict(builtin)
        self._loaded: dict[str, T] = {}

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

    def get(self, name: str) -> T:
        """Import the entry of this name, once.

        Raises:
            UsageError: No entry has this name, with the nearest name; or the entry's package cannot be imported.
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
        """Every entry, imported, in the order of `names`."""
        return tuple(self.get(name) for name in self.names)

    def register(self, name: str, entry: T) -> None:
        """Add an entry by hand, for this process: in a notebook or a test.

        Raises:
            ValueError: The name is taken.
        """
        if name in self:
            raise ValueError(f"{self.kind} {name!r} exists already")
        self._loaded[name] = entry

    def unregister(self, name: str) -> None:
        """Remove an entry that `register` added. Raises KeyError for any other name."""
        if name in self._builtin or name in self._plugins:
            raise KeyError(name)
        del self._loaded[name]

    @cached_property
    def _plugins(self) -> dict[str, EntryPoint]:
        from importlib.metadata import entry_points  # takes 20 ms, which `lampctl --help` can do without

        found = sorted(entry_points(group=self.group), key=lambda point: point.name)
        return {point.name: point for point in found if point.name not in self._builtin}

    def _load_plugin(self, name: str) -> T:
        point = self._plugins[name]
        try:
            return cast(T, point.load())
        except (ImportError, AttributeError) as error:
            package = point.dist.name if point.dist is not None else point.module
            raise UsageError(
                f"{self.kind} {name} of the package {package} cannot be imported ({error}): update or uninstall "
                f"{package}"
            ) from error

    def _unknown(self, name: str) -> str:
        near = difflib.get_close_matches(name, self.names, n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        return f"no {self.kind} is called {name}{meant}: choose one of {', '.join(self.names)}"


def _load(reference: str) -> Any:
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)
