"""Settings of evaluation, machine, stopping and storage. Most are runtime settings."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pipeline.config import checks
from pipeline.config.option import After, Before, Limits, Option
from pipeline.config.pruning_settings import Count, Tokens
from stages.metrics.points import Points

Names = Annotated[tuple[str, ...] | None, Before(checks.split_commas)]
Tasks = Annotated[tuple[str, ...] | None, Before(checks.split_commas), After(checks.expand_tasks)]
MetricNames = Annotated[tuple[str, ...], Before(checks.split_commas), After(checks.known_metrics)]
Folder = Annotated[str | None, Before(checks.absolute_folder)]


@dataclass(frozen=True, kw_only=True, init=False, repr=False, eq=False)  # `Settings` has these methods
class JobSettings:
    """Settings of the job: what is measured, on which machine, when it stops. None: the default.

    Most may change at a resume. Those of the machine that change bits (scope identity) may not.
    """

    evaluate: Annotated[
        Names,
        Option(
            "Measure on these data sources: perplexity, or (coco:DIR, sa1b:DIR) single-point IoU{more_sources}; '' for "
            "none.",
            "Evaluation",
            "SRC,...",
            "wikitext2; no images",
            scope="runtime",
            form="list",
        ),
    ] = None
    metrics: Annotated[
        MetricNames,
        Option(
            "More metrics on the same data sources, beside perplexity or IoU: those of installed "
            "packages{more_metrics}.",
            "Evaluation",
            "NAME,...",
            "none",
            scope="runtime",
            form="list",
        ),
    ] = ()
    evaluate_dense: Annotated[
        bool, Option("Measure the original model too.", "Evaluation", default="on", scope="runtime")
    ] = True
    eval_seqlen: Annotated[
        Tokens | None, Option("Tokens per evaluation window.", "Evaluation", "T", "--seqlen", scope="runtime")
    ] = None
    eval_max_tokens: Annotated[
        Tokens | None,
        Option("Stop after N tokens: a quick look, marked as partial.", "Evaluation", "N", scope="runtime"),
    ] = None
    eval_points: Annotated[
        Points | None,
        Option(
            "Segment Anything: the point in each segmentation mask: annotation (SA-1B's own), interior (farthest from "
            "the edge), random, box-center, or auto: annotation where there is one, else interior.",
            "Evaluation",
            "WHERE",
            "auto",
            scope="runtime",
        ),
    ] = None
    eval_max_images: Annotated[
        Count | None,
        Option("Stop after N images: a quick look, marked as partial.", "Evaluation", "N", scope="runtime"),
    ] = None
    tasks: Annotated[
        Tasks,
        Option(
            "Zero-shot accuracy on these tasks of lm-evaluation-harness (extra `eval`); zero-shot: the usual seven.",
            "Evaluation",
            "TASK,...",
            "none; with --task-data or --task-limit: zero-shot",
            scope="runtime",
            form="list",
        ),
    ] = None
    task_data: Annotated[
        Folder,
        Option(
            "Folder with the tasks' rows (docs/evaluation.md).",
            "Evaluation",
            "DIR",
            "the hub",
            scope="runtime",
            form="path",
        ),
    ] = None
    task_limit: Annotated[
        Count | None,
        Option(
            "Only the first N rows of each task: a quick look, marked as partial.", "Evaluation", "N", scope="runtime"
        ),
    ] = None

    end_loss: Annotated[
        bool | None,
        Option(
            "Measure how far the pruned model's output is from the original model's (language models: the KL "
            "divergence of the next-token distribution), on the calibration samples that training holds out.",
            "Evaluation",
            default="on",
            scope="runtime",
            applies_to="methods with data",
        ),
    ] = None

    device: Annotated[str, Option("auto, cpu, cuda or cuda:N.", "Machine", "DEV", "auto")] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Option(
            "Arithmetic of streams, Hessians and forward passes: auto, float32, bfloat16, float16.",
            "Machine",
            "DTYPE",
            "auto: float32",
        ),
    ] = "auto"
    train_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Option(
            "Arithmetic of training steps alone, while streams, Hessians and losses stay in --dtype: auto, float32, "
            "bfloat16, float16.",
            "Machine",
            "DTYPE",
            "auto: that of --dtype; bfloat16 with --dtype auto on GPUs that have it",
        ),
    ] = "auto"
    threads: Annotated[
        Annotated[int, Limits(ge=1, le=4096)] | None,
        Option("CPU threads.", "Machine", "N", "OMP_NUM_THREADS, else the fastest number"),
    ] = None
    micro_batch: Annotated[
        Count | None,
        Option(
            "Samples per forward pass outside training.",
            "Machine",
            "N",
            "as many as the device runs fastest",
        ),
    ] = None
    compile: Annotated[
        bool | None,
        Option(
            "LAMP only: compile training steps with torch.compile. Needs a C++ compiler.",
            "Machine",
            default="no; docs/performance.md has the gains",
        ),
    ] = None
    memory_limit: Annotated[
        Annotated[str | None, Before(checks.size_or_none)],
        Option(
            "Use at most this much memory (8GB, 7.5GiB; GPU memory on a GPU): smaller micro-batches, best weights on "
            "disk, several passes for the statistics of a block. lampctl refuses a run that still does not fit.",
            "Machine",
            "SIZE",
            "what is free here, in a container what it has left",
            scope="runtime",
        ),
    ] = None
    allow_environment_change: Annotated[
        bool,
        Option(
            "Resume on another device or with other library versions than the run began with.",
            "Machine",
            default="refuse",
            scope="runtime",
            off="--refuse-environment-change",
        ),
    ] = False

    checkpoint_minutes: Annotated[
        Annotated[float, Limits(ge=0, le=1e6)],
        Option(
            "Minutes between checkpoints inside a long step. 0 = checkpoint only on SIGTERM.",
            "Stopping",
            "M",
            "10",
            scope="runtime",
        ),
    ] = 10.0
    max_runtime: Annotated[
        Annotated[str | None, Before(checks.duration_or_none)],
        Option(
            "Stop after this time (3h30m, 45m; none: no limit) with exit code 75, for schedulers with a time limit. "
            "The time counts from the start of the command. At least one step or checkpoint is done first.",
            "Stopping",
            "TIME",
            "never",
            scope="runtime",
        ),
    ] = None
    watch_preemption: Annotated[
        Literal["none", "aws", "gcp"],
        Option(
            "aws or gcp: stop when the cloud announces that it will reclaim this machine. none: do not watch.",
            "Stopping",
            "CLOUD",
            "none",
            scope="runtime",
        ),
    ] = "none"
    preemption_url: Annotated[
        Annotated[str | None, After(checks.without_credentials)],
        Option("Address that --watch-preemption polls.", "Stopping", "URL", "the cloud's own address", scope="runtime"),
    ] = None

    keep_activations: Annotated[
        bool,
        Option(
            "Keep the activations of every block, to study them. Needs much disk space.",
            "Storage",
            default="delete them when no later step needs them",
            scope="runtime",
            off="--release-activations",
        ),
    ] = False
    scratch_dir: Annotated[
        Folder,
        Option(
            "Keep activations in this folder. Its disk may be lost at any time: lampctl recomputes them.",
            "Storage",
            "DIR",
            "with the run",
            scope="runtime",
            form="path",
        ),
    ] = None
