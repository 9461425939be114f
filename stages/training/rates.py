"""Learning rates: absolute, or relative to the size of each tensor's values.

Adam moves every weight by about the rate, and 2e-3 is 1% of the root mean square of most matrices of SmolLM2-135M, but
5 to 12% of that of Gemma-3-270M's (docs/experiments.md). A relative rate moves every tensor by the same share of its
own values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.errors import UsageError

# Settings are read without torch: `lampctl status` must not wait a second for it.
if TYPE_CHECKING:
    from torch import Tensor

_LARGEST = 1e6


@dataclass(frozen=True)
class Rate:
    """A learning rate of Adam.

    Attributes:
        value: The rate. If it is relative, as a share: 0.01 for 1%.
        is_relative: It is multiplied by the root mean square of each tensor before training.
    """

    value: float
    is_relative: bool = False

    @classmethod
    def parse(cls, text: str | float) -> Rate:
        """A rate as settings have it: 0.001 or "1e-3" (absolute), "1%" (relative).

        Raises:
            UsageError: It is no rate.
        """
        number = str(text).strip()
        is_relative = number.endswith("%")
        try:
            value = float(number.removesuffix("%"))
        except ValueError:
            value = math.nan
        if not 0 < value <= _LARGEST:  # also refuses NaN
            raise UsageError(
                f"expected a number above zero and at most {_LARGEST:g} such as 1e-3, or such as 1% (of each tensor's "
                "root mean square)"
            )
        return cls(value / 100, is_relative=True) if is_relative else cls(value)

    def __str__(self) -> str:
        return f"{100 * self.value:g}%" if self.is_relative else f"{self.value:g}"

    def factors(self, parameters: Mapping[str, Tensor]) -> dict[str, float]:
        """What the rate is multiplied by for each parameter of a block: 1, or the root mean square of its values.

        A parameter that is zero throughout, such as a new bias, takes that of its module's weight, or else that of all
        parameters.

        Args:
            parameters: All parameters by names such as "self_attn.q_proj.weight".
        """
        if not self.is_relative:
            return dict.fromkeys(parameters, 1.0)
        squares = {name: _mean_square(parameter) for name, parameter in parameters.items()}
        counts = {name: parameter.numel() for name, parameter in parameters.items()}
        overall = math.fsum(squares[name] * counts[name] for name in squares) / max(sum(counts.values()), 1)
        return {
            name: math.sqrt(square or squares.get(f"{name.rpartition('.')[0]}.weight", 0.0) or overall)
            for name, square in squares.items()
        }


def _mean_square(tensor: Tensor) -> float:
    import torch

    return tensor.detach().float().square().mean(dtype=torch.float64).item()
