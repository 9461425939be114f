"""Default settings by method, sparsity and model family.

docs/experiments.md has the measurements behind them, with the commands (`python -m benchmarks.quality.trial ...`);
benchmarks/results/tune.md has those of alpha. The paper's settings are what the paper, and the public code closest to
it, state for 70%.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingDefaults:
    """The values of LAMP's settings that the user does not give."""

    alpha: float  # LAMP Eqs. 1-2
    beta: float  # LAMP Eqs. 3-4
    pruner: str  # "sparsegpt", or "alps"
    effort: str | None  # a key of EFFORTS; None: the paper's settings
    epochs: int  # of compensation
    lr: str | float  # `stages.training.rates.Rate.parse` reads it
    lr_decay: float  # factor per epoch
    loss: str  # "mse", "token"
    held_out: bool  # judge epochs on 1 held-out sample in 16; undo one that did not help, lower the rate
    refine: bool
    refine_epochs: int
    refine_lr: str | float
    distill: bool = False
    distill_samples: int | None = None  # None: the calibration set
    distill_generates: bool = False  # the original model generates as many samples more


# (up to this sparsity, learning rate): a larger pruning error needs a larger rate. Measured at 70% and 2:4 on the first
# 12 blocks of SmolLM2-135M, where 2e-3 beats 1e-3 by 2%; on tiny-opt the two are within 1% (docs/experiments.md). The
# rates below 45% are not measured.
_RATES = ((0.25, "0.25%"), (0.45, "0.5%"), (1.0, "1%"))


@dataclass(frozen=True)
class Effort:
    """How long to train, in samples: the epochs follow from the size of the set.

    A large set is trained on once, a small one several times, so that a set four times as large does not take four
    times as long. These budgets are not compared with others yet (docs/experiments.md).

    Attributes:
        compensation: Training steps of compensation per block, of one sample each.
        refinement: Training steps of refinement per block.
        distillation: Samples that distillation trains on, each counted once an epoch. There is at least one epoch over
            the whole set, which generated samples double.
        generates: The original model generates as many samples more for distillation.
        distillation_set: Samples of the set that distillation draws for itself. None: it has the calibration set.
    """

    compensation: int
    refinement: int
    distillation: int
    generates: bool = False
    distillation_set: int | None = None


EFFORTS = {
    "low": Effort(0, 60, 60),
    "medium": Effort(0, 120, 120, generates=True),
    "high": Effort(120, 240, 480, generates=True, distillation_set=480),
}
DEFAULT_EFFORT = "medium"
_MOST_EPOCHS = 4
_MOST_DISTILL_EPOCHS = 2
# An epoch of distillation has about this many updates, of at most _LARGEST_BATCH samples: for each, a streamed model
# is read twice and written once, with its moments.
_UPDATES, _LARGEST_BATCH = 16, 16


def _epochs(num_steps: int, num_samples: int, most: int) -> int:
    """Epochs that come to about `num_steps` samples: at least one unless there are no steps, and at most `most`."""
    return min(max(round(num_steps / num_samples), 1), most) if num_steps else 0


def distillation_set(effort: str, num_samples: int) -> int | None:
    """Default size of the set of distillation beside a calibration set of `num_samples`; None: that set itself."""
    wanted = EFFORTS[effort].distillation_set
    return wanted if wanted is not None and wanted > num_samples else None


def distillation(effort: str, num_samples: int) -> tuple[int, int]:
    """Default epochs and batch of distillation on a set of `num_samples`."""
    batch = min(max(round(num_samples / _UPDATES), 1), _LARGEST_BATCH)
    return _epochs(EFFORTS[effort].distillation, num_samples, _MOST_DISTILL_EPOCHS), batch


# alpha moves sparsity from the last block to the others. In a model of few blocks that costs more than it gains, so
# each of the others may lose at most this share of its weights in addition (tiny-opt, 6 blocks at 70%: perplexity 30.2
# with alpha 1, 31.6 with 0.7; `lampctl run examples/tiny-opt --sparsity 0.7 --calibration pydocs --num-samples 16
# --seqlen 128 --beta 0 ...`).
_MOST_ADDED = 0.02


def measured(model_type: str, sparsity: float, num_blocks: int, effort: str, num_samples: int) -> TrainingDefaults:
    """The default settings.

    Args:
        model_type: `config.model_type` of transformers.
        sparsity: Target share of masked weights.
        num_blocks: Blocks of the model.
        effort: "low", "medium" or "high".
        num_samples: Of the calibration set.
    """
    spared = 0.3 if sparsity > 0.55 else 0.15
    lr = next(rate for limit, rate in _RATES if sparsity <= limit)
    steps = EFFORTS[effort]
    return TrainingDefaults(
        alpha=round(1 - min(spared, _MOST_ADDED * (num_blocks - 1) / sparsity), 4),
        beta=round(0.7 * (1 - sparsity), 4) if model_type == "opt" else 0.0,
        pruner="alps",
        effort=effort,
        epochs=_epochs(steps.compensation, num_samples, _MOST_EPOCHS),
        lr=lr,
        lr_decay=0.87,
        loss="token",
        held_out=True,
        refine=True,
        refine_epochs=_epochs(steps.refinement, num_samples, _MOST_EPOCHS),
        refine_lr=lr,
        distill=True,
        distill_samples=distillation_set(effort, num_samples),
        distill_generates=steps.generates,
    )


def published(model_type: str, sparsity: float) -> TrainingDefaults:
    """The paper's settings, published for 70% (LAMP section 4 and the ICP code); no held-out samples, no refinement.

    OPT: rate 1e-4, 12 epochs, alpha 0.691, beta 0.2 at 70%, which is the middle of the 0.6(1-s) to 0.8(1-s) that
    the paper found best. Segment Anything: rate 5e-4, 8 epochs, decay 0.9, alpha 0.85. Others: as Llama-2-7B.
    """
    if model_type == "sam":
        return TrainingDefaults(0.85, 0.0, "sparsegpt", None, 8, 5e-4, 0.9, "mse", False, False, 1, 5e-4)
    is_opt = model_type == "opt"
    return TrainingDefaults(
        alpha=0.691 if is_opt else 0.7,
        beta=round(0.7 * (1 - sparsity), 4) if is_opt else 0.0,
        pruner="sparsegpt",
        effort=None,
        epochs=12 if is_opt else 1,
        lr=1e-4 if is_opt else 5e-4,
        lr_decay=0.87,
        loss="mse",
        held_out=False,
        refine=False,
        refine_epochs=1,
        refine_lr=1e-4 if is_opt else 5e-4,
    )
