"""Registry of pruners, and of the methods that a user can choose: LAMP, or one pruner without compensation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.errors import UsageError
from stages.registry import Registry

# Help lists the names; importing the classes takes 10 ms.
if TYPE_CHECKING:
    from stages.pruners.base import Pruner

LAMP = "lamp"  # prunes with one of the pruners and compensates, block by block
PRUNERS: Registry[type[Pruner]] = Registry(
    "pruner",
    {
        "sparsegpt": "stages.pruners.sparsegpt:SparseGPT",
        "alps": "stages.pruners.alps:ALPS",
        "wanda": "stages.pruners.wanda:Wanda",
        "magnitude": "stages.pruners.magnitude:Magnitude",
    },
    base="stages.pruners.base:Pruner",
    reserved=(LAMP,),
)
PAPER_PRUNER = "sparsegpt"  # LAMP's pruner in the paper


def method_names() -> tuple[str, ...]:
    """Every value of `--method`."""
    return (LAMP, *PRUNERS.names)


def lamp_pruners() -> tuple[str, ...]:
    """Every pruner that LAMP may use: the values of `--pruner`."""
    return tuple(name for name, pruner in PRUNERS.items() if pruner.serves_lamp)


def bit_methods() -> tuple[str, ...]:
    """Every method that can quantize the kept weights."""
    return (LAMP, *(name for name, pruner in PRUNERS.items() if pruner.supports_bits))


def method_title(name: str) -> str:
    """The method's title: "LAMP", "SparseGPT". A method whose package is no longer installed keeps its plain name."""
    if name == LAMP:
        return "LAMP"
    try:
        return PRUNERS.get(name).title
    except UsageError:
        return name


def reads_data(method: str) -> bool:
    """Whether the method needs a calibration set. Raises UsageError for a method that does not exist."""
    return method == LAMP or PRUNERS.get(method).needs_data
