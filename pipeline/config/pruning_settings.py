"""Identity settings: what is pruned, on which samples, by which method, and how blocks are trained."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pipeline.config import checks
from pipeline.config.option import After, Before, Limits, Option
from stages.pruners.registry import LAMP

Share = Annotated[float, Limits(gt=0, lt=1)]
Positive = Annotated[float, Limits(gt=0, le=1e6)]
# Text first: so the command line takes it, "1%" and all.
LearningRate = Annotated[str | float | None, Before(checks.learning_rate)]
SearchedRate = Annotated[str | float | None, Before(checks.searched_rate)]
Count = Annotated[int, Limits(ge=1, le=10**9)]
Tokens = Annotated[int, Limits(ge=2, le=10**9)]
Patterns = Annotated[tuple[str, ...], Before(checks.one_or_many), After(checks.valid_regexes)]
NofM = Annotated[str | None, Before(checks.quoted_pattern), After(checks.valid_pattern)]


# No `from __future__ import annotations` here and in `job_settings`: text would have to be evaluated at every start.
@dataclass(frozen=True, kw_only=True, init=False, repr=False, eq=False)  # `Settings` has these methods
class PruningSettings:
    """Settings that change the weights. None: the default, which may depend on the model and the sparsity."""

    model: Annotated[
        Annotated[str, Limits(min_length=1)],
        Option(
            "Alias (opt-125m, opt-1.3b, opt-2.7b, opt-6.7b, llama-2-7b, smollm2-135m, sam-vit-b, sam-vit-l, "
            "sam-vit-h), name on the Hugging Face hub, folder, GGUF file, or Segment Anything checkpoint (.pth).",
            "What to prune",
            "MODEL",
        ),
    ]
    sparsity: Annotated[
        Share | None, Option("Share of the prunable weights that become zero, 0 < S < 1.", "What to prune", "S")
    ] = None
    pattern: Annotated[
        NofM,
        Option("N of every M weights of a row become zero, e.g. 2:4. Excludes --sparsity.", "What to prune", "N:M"),
    ] = None
    bits: Annotated[
        Annotated[int, Limits(ge=2, le=8)] | None,
        Option(
            "Also quantize the remaining weights to 2^B values per row (2 to 8).",
            "What to prune",
            "B",
            "no quantization",
        ),
    ] = None
    group_size: Annotated[
        Count | None,
        Option("With --bits: one quantization grid for every N columns.", "What to prune", "N", "one per row"),
    ] = None
    alpha: Annotated[
        Annotated[float, Limits(gt=0, le=1)] | None,
        Option(
            "The last block loses A times its share of weights; the other blocks lose more instead (LAMP Eqs. 1-2).",
            "What to prune",
            "A",
            "1; LAMP: 0.7 above 55% sparsity, else 0.85; nearer to 1 for few blocks",
        ),
    ] = None
    beta: Annotated[
        Annotated[float, Limits(ge=0, le=1)] | None,
        Option(
            "q, k and v lose 1 - B times their share of weights; fc2 loses more instead (LAMP Eqs. 3-4).",
            "What to prune",
            "B",
            "0; LAMP on OPT: 0.7 (1 - sparsity)",
        ),
    ] = None
    budget: Annotated[
        Literal["uniform", "outliers"] | None,
        Option(
            "uniform, or outliers: a pass of the original model finds the blocks with more outlier weights, which then "
            "lose less (OWL).",
            "What to prune",
            "HOW",
            "uniform",
        ),
    ] = None
    budget_spread: Annotated[
        Share | None,
        Option("With --budget outliers: sparsities of blocks differ by up to 2 L.", "What to prune", "L", "0.05"),
    ] = None
    ignore: Annotated[
        Patterns,
        Option("Do not prune layers whose name matches. May be repeated.", "What to prune", "REGEX", form="repeated"),
    ] = ()
    prune_all: Annotated[
        bool | None,
        Option(
            "Also prune the small projections that steer a whole block (x_proj and dt_proj of Mamba, gates of linear "
            "attention, per-layer inputs of Gemma 3n and 4), which otherwise stay dense and do not count.",
            "What to prune",
            default="no",
        ),
    ] = None
    layer_sparsity: Annotated[
        Annotated[dict[str, float], After(checks.valid_overrides)],
        Option(
            "Sparsity of single layers, by a regular expression on their names. --sparsity applies to the others.",
            "What to prune",
            form="file only",
        ),
    ] = field(default_factory=dict)
    revision: Annotated[str | None, Option("Branch, tag or commit on the hub.", "What to prune", "REV")] = None
    trust_remote_code: Annotated[
        bool,
        Option(
            "Run the Python code that comes with MODEL. It can do anything on this machine.",
            "What to prune",
            default="no",
        ),
    ] = False
    export_dtype: Annotated[
        Literal["original", "float32", "bfloat16", "float16"],
        Option(
            "Dtype of the exported model: original, float32, bfloat16, float16.", "What to prune", "DTYPE", "original"
        ),
    ] = "original"

    calibration: Annotated[
        str | None,
        Option(
            "Data source of the calibration set: {data_sources}.",
            "Calibration",
            "SRC",
            "c4; none for images",
            applies_to="methods with data",
            draws_samples=True,
        ),
    ] = None
    num_samples: Annotated[
        Count | None,
        Option(
            "Number of calibration samples.",
            "Calibration",
            "N",
            "128",
            applies_to="methods with data",
            draws_samples=True,
        ),
    ] = None
    seqlen: Annotated[
        Tokens | None,
        Option("Tokens per sample.", "Calibration", "T", "2048, at most the model's limit", draws_samples=True),
    ] = None
    calibration_sampling: Annotated[
        Literal["contiguous", "random"] | None,
        Option(
            "How samples are taken from the data source: contiguous or random.",
            "Calibration",
            "HOW",
            "random for c4 and images, else contiguous",
            applies_to="methods with data",
            draws_samples=True,
        ),
    ] = None
    calibration_skip: Annotated[
        Annotated[int, Limits(ge=0, le=10**9)],
        Option("Skip the first N samples.", "Calibration", "N", "0", draws_samples=True),
    ] = 0
    bos: Annotated[
        Literal["auto", "stream", "window", "none"] | None,
        Option(
            "Where BOS stands in samples and evaluation windows: stream (at the head of the whole text, as published "
            "for OPT and Llama-2), window (at the head of each), none, or auto: window where that clearly lowers the "
            "original model's perplexity, else stream.",
            "Calibration",
            "WHERE",
            "auto; preset paper: stream",
            draws_samples=True,
        ),
    ] = None
    chat_template: Annotated[
        Literal["auto", "none"],
        Option(
            "How conversations (columns messages, conversations) become text: auto, by the tokenizer's chat "
            "template; none, the contents of the messages alone.",
            "Calibration",
            "HOW",
            "auto",
            draws_samples=True,
        ),
    ] = "auto"
    moe_calibrate_all_experts: Annotated[
        bool | None,
        Option(
            "Mixtures of experts: collect the statistics of every expert on all tokens, not only on those that the "
            "router sends it.",
            "Calibration",
            default="no",
            applies_to="methods with data",
        ),
    ] = None
    seed: Annotated[
        Annotated[int, Limits(ge=0, lt=2**63)], Option("Random seed.", "Calibration", "N", "0", draws_samples=True)
    ] = 0

    method: Annotated[
        Annotated[str, After(checks.known_method)],
        Option("lamp, or a pruner without training: {methods}.", "Method", "METHOD", LAMP),
    ] = LAMP
    pruner: Annotated[
        Annotated[str | None, After(checks.known_pruner)],
        Option(
            "LAMP only: the pruner of its blocks, {lamp_pruners}.",
            "Method",
            "NAME",
            "alps; sparsegpt with --bits",
            applies_to="lamp",
        ),
    ] = None
    damping: Annotated[
        Positive,
        Option(
            "Value added to the Hessian's diagonal, as a share of the diagonal's mean.",
            "Method",
            default="0.01",
            form="file only",
        ),
    ] = 0.01
    column_block: Annotated[
        Count,
        Option(
            "SparseGPT: number of columns whose pruning mask is selected together.",
            "Method",
            default="128",
            form="file only",
        ),
    ] = 128

    effort: Annotated[
        Literal["low", "medium", "high"] | None,
        Option(
            "LAMP and distillation: how many steps to train: low, medium or high. The README has the results.",
            "Training",
            "HOW",
            "medium",
            applies_to="lamp",
        ),
    ] = None
    epochs: Annotated[
        Annotated[int, Limits(ge=0, le=10**6)] | None,
        Option(
            "LAMP only: epochs of compensation per block.", "Training", "N", "by effort and samples", applies_to="lamp"
        ),
    ] = None
    lr: Annotated[
        LearningRate,
        Option(
            "Learning rate of Adam, such as 1e-3, or such as 1%: of the root mean square of each tensor's values.",
            "Training",
            "RATE",
            "1% above 45% sparsity",
            applies_to="lamp",
        ),
    ] = None
    lr_decay: Annotated[
        Annotated[float, Limits(gt=0, le=1)] | None,
        Option("Factor of the learning rate after each epoch.", "Training", "F", "0.87", applies_to="lamp"),
    ] = None
    loss: Annotated[
        Literal["mse", "token"] | None,
        Option(
            "LAMP only: mse (as in the paper) or token: each token's error relative to its target.",
            "Training",
            "HOW",
            "token; preset paper: mse",
            applies_to="lamp",
        ),
    ] = None
    held_out: Annotated[
        bool | None,
        Option(
            "LAMP and distillation: judge each epoch on 1 held-out sample in 16; undo an epoch that did not help and "
            "continue at a lower learning rate.",
            "Training",
            default="on; preset paper: off",
            applies_to="lamp",
            aliases=("hold_aside",),
        ),
    ] = None
    refine: Annotated[
        bool | None,
        Option(
            "LAMP only: train the remaining weights of a pruned block before the next block is compensated.",
            "Training",
            default="on; preset paper: off",
            applies_to="lamp",
        ),
    ] = None
    refine_epochs: Annotated[
        Count | None,
        Option("Epochs of refinement per block.", "Training", "N", "by effort and samples", applies_to="lamp"),
    ] = None
    refine_lr: Annotated[
        LearningRate, Option("Learning rate of refinement.", "Training", "RATE", "as --lr", applies_to="lamp")
    ] = None

    distill: Annotated[
        bool | None,
        Option(
            "At the end, train the remaining weights of all blocks together towards the original model's output "
            "(language models: the KL divergence of the next-token distribution), with the pruning masks fixed.",
            "Training",
            default="on for LAMP, but for preset paper",
        ),
    ] = None
    distill_epochs: Annotated[
        Count | None, Option("Epochs of distillation.", "Training", "N", "by effort and samples")
    ] = None
    distill_lr: Annotated[
        SearchedRate,
        Option(
            "Highest learning rate of distillation; it rises, then falls to zero. auto: searched for on held-out "
            "samples at the first update.",
            "Training",
            "RATE",
            checks.SEARCHED,
        ),
    ] = None
    distill_batch: Annotated[
        Count | None,
        Option("Samples of one update of distillation, about.", "Training", "N", "a sixteenth of the set, 16 at most"),
    ] = None
    distill_samples: Annotated[
        Count | None,
        Option(
            "Distill on a set of N samples of its own, from the same data source; it may be larger than the "
            "calibration set.",
            "Training",
            "N",
            "the calibration set; at --effort high 480 samples",
        ),
    ] = None
    distill_generated: Annotated[
        Annotated[int, Limits(ge=0, le=10**9)] | None,
        Option(
            "Distill on N samples more that the original model writes itself, from the beginnings of the others.",
            "Training",
            "N",
            "as many as the others for LAMP on a language model; none at --effort low, and where the model is large",
        ),
    ] = None
    from_run: Annotated[
        str | None,
        Option(
            "With --distill: take over the pruned blocks of RUN, which has the same settings but for distillation.",
            "Training",
            "RUN",
            "every block is pruned here",
        ),
    ] = None
