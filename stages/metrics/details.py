"""Details of a measurement: on how much data a metric was measured, and in which way.

A metric names its class of details (`stages.metrics.base.Metric.details`). Commits keep the fields as JSON. The fields'
annotations say what is valid, so that a forged commit is refused when it is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from annotated_types import Interval

if TYPE_CHECKING:
    from pydantic import JsonValue, TypeAdapter

Count = Annotated[int, Interval(ge=0, le=2**53)]
Share = Annotated[float, Interval(ge=0, le=1)]


@dataclass(frozen=True)
class Details:
    """Base of all details. A subclass is a frozen dataclass whose fields are JSON values."""

    # pydantic reads this: a field of another name, NaN and infinities are refused.
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "allow_inf_nan": False}

    unit: ClassVar[str] = "samples"  # of `amount`

    @property
    def amount(self) -> int:
        """Number of tokens, masks or the like that were measured. 0: not known."""
        return 0

    @property
    def protocol(self) -> str:
        """What else two results must share to be compared, as short as column titles want it; may be empty."""
        return ""

    def described(self, *, is_partial: bool) -> str:
        """How it was measured, in a few words; with the word "partial" for a part of the data."""
        return ", ".join([*filter(None, [self.protocol]), *(["partial"] if is_partial else [])])

    def as_json(self) -> dict[str, JsonValue]:
        """The fields as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, JsonValue]) -> Self:
        """Validate a JSON object. Raises ValueError for one that `as_json` cannot have given."""
        from pydantic import ValidationError

        try:
            found: Self = _validator_of(cls).validate_json(json.dumps(dict(values)), strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        return found


_VALIDATORS: dict[type[Details], TypeAdapter[Any]] = {}


def _validator_of(kind: type[Details]) -> TypeAdapter[Any]:
    if kind not in _VALIDATORS:
        from pydantic import TypeAdapter

        _VALIDATORS[kind] = TypeAdapter(kind)
    return _VALIDATORS[kind]


@dataclass(frozen=True)
class OpenDetails(Details):
    """JSON values under any names: for a metric without a class of its own, and for one whose package is gone.

    Results can be compared if all values are equal.
    """

    values: Mapping[str, JsonValue] = field(default_factory=dict)

    @property
    def protocol(self) -> str:
        return ", ".join(f"{name} {json.dumps(value)}"[:100] for name, value in sorted(self.values.items()))

    def as_json(self) -> dict[str, JsonValue]:
        return dict(self.values)

    @classmethod
    def from_json(cls, values: Mapping[str, JsonValue]) -> Self:
        return cls(dict(values))
