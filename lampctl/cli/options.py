"""The flags that set up a run, declared once for `run` and `init`.

Every default is None: only then can a flag that was given be told from one that was not.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer


def _declared(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Alias (opt-125m, opt-1.3b, opt-2.7b, opt-6.7b, llama-2-7b, smollm2-135m, sam-vit-b, sam-vit-l, "
            "sam-vit-h), name on the Hugging Face hub, folder, GGUF file, or Segment Anything checkpoint (.pth).",
        ),
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(metavar="S", help="Share of the prunable weights that become zero, 0 < S < 1.")
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(metavar="N:M", help="N of every M weights of a row become zero, e.g. 2:4; instead of --sparsity."),
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option(
            metavar="B",
            help="Quantize the weights that are kept to 2^B values per row, in the same sweep (2 to 8). "
            "[default: not at all]",
        ),
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(metavar="N", help="With --bits: a grid for every N columns. [default: one a row]")
    ] = None,
    method: Annotated[
        str | None, typer.Option(metavar="METHOD", help="lamp, sparsegpt, alps, wanda or magnitude. [default: lamp]")
    ] = None,
    pruner: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="LAMP only: prune with sparsegpt, as the paper, or alps. [default: alps; sparsegpt with --effort "
            "low or --bits]",
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(metavar="REV", help="Branch, tag or commit on the hub.")] = None,
    trust_remote_code: Annotated[
        bool | None,
        typer.Option(
            "--trust-remote-code/--no-trust-remote-code",
            help="Run the Python code that MODEL comes with. [default: no: it could do anything]",
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            metavar="A",
            help="The last block loses A times its share, the others make up for it. [default: 1; LAMP: 0.7 "
            "above 55%, else 0.85, nearer to 1 for few blocks]",
        ),
    ] = None,
    beta: Annotated[
        float | None,
        typer.Option(
            metavar="B",
            help="q, k and v lose 1 - B times their share, fc2 makes up for it. [default: 0; LAMP on OPT: 0.7 times "
            "what is kept]",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="HOW",
            help="uniform, or outliers: a first pass of the original model finds the blocks with more outlying "
            "weights, which then lose less (OWL). [default: uniform]",
        ),
    ] = None,
    budget_spread: Annotated[
        float | None,
        typer.Option(metavar="L", help="With --budget outliers: sparsities differ by up to 2 L. [default: 0.05]"),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(metavar="REGEX", help="Leave the layers whose name matches dense. May be repeated."),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="SRC",
            help="c4, wikitext2, ptb (from the hub, or a local copy as in c4:PATH), pydocs or text:PATH; of Segment "
            "Anything sa1b:DIR, coco:DIR or images:DIR. [default: c4; images must be named]",
        ),
    ] = None,
    num_samples: Annotated[int | None, typer.Option(metavar="N", help="Calibration samples. [default: 128]")] = None,
    seqlen: Annotated[
        int | None, typer.Option(metavar="T", help="Tokens per sample. [default: 2048, or what the model can]")
    ] = None,
    calibration_sampling: Annotated[
        str | None,
        typer.Option(metavar="HOW", help="contiguous or random. [default: random for c4 and images, else contiguous]"),
    ] = None,
    calibration_skip: Annotated[
        int | None, typer.Option(metavar="N", help="Leave out the first N samples. [default: 0]")
    ] = None,
    effort: Annotated[
        str | None,
        typer.Option(
            metavar="HOW",
            help="LAMP only: how long to train, low, medium or high; the README has the figures. [default: medium]",
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(metavar="N", help="LAMP only: epochs of compensation per block. [default: by effort]")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(metavar="RATE", help="Adam's learning rate. [default: by sparsity]")
    ] = None,
    lr_decay: Annotated[
        float | None,
        typer.Option(metavar="F", help="The rate is multiplied by F after each epoch. [default: 0.87]"),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            metavar="HOW",
            help="LAMP only: mse, as the paper, or token: each token's error relative to its target. "
            "[default: token; preset paper: mse]",
        ),
    ] = None,
    refine: Annotated[
        bool | None,
        typer.Option(
            "--refine/--no-refine",
            help="LAMP only: train each pruned block's kept weights before the next block compensates. "
            "[default: on; preset paper: off]",
        ),
    ] = None,
    refine_epochs: Annotated[
        int | None, typer.Option(metavar="N", help="Epochs of refinement per block. [default: by effort]")
    ] = None,
    refine_lr: Annotated[
        float | None, typer.Option(metavar="RATE", help="Learning rate of refinement. [default: by sparsity]")
    ] = None,
    hold_aside: Annotated[
        bool | None,
        typer.Option(
            "--hold-aside/--no-hold-aside",
            help="Judge each epoch on 1 held-out sample in 16; undo an epoch that did not help and continue at a lower "
            "learning rate. [default: on; preset paper: off]",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Random seed. [default: 0]")] = None,
    device: Annotated[
        str | None, typer.Option(metavar="DEV", help="auto, cpu, cuda or cuda:N. [default: auto]")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="Arithmetic of forward and backward passes: auto, float32, bfloat16, float16. "
            "[default: auto: bfloat16 on GPUs that have it]",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", help="Threads of the processor. [default: OMP_NUM_THREADS, else what is fastest]"),
    ] = None,
    micro_batch: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Samples that share a forward pass where nothing is trained. [default: what fills the device]",
        ),
    ] = None,
    compile_: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="LAMP only: training steps by torch.compile, which needs a C++ compiler. [default: no; gains are in "
            "docs/performance.md]",
        ),
    ] = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Take no more memory than this (8GB, 7.5GiB; of the GPU if there is one): smaller micro-batches, best "
            "weights on the disk; refused if it cannot be done. [default: none]",
        ),
    ] = None,
    export_dtype: Annotated[
        str | None,
        typer.Option(metavar="DTYPE", help="Of the result: original, float32, bfloat16, float16. [default: original]"),
    ] = None,
    evaluate: Annotated[
        str | None,
        typer.Option(
            metavar="SRC,...",
            help="Measure on these sources, perplexity or (coco:DIR, sa1b:DIR) single-point IoU; '' for none. "
            "[default: wikitext2; no images]",
        ),
    ] = None,
    evaluate_dense: Annotated[
        bool | None,
        typer.Option("--evaluate-dense/--no-evaluate-dense", help="Measure the original model too. [default: on]"),
    ] = None,
    eval_seqlen: Annotated[
        int | None, typer.Option(metavar="T", help="Tokens per evaluation window. [default: --seqlen]")
    ] = None,
    eval_max_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Stop after N tokens: a quick look, marked as partial.")
    ] = None,
    eval_points: Annotated[
        str | None,
        typer.Option(
            metavar="WHERE",
            help="Segment Anything: the point in each mask: annotation (SA-1B's own), interior (farthest from the "
            "edge), random, box-center, or auto: annotation where there is one, else interior. [default: auto]",
        ),
    ] = None,
    eval_max_images: Annotated[
        int | None, typer.Option(metavar="N", help="Stop after N images: a quick look, marked as partial.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="TASK,...",
            help="Zero-shot accuracy on these tasks of lm-evaluation-harness (extra `eval`); zero-shot: the usual "
            "seven. [default: none; with --task-data or --task-limit: zero-shot]",
        ),
    ] = None,
    task_data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The tasks' rows lie here (docs/evaluation.md). [default: the hub]"),
    ] = None,
    task_limit: Annotated[
        int | None,
        typer.Option(metavar="N", help="Only the first N rows of each task: a quick look, marked as partial."),
    ] = None,
    keep_activations: Annotated[
        bool | None,
        typer.Option(
            "--keep-activations/--release-activations",
            help="Keep every block's activations, for study: much disk. [default: delete what nobody reads again]",
        ),
    ] = None,
    checkpoint_minutes: Annotated[
        float | None,
        typer.Option(
            metavar="M",
            help="How often a long step keeps how far it is, for a crash; when it is stopped it does so anyway. "
            "0: only then. [default: 10]",
        ),
    ] = None,
    scratch_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep activations on this disk, which may be lost at any time: they are made again. "
            "[default: with the run]",
        ),
    ] = None,
    max_runtime: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Stop after so long (3h30m, 45m), with exit code 75: for schedulers with a wall. [default: never]",
        ),
    ] = None,
    watch_preemption: Annotated[
        str | None,
        typer.Option(
            metavar="CLOUD", help="aws or gcp: stop when the cloud announces that it takes the machine. [default: none]"
        ),
    ] = None,
    preemption_url: Annotated[
        str | None, typer.Option(metavar="URL", help="Where to ask for that. [default: the cloud's own address]")
    ] = None,
    allow_environment_change: Annotated[
        bool | None,
        typer.Option(
            "--allow-environment-change/--refuse-environment-change",
            help="Go on, too, on another device or with other library versions than the run began with. "
            "[default: refuse]",
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Settings as YAML or TOML. Flags win over it.")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="quick: pydocs, 32 x 256 tokens, low effort, nothing from the hub; paper: as published.",
        ),
    ] = None,
) -> None:
    """Only its signature is used."""


class Chosen:
    """What was given on the command line to set up a run."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.config_file: Path | None = values.pop("config")
        self.preset: str | None = values.pop("preset")
        given = {name.rstrip("_"): value for name, value in values.items() if value not in (None, [])}
        self.flags = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}

    def gather(self) -> Any:
        """The settings (`pipeline.config.run_config.Gathered`). Raises ConfigError."""
        from pipeline.config.settings import gather

        return gather(self.flags, self.config_file, self.preset)


def with_settings(command: Callable[..., None] | None = None, *, without: Collection[str] = ()) -> Callable[..., Any]:
    """Give a command, whose first parameter is a `Chosen`, all the flags that set up a run, but for those named."""
    if command is None:
        return functools.partial(with_settings, without=without)
    declared = {name: p for name, p in inspect.signature(_declared).parameters.items() if name not in without}
    own = list(inspect.signature(command).parameters.values())[1:]

    @functools.wraps(command)
    def wrapper(**arguments: Any) -> None:
        settings = {name: arguments.pop(name) for name in declared}
        command(Chosen(settings), **arguments)

    hints = {**get_type_hints(_declared, include_extras=True), **get_type_hints(command, include_extras=True)}
    parameters = [
        p.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[p.name]) for p in (*declared.values(), *own)
    ]
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: hints[p.name] for p in parameters}
    del wrapper.__wrapped__
    return wrapper
