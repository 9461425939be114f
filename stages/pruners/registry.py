"""The pruners by name, and the methods that a user can choose: LAMP, or one of the pruners by itself."""

from __future__ import annotations

from stages.errors import UsageError
from stages.pruners.base import Pruner
from stages.registry import Registry

PRUNERS: Registry[type[Pruner]] = Registry(
    "pruner",
    {
        "sparsegpt": "stages.pruners.sparsegpt:SparseGPT",
        "alps": "stages.pruners.alps:ALPS",
        "wanda": "stages.pruners.wanda:Wanda",
        "magnitude": "stages.pruners.magnitude:Magnitude",
    },
)
LAMP = "lamp"  # the method that prunes and compensates block by block, with one of the pruners
PAPER_PRUNER = "sparsegpt"  # LAMP's in the paper


def method_names() -> tuple[str, ...]:
    """Every method that `--method` takes."""
    return (LAMP, *PRUNERS.names)


def lamp_pruners() -> tuple[str, ...]:
    """Every pruner that LAMP may prune its blocks with."""
    return tuple(name for name in PRUNERS.names if PRUNERS.get(name).serves_lamp)


def bit_methods() -> tuple[str, ...]:
    """Every method that can quantize the weights that it keeps."""
    return (LAMP, *(name for name in PRUNERS.names if PRUNERS.get(name).supports_bits))


def method_title(name: str) -> str:
    """The method's name for people: "LAMP", "SparseGPT". A method whose package is gone keeps its plain name."""
    if name == LAMP:
        return "LAMP"
    try:
        return PRUNERS.get(name).title
    except UsageError:
        return name


def reads_data(method: str) -> bool:
    """Whether the method needs a calibration set. Raises UsageError for a method that does not exist."""
    return method == LAMP or PRUNERS.get(method).needs_data
