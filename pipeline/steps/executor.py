"""Steps as work: opens what a step reads, calls its stage, and puts what it gives into the attempt."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.config.quantities import parse_size
from pipeline.config.run_config import DRAWING_FIELDS, RunConfig
from pipeline.engine.plan import Evaluation, Step, ZeroShotEvaluation, is_stream
from pipeline.engine.runner import StepResult
from pipeline.errors import ConfigMismatch, DamagedData
from pipeline.rundir.run_directory import Attempt, RunDirectory
from pipeline.runs.prepare import drawing_of, fit_memory, fixed_sparsities, prunable_layers, task_data_of
from pipeline.runs.status import card_facts
from pipeline.steps.export_model import budget_of, in_pieces, write_model
from stages import export
from stages.allocate import budget_by_outliers, outlier_shares
from stages.capture import capture
from stages.compensate_block import compensate_block
from stages.errors import ResourceError
from stages.finish_block import FinishedBlock
from stages.formats.checkpoint_files import StateFile, serialized
from stages.formats.pruning_masks import mask_file, read_mask_file
from stages.interfaces import Callbacks, Samples, Scratch
from stages.machine.device import DeviceChoices, PeakMemory, release_memory
from stages.metrics.zero_shot import ZeroShot
from stages.models.base import BlockModel
from stages.models.resolve import resolve
from stages.prune_block import PruneSettings, prune_block
from stages.refine_block import refine_block
from stages.replay import replay
from stages.tasks.base import DataSource, Task
from stages.tasks.registry import open_model, parse_source, task_named
from stages.training.trainer import Training, TrainingSettings

# Of WikiText-2's test file, about; how long another text is, is known when it is evaluated.
_USUAL_EVALUATION_TOKENS = 350_000


class StageWorker:
    """Does the steps of one run with the real stages (`pipeline.engine.runner.Worker`)."""

    def __init__(
        self,
        run: RunDirectory,
        config: RunConfig,
        evaluations: Mapping[str, Evaluation | ZeroShotEvaluation],
        shared_with: RunDirectory | None = None,
    ) -> None:
        """evaluations: by step name. shared_with: a run whose first steps are taken over, where
        it has done them as this one would."""
        self.run, self.config, self.evaluations, self.shared_with = run, config, evaluations, shared_with
        self.choices = DeviceChoices(**run.environment["device"])
        gc.freeze()  # what is here now stays: only what steps leave is looked at when they end
        self._views_of: int | None = None
        self._spills = False
        self._loaded: tuple[str, ZeroShot] | None = None  # which model tasks are measured on

    @cached_property
    def model(self) -> BlockModel:
        """The original model, checked to be the very one that the run began with."""
        recorded = self.run.manifest.model
        if recorded["source"] in ("folder", "pickle", "gguf") and not Path(self.config.model).exists():
            raise ResourceError(
                f"{self.config.model}, the model that this run was begun with, is gone: put it back (a symbolic link "
                "will do)"
            )
        folder = resolve(self.config.model, recorded["revision"], trusts_code=self.config.trust_remote_code)
        found = {name: digest.sha256 for name, digest in folder.files.items()}
        expected = {name: digest["sha256"] for name, digest in recorded["files"].items()}
        if found != expected:
            changed = sorted(name for name in {**found, **expected} if found.get(name) != expected.get(name))
            raise ConfigMismatch(
                f"{self.config.model} is no longer the model that this run began with "
                f"(changed: {', '.join(changed)}); put the old files back or start a new run"
            )
        return open_model(folder)

    def execute(self, step: Step, attempt: Attempt, callbacks: Callbacks) -> StepResult:
        """Do one step."""
        peak = PeakMemory(self.choices.torch_device)
        work = {
            "calibrate": self._calibrate,
            "capture": self._capture,
            "allocate": self._allocate,
            "prune-block": self._prune,
            "compensate-block": self._compensate,
            "refine-block": self._refine,
            "export": self._export,
            "evaluate": self._evaluate,
            "zero-shot": self._zero_shot,
        }[step.kind]
        figures = work(step, attempt, callbacks)
        result = StepResult(figures, peak.process_bytes(), peak.device_bytes())
        self._tell_excess(result, callbacks)
        release_memory(self.choices.torch_device)
        return result

    def _tell_excess(self, result: StepResult, callbacks: Callbacks) -> None:
        """Warn of a step that took more than --memory-limit: what it would take was only estimated."""
        if self.config.memory_limit is None:
            return
        taken = result.peak_device_bytes or result.peak_memory_bytes or 0
        if taken > parse_size(self.config.memory_limit):
            callbacks.warn(f"this step took {taken / 1e9:.2f} GB, more than --memory-limit {self.config.memory_limit}")

    def fit_memory(self) -> None:
        """Keep what is left of the run within --memory-limit. Raises ResourceError where nothing will do.

        How many samples share a forward pass was settled when the run began: it decides last bits.
        """
        at_once = [max(self.choices.batch_tokens // self.config.seqlen, 1)]
        self._spills = fit_memory(self.model, self.config, self.choices, at_once).spills

    def size_of(self, payload: str) -> int:
        """About how many bytes a payload takes on the disk, by its name."""
        kind, _, number = payload.partition("/")
        tokens = (self.config.num_samples or 0) * self.config.seqlen
        if kind == "calibration":
            return tokens * self.model.input_bytes_per_token
        if kind in ("biased", "dense"):
            return tokens * self.model.hidden_size * self.choices.torch_dtype.itemsize
        if kind == "model":  # the blocks are links
            return sum(tensor.nbytes for _, tensor in self.model.outside_state())
        sizes = self.model.entry_sizes(int(number))
        if kind == "masks":
            return sum(sizes.values()) // 8
        if kind == "pruned":
            dtypes = export.block_dtypes(self.model, int(number), self.config.export_dtype)
            return sum(size * dtypes[name].itemsize for name, size in sizes.items())
        return 4 * sum(sizes.values())  # compensated, unrefined: fp32

    def scratch_of(self, step: Step) -> int:
        """About how many bytes a step's own intermediate streams take on the disk."""
        stream = self.size_of("biased/0") if self.config.num_samples else 0
        if step.kind == "evaluate":
            what = self.evaluations[step.name]
            assert isinstance(what, Evaluation)
            tokens = what.protocol.max_tokens or _USUAL_EVALUATION_TOKENS
            return tokens * self.model.hidden_size * self.choices.torch_dtype.itemsize
        targets_only = step.kind == "compensate-block" and len(step.writes) == 1
        return stream if step.kind == "allocate" or targets_only else 0

    def replay(self, name: str, attempt: Attempt, callbacks: Callbacks) -> None:
        """Write the activation stream `name` once more, from the calibration set and finished blocks alone."""
        kind, _, number = name.partition("/")

        def pruned(block: int) -> Mapping[str, Tensor]:
            return export.block_state(self.model, block, self.run.open_file(f"pruned/{block}"))

        replay(
            self.model,
            self.run.open_stream("calibration"),
            self._activations(attempt, name),
            int(number),
            pruned if kind == "biased" else lambda block: None,
            attempt.scratch(),
            self.choices,
            callbacks,
        )

    def _calibrate(self, step: Step, attempt: Attempt, callbacks: Callbacks) -> dict[str, Any]:
        taken = self._take_over(step, attempt)
        if taken is not None:
            return taken
        config = self.config
        assert config.calibration is not None
        source = parse_source(config.calibration)
        if source.digest() != self.run.manifest.identity["data"][config.calibration]:
            raise ConfigMismatch(
                f"{config.calibration} has changed since this run began: put the old data back, or start a new run"
            )
        drawn = self._task.draw(self.model, source, drawing_of(config))
        samples, first = drawn.samples, drawn.samples[0]
        stream = attempt.stream("calibration", len(samples), tuple(first.shape), first.dtype, is_precious=True)
        for index in range(len(samples)):
            callbacks.check_stop()
            stream.write(index, samples[index])
            callbacks.report(index + 1, len(samples), "samples")
        return {"source": config.calibration, **drawn.figures}

    @property
    def _task(self) -> Task:
        """What this kind of model is calibrated on and measured by."""
        return task_named(self.model.task)

    def _activations(self, attempt: Attempt, name: str) -> Any:
        inputs = self.run.open_stream("calibration")
        return attempt.stream(name, len(inputs), self._hidden_shape(inputs), self.choices.torch_dtype)

    def _hidden_shape(self, inputs: Samples) -> tuple[int, ...]:
        """Of a sample's activations."""
        return self.model.hidden_shape(tuple(inputs[0].shape))

    def _take_over(self, step: Step, attempt: Attempt) -> dict[str, Any] | None:
        """The figures of a step that another run has done just so, its payloads taken over; None if none has."""
        other = self.shared_with
        commit = other.commit_for(step.name) if other is not None else None
        if other is None or commit is None or not set(step.writes) <= commit.payloads.keys():
            return None
        ours = self.run.manifest
        same_data = all(other.manifest.config[field] == ours.config[field] for field in DRAWING_FIELDS)
        if not same_data or other.manifest.identity["model"] != ours.identity["model"]:
            return None
        if step.kind != "calibrate" and other.environment != self.run.environment:
            return None
        if not all(other.storage.exists(commit.payloads[name].root) for name in step.writes):
            return None
        try:
            for name in step.writes:
                attempt.adopt(name, other, commit.payloads[name], is_bulky=is_stream(name))
        except DamagedData as error:
            raise DamagedData(f"{error}. `lampctl resume {other.label} --check-all` makes it again") from error
        return {**commit.figures, "shared_with": other.manifest.digest}

    def _capture(self, step: Step, attempt: Attempt, callbacks: Callbacks) -> dict[str, Any]:
        taken = self._take_over(step, attempt)
        if taken is not None:
            return taken
        dense = self._activations(attempt, "dense/1") if "dense/1" in step.writes else None
        biased = self._activations(attempt, "biased/0")
        capture(self.model, self.run.open_stream("calibration"), biased, dense, self.choices, callbacks)
        return {}

    def _allocate(self, step: Step, attempt: Attempt, callbacks: Callbacks) -> dict[str, Any]:
        config = self.config
        assert config.budget_spread is not None
        assert config.alpha is not None
        assert config.beta is not None
        names = {layer["name"] for block in self.run.manifest.budget for layer in block["layers"]}
        shares = outlier_shares(
            self.model,
            self.run.open_stream("calibration"),
            self.run.open_stream("biased/0"),
            names,
            attempt.scratch(),
            self.choices,
            callbacks,
        )
        blocks = prunable_layers(self.model, config.ignore)
        fixed = fixed_sparsities(blocks, config.layer_sparsity)
        budget, spread = budget_by_outliers(
            blocks, shares, config.budget_spread, config.target_sparsity, config.alpha, config.beta, fixed
        )
        if spread != config.budget_spread:
            callbacks.warn(f"the spread of the budget is {spread:g}: no layer can be pruned above 100% or below 0%")
        return {"outlier_shares": shares, "spread": spread, "budget": [asdict(block) for block in budget]}

    def _prune(self, step: Step, attempt: Attempt, callbacks: Callbacks) -> dict[str, Any]:
        block, config = step.block, self.config
        assert block is not None
        state = None
        if f"compensated/{block}" in step.reads:
            state = StateFile(self.run.open_file(f"compensated/{block}"))
        uses_data = f"biased/{block}" in step.reads
        is_finished = f"pruned/{block}" in step.writes
        result = prune_block(
            self.model,
            block,
            budget_of(self.run.budget[block]),
            PruneSettings(
                config.pruner or ("sparsegpt" if config.method == "lamp" else config.method),
                config.damping,
                config.column_block,
                config.n_of_m,
                config.bits,
                config.group_size,
            ),
            self.choices,
            callbacks,
            state=state,
            export_dtypes=export.block_dtypes(self.model, block, config.export_dtype) if is_finished else None,
            inputs=self.run.open_stream("calibration") if uses_data else None,
            biased=self.run.open_stream(f"biased/{block}") if uses_data else None,
            biased_out=self._biased_out(step, attempt),
        )
        contents = mask_file(export.pruned_weights(self.model, block, result.outcome))
        attempt.write_file(f"masks/{block}", f"block-{block:05d}.safetensors", contents)
        figures: dict[str, Any] = {
            "layers": {
                name: {"relative_error": layer.relative_error, "damping": layer.damping}
                for name, layer in result.outcome.layers.items()
            }
        }
        if result.state is not None:
            _write_state(attempt, f"unrefined/{block}", result.state)
            return figures
        assert result.finished is not None
        return {**figures, **self._finish(attempt, block, result.finished)}

    def _biased_out(self, step: Step, attempt: Attempt) -> Any:
        """The stream that the step's block puts out, if the step writes it."""
        assert step.block is not None
        name = f"biased/{step.block + 1}"
        return self._activations(attempt, name) if name in step.writes else None

    def _finish(self, attempt: Attempt, block: int, finished: FinishedBlock) -> dict[str, Any]:
        """Write a block as it will be exported; gives the figures of its weights."""
        pieces = export.block_shard(self.model, block, finished.state)
        attempt.write_file(f"pruned/{block}", f"block-{block:05d}.safetensors", in_pieces(pieces))
        return {
            "num_masked": sum(layer.num_masked for layer in finished.layers),
            "num_other_zeros": sum(layer.num_other_zeros for layer in finished.layers),
            "weights": {
                layer.name: {
                    "num_masked": layer.num_masked,
                    "num_other_zeros": layer.num_other_zeros,
                    "num_levels": layer.num_levels,
                }
                for layer in finished.layers
            },
        }

    def _training(self, epochs: int | None, lr: float | None) -> TrainingSettings:
        config = self.config
        assert epochs is not None
        assert lr
        return TrainingSettings(
            epochs,
            lr,
            config.lr_decay or 1.0,
            bool(config.hold_aside),
            config.seed,
            config.loss or "mse",
        )

    def _spill(self, attempt: Attempt) -> Scratch | None:
        """Room on the disk for what would not fit into memory, if anything."""
        return attempt.scratch() if self._spills else None

    def _compensate(self, step: Step, attempt: Attempt, callbacks: Callbacks) -> dict[str, Any]:
        block, config = step.block, self.config
        assert block is not None
        biased = self.run.open_stream(f"biased/{block}")
        dense_name = f"dense/{block + 1}"
        dense_out: Any
        if dense_name in step.writes:
            dense_out = self._activations(attempt, dense_name)
        else:
            shape = self._hidden_shape(self.run.open_stream("calibration"))
            dense_out = attempt.scratch().stream("targets", len(biased), shape, self.choices.torch_dtype)
        result = compensate_block(
            self.model,
            block,
            self.run.open_stream("calibration"),
            biased,
            self.run.open_stream(f"dense/{block}"),
            dense_out,
            self._training(config.epochs, config.lr),
            self.choices,
            callbacks,
            self._spill(attempt),
        )
        _write_state(attempt, f"compensated/{block}", result.state)
        return _training_figures(result.training)

    def _refine(self, step: Step, attempt: Attempt, callbacks: Callbacks) -> dict[str, Any]:
        block, config = step.block, self.config
        assert block is not None
        result = refine_block(
            self.model,
            block,
            self.run.open_stream("calibration"),
            self.run.open_stream(f"biased/{block}"),
            self.run.open_stream(f"dense/{block + 1}"),
            StateFile(self.run.open_file(f"unrefined/{block}")),
            export.outcome_of(read_mask_file(self.run.open_file(f"masks/{block}")), config.n_of_m),
            self._training(config.refine_epochs, config.refine_lr),
            self.choices,
            callbacks,
            export_dtypes=export.block_dtypes(self.model, block, config.export_dtype),
            biased_out=self._biased_out(step, attempt),
            spill=self._spill(attempt),
        )
        return {**_training_figures(result.training), **self._finish(attempt, block, result.finished)}

    def _export(self, step: Step, attempt: Attempt, callbacks: Callbacks) -> dict[str, Any]:
        return write_model(self.run, self.model, self.config, attempt.folder("model"), callbacks)

    def _evaluate(self, step: Step, attempt: Attempt, callbacks: Callbacks) -> dict[str, Any]:
        what = self.evaluations[step.name]
        assert isinstance(what, Evaluation)
        model = self.model if what.which == "dense" else self._open_published()
        source = parse_source(what.source)
        self._require_same_data(source)
        figures = self._task.evaluate(
            model, self.model, source, what.protocol, attempt.scratch(), self.choices, callbacks
        )
        return {"which": what.which, "source": what.source, "source_digest": source.digest(), **figures}

    def _require_same_data(self, source: DataSource) -> None:
        """Raise ConfigMismatch if the source is not what the run began with, or was measured on before."""
        known = [
            commit.figures.get("source_digest")
            for commit in self.run.commits
            if commit.step.startswith("evaluate/") and commit.figures["source"] == source.name
        ]
        identity = self.run.manifest.identity["data"]
        known += [identity[source.name]] if source.name in identity else []
        if any(digest != source.digest() for digest in known):
            raise ConfigMismatch(
                f"{source.name} has changed since {self.run.label} began, or was evaluated on it: put the old data "
                "back, or give the new data another name, so that its figures stand beside the old ones"
            )

    def _zero_shot(self, step: Step, attempt: Attempt, callbacks: Callbacks) -> dict[str, Any]:
        what = self.evaluations[step.name]
        assert isinstance(what, ZeroShotEvaluation)
        data = task_data_of(self.config)
        if self._loaded is None or self._loaded[0] != what.which:
            self._loaded = None  # not two models at once
            folder = self.model.source
            if what.which == "pruned":
                folder = resolve(str(self._published_model()), trusts_code=self.config.trust_remote_code)
            self._loaded = (what.which, ZeroShot(folder, self.choices.device))
        result = self._loaded[1].measure(what.task, data, what.limit, callbacks)
        return {
            "which": what.which,
            **asdict(result),
            "is_partial": result.is_partial,
            "task_data": what.data,
            "task_data_digest": data.digest(what.task) if data is not None else None,
        }

    def _open_published(self) -> BlockModel:
        return open_model(resolve(str(self._published_model()), trusts_code=self.config.trust_remote_code))

    def _published_model(self) -> Path:
        """The exported folder, after making sure that it is still what was committed."""
        payload = self.run.payload("model")
        for file in payload.files:
            self.run.open_file("model", payload.inner(file))
        return self.run.publish("model")

    def refresh_views(self) -> None:
        """Publish the exported model and write its card, if there is something new to say."""
        exported = self.run.commit_for("export")
        if exported is None or self._views_of == len(self.run.commits):
            return
        self.run.publish("model")
        self.run.write_view("model/README.md", export.model_card(card_facts(self.run, self.config)))
        self._views_of = len(self.run.commits)


def _write_state(attempt: Attempt, name: str, state: Mapping[str, Tensor]) -> None:
    attempt.write_file(name, "block.safetensors", in_pieces(serialized(state)))


def _training_figures(training: Training) -> dict[str, Any]:
    return {
        "loss_before": training.before.trained,
        "loss_after": training.after.trained,
        "loss_before_aside": training.before.aside,
        "loss_after_aside": training.after.aside,
        "epoch_losses": [{"trained": e.trained, "aside": e.aside} for e in training.epoch_losses],
        "kept_epoch": training.kept_epoch,
        "num_steps": training.num_steps,
    }
