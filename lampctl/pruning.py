"""`lampctl.prune`: LAMP, or one of the pruners, on a model in memory."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.errors import ConfigError
from stages.errors import UsageError

if TYPE_CHECKING:
    from pydantic import JsonValue
    from torch import Tensor
    from transformers import PreTrainedModel

    from pipeline.config.declarations import GivenSettings
    from pipeline.config.gather import Gathered
    from pipeline.config.run_config import RunConfig
    from pipeline.runs.prepare import PlannedPruning
    from stages.data.drawing import Drawing
    from stages.data.text_source import Bos, TextSource
    from stages.distill import Distillation
    from stages.distill_in_memory import DistilledBlocks
    from stages.interfaces import Callbacks
    from stages.lamp import Budget, LampBlock, LampSettings
    from stages.measure_end_loss import MeasuredEndLoss
    from stages.models.decoder import Decoder
    from stages.runtime.block_context import StageContext
    from stages.sparsity.outcome import PrunedLayer
    from stages.training.trainer import Training

# The work changes settings of torch that hold for the whole process, and puts them back.
_WORKING = threading.RLock()


@dataclass(frozen=True)
class BlockReport:
    """How a block was pruned and trained."""

    index: int  # from 0
    layers: tuple[PrunedLayer, ...]  # counts of each layer, and the error of its output
    compensation: Training | None  # losses before and after; None: the block was not compensated
    refinement: Training | None


@dataclass(frozen=True)
class PruneReport:
    """What `prune` did."""

    method: str
    settings: dict[str, JsonValue]  # every setting that decides the weights
    num_masked: int
    num_prunable: int
    blocks: tuple[BlockReport, ...]
    distillation: Distillation | None = None  # losses before and after; None: the model was not distilled
    # How far the output is from the original model's, on the samples that training holds out unless held_out=False;
    # None: there is no calibration set.
    end_loss: MeasuredEndLoss | None = None

    @property
    def sparsity(self) -> float:
        """The share of the prunable weights that are masked, and so zero."""
        return self.num_masked / self.num_prunable


class Pruned(NamedTuple):
    """A pruned model, and how it was made."""

    model: PreTrainedModel
    report: PruneReport


def prune(
    model: PreTrainedModel,
    calibration: Any = None,
    *,
    tokenizer: Any = None,
    inplace: bool = False,
    preset: str | None = None,
    callbacks: Callbacks | None = None,
    **settings: Any,
) -> Pruned:
    """Prune a decoder-only language model of transformers that is in memory (Algorithm 1 of LAMP).

    Nothing is written to disk, and nothing can be resumed: for large models use `lampctl.run`. Calls from several
    threads run one after the other.

    Args:
        model: The model, on any device. Its mode and dtype stay.
        calibration: What it is calibrated on: a data source by name ("c4", "pydocs", "text:PATH"; needs a tokenizer),
            texts (likewise), or token ids, (N, T). None: for methods that need no data.
        tokenizer: The model's tokenizer.
        inplace: Change `model` itself; otherwise a copy.
        preset: "quick" or "paper".
        callbacks: Receives progress and warnings, and may stop the work; None: warnings are Python warnings.
        **settings: Settings of `lampctl run` that decide the weights: ``sparsity=0.7``, ``pattern="2:4"``,
            ``method="wanda"``, ``effort="high"`` (docs/settings.md).

    Returns:
        The pruned model and a report.

    Raises:
        ConfigError, UsageError: A setting is wrong, or the model cannot be pruned; the message says what to change.
        NumericalError: A weight or a loss is not finite.
    """
    from pipeline.steps.stage_settings import distillation_drawing_of, drawing_of
    from stages.in_memory import ListScratch, NullCallbacks
    from stages.lamp import lamp
    from stages.machine.torch_state import applied, usual_modes
    from stages.measure_end_loss import EndLossMeasuring
    from stages.models.in_memory import open_in_memory
    from stages.runtime.block_context import StageContext

    told = callbacks if callbacks is not None else NullCallbacks()
    with _WORKING, usual_modes():
        decoder = open_in_memory(model)
        gathered = _gathered({**settings, "model": decoder.source.name}, preset, calibration)
        planned = _planned(gathered, decoder, calibration)
        for notice in planned.notices:
            warnings.warn(notice, stacklevel=2)
        config = planned.config
        inputs = _samples(calibration, tokenizer, planned, decoder, drawing_of)
        context = StageContext(decoder, inputs, planned.device, told)
        target = model if inplace else copy.deepcopy(model)
        distillation = end_loss = None
        with applied(planned.device):
            measuring = EndLossMeasuring(context, ListScratch()) if config.end_loss else None
            finished = lamp(context, _budget(planned, context), _settings(planned))
            if config.distill:
                own = inputs
                if config.distill_samples is not None:
                    own = _samples(calibration, tokenizer, planned, decoder, distillation_drawing_of)
                # The original blocks are needed to the end: nothing is written into the model before.
                distilled = _distilled(replace(context, inputs=own), list(finished), planned)
                distillation, finished = distilled.distillation, iter(distilled.blocks)
            blocks = tuple(_kept(block, target, decoder) for block in finished)
            if measuring is not None:
                end_loss = measuring.of(open_in_memory(target), shares_ends=True)
    for message in getattr(told, "warnings", ()) if callbacks is None else ():
        warnings.warn(message, stacklevel=2)
    layers = [layer for block in blocks for layer in block.layers]
    return Pruned(
        target,
        PruneReport(
            method=config.method,
            settings=config.identity,
            num_masked=sum(layer.num_masked for layer in layers),
            num_prunable=sum(layer.size for block in planned.budget for layer in block.layers),
            blocks=blocks,
            distillation=distillation,
            end_loss=end_loss,
        ),
    )


def _gathered(settings: GivenSettings, preset: str | None, calibration: Any) -> Gathered:
    """The settings that were given, checked, without the environment's: a library call depends on its arguments."""
    from pipeline.config.completion import check_combinations
    from pipeline.config.gather import gather
    from pipeline.config.run_config import RUNTIME_FIELDS

    for name in settings:
        if name in RUNTIME_FIELDS or name in ("export_dtype", "calibration", "revision", "trust_remote_code"):
            raise ConfigError(f"{name} is a setting of runs (lampctl.run), not of a model in memory")
    values = dict(settings)
    if isinstance(calibration, str):
        values["calibration"] = calibration
    elif calibration is not None and not _is_text(calibration):
        held = _size_of(calibration)
        _require_agreement(gather(settings, None, preset, environ={}), held)
        values |= held
    if calibration is not None and not isinstance(calibration, str):
        values.setdefault("calibration_sampling", "contiguous")
    gathered = gather(values, None, preset, environ={})
    check_combinations(gathered)
    return gathered


def _size_of(calibration: Any) -> dict[str, int]:
    """Number and length of samples that are given as token ids. Raises ConfigError for what is none."""
    try:
        num_samples, seqlen = len(calibration), len(calibration[0])
    except (TypeError, IndexError, KeyError) as error:
        raise ConfigError(
            "calibration must be the name of a data source, texts, or token ids (samples, tokens); "
            f"this is {_described(calibration)}"
        ) from error
    return {"num_samples": num_samples, "seqlen": seqlen}


def _require_agreement(asked: Gathered, held: dict[str, int]) -> None:
    """Raise ConfigError where the given settings ask for other samples than the token ids hold."""
    for name in (*held, "calibration_sampling", "calibration_skip"):
        value = getattr(asked.values, name)
        agreeing = {**held, "calibration_sampling": "contiguous", "calibration_skip": 0}[name]
        if asked.given(name) and value != agreeing:
            raise ConfigError(
                f"{name}={value!r}, but the token ids of the calibration are {held['num_samples']} samples of "
                f"{held['seqlen']} tokens, used as they are: leave {name} out, or give a data source or texts to "
                "sample from"
            )


def _described(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"a {type(value).__name__}" + (f" of shape {tuple(shape)}" if shape is not None else "")


def _planned(gathered: Gathered, decoder: Decoder, calibration: Any) -> PlannedPruning:
    from pipeline.runs.prepare import plan_pruning

    # Token ids are used as they are.
    return plan_pruning(gathered, decoder, draws_samples=isinstance(calibration, str) or _is_text(calibration))


def _is_text(calibration: Any) -> bool:
    return isinstance(calibration, Sequence) and len(calibration) > 0 and isinstance(calibration[0], str)


def _samples(
    calibration: Any,
    tokenizer: Any,
    planned: PlannedPruning,
    decoder: Decoder,
    drawing_of: Callable[[RunConfig], Drawing],
) -> Sequence[Tensor]:
    """The token ids of each sample, (T,). drawing_of: says which are drawn from text."""
    from stages.calibrate import draw_tokens
    from stages.data.tokenization import require_vocabulary
    from stages.pruners.registry import method_title, reads_data

    config = planned.config
    if not reads_data(config.method) and not config.distill:
        return ()
    if calibration is None or len(calibration) == 0:
        title = method_title(config.method)
        raise ConfigError(f"{title} needs calibration data: a data source, texts, or token ids (samples, tokens)")
    if not isinstance(calibration, str) and not _is_text(calibration):
        if config.distill_samples is not None:
            raise ConfigError(
                f"distill_samples={config.distill_samples}, but the token ids of the calibration are used as they are: "
                "leave it out, or give a data source or texts to sample from"
            )
        return _checked(calibration, decoder)
    from stages.data.in_memory import source_of

    source = source_of(calibration)
    if tokenizer is None:
        raise ConfigError("text needs a tokenizer: prune(model, ..., tokenizer=AutoTokenizer.from_pretrained(...))")
    if not callable(tokenizer) or not hasattr(tokenizer, "decode"):
        raise ConfigError(
            f"tokenizer= is {_described(tokenizer)}, no tokenizer of transformers: AutoTokenizer.from_pretrained(...)"
        )
    drawing = drawing_of(config)
    if config.bos == "auto":
        drawing = replace(drawing, bos=_chosen_bos(source, tokenizer, planned, decoder))
    tokens = draw_tokens(source, tokenizer, drawing)
    require_vocabulary(tokens, decoder.vocab_size, decoder.source.name)
    return list(tokens)


def _chosen_bos(source: TextSource, tokenizer: Any, planned: PlannedPruning, decoder: Decoder) -> Bos:
    """Where BOS stands in the samples, measured on the model itself."""
    from stages.choose_bos import choose_bos
    from stages.in_memory import ListScratch, NullCallbacks
    from stages.machine.torch_state import applied
    from stages.metrics.base import MetricContext

    protocol = replace(planned.config.evaluation_protocol, seqlen=planned.config.seqlen)
    context = MetricContext(decoder, decoder, source, protocol, ListScratch(), planned.device, NullCallbacks())
    with applied(planned.device):
        return choose_bos(context, tokenizer, "calibration").mode


def _checked(calibration: Any, decoder: Decoder) -> list[Tensor]:
    """Token ids that were given, one sample each."""
    import torch

    try:
        given = [torch.as_tensor(sample) for sample in calibration]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"calibration samples must be texts, or token ids: {error}") from error
    kinds = {sample.dtype for sample in given}
    if any(kind.is_floating_point or kind.is_complex or kind == torch.bool for kind in kinds):
        raise ConfigError(f"calibration samples must be token ids, integers; these are {', '.join(map(str, kinds))}")
    samples = [sample.long().cpu() for sample in given]
    if any(sample.ndim != 1 or len(sample) != len(samples[0]) for sample in samples):
        shapes = sorted({tuple(sample.shape) for sample in samples})
        raise ConfigError(f"calibration samples must be token ids (tokens,) of one length; these are {shapes}")
    stacked = torch.stack(samples)
    if int(stacked.min()) < 0 or int(stacked.max()) >= decoder.vocab_size:
        raise UsageError(
            f"calibration samples hold token ids from {int(stacked.min())} to {int(stacked.max())}; the model has "
            f"embeddings for 0 to {decoder.vocab_size - 1}: use the model's own tokenizer"
        )
    return samples


def _settings(planned: PlannedPruning) -> LampSettings:
    from pipeline.steps.stage_settings import pruner_of, training_settings
    from stages.lamp import LampSettings

    config = planned.config
    if not config.is_lamp:
        return LampSettings(pruner_of(config))
    compensation = training_settings(config, config.epochs, config.lr)
    refinement = training_settings(config, config.refine_epochs, config.refine_lr) if config.refine else None
    return LampSettings(pruner_of(config), compensation, refinement)


def _distilled(context: StageContext, blocks: Sequence[LampBlock], planned: PlannedPruning) -> DistilledBlocks:
    """All blocks trained together, in memory. context: the samples to distill on."""
    from pipeline.steps.stage_settings import distill_settings
    from stages.distill_in_memory import distill_in_memory

    num_generated = planned.config.distill_generated or 0
    return distill_in_memory(context, blocks, distill_settings(planned.config), num_generated)


def _budget(planned: PlannedPruning, context: StageContext) -> Budget:
    """The budget of each block, or how it follows from the data."""
    if planned.config.budget != "outliers":
        return planned.budget
    from pipeline.steps.stage_settings import outlier_settings
    from stages.allocate import allocate_by_outliers
    from stages.in_memory import ListScratch

    names = {layer.name for block in planned.budget for layer in block.layers}
    settings = outlier_settings(planned.config, context.model, names)
    return lambda hidden: allocate_by_outliers(context, hidden, settings, ListScratch()).blocks


def _kept(block: LampBlock, target: PreTrainedModel, decoder: Decoder) -> BlockReport:
    """Write a finished block into the model, and report it."""
    import torch

    entries, parts = target.state_dict(), decoder.stored_parts(block.index)
    with torch.no_grad():
        for name, tensor in block.finished.state.items():
            parts[name].of(entries[parts[name].key]).copy_(tensor)
    return BlockReport(block.index, block.finished.layers, block.compensation, block.refinement)
