"""The methods and the points of the quality benchmark, as flags of `lampctl run` and of the peers' script."""

from __future__ import annotations

DENSE, MAGNITUDE, WANDA, REFERENCE, ALPS = "dense", "magnitude", "Wanda", "SparseGPT", "ALPS"
PUBLISHED, OURS = "LAMP as published", "LAMP"
LOW, HIGH = "LAMP, effort low", "LAMP, effort high"
PLAIN = "LAMP, nothing generated"
# Retraining of the whole model on about as many tokens as LAMP trains on (120 samples of refinement and 248 of
# distillation): with a fixed mask towards the original model's output, and by ADMM on the next-token loss.
KD_MAGNITUDE, KD_REFERENCE = "magnitude, then distillation", "SparseGPT, then distillation"
ADMM = "global ADMM (after ELSA)"
# The same methods in another arithmetic: Hessians, solves and what is exported stay in fp32 in all of them.
REFERENCE_BF16, OURS_BF16 = "SparseGPT in bf16", "LAMP in bf16"
OURS_TRAINS_BF16, OURS_STREAMS_BF16 = "LAMP, training in bf16", "LAMP, all but training in bf16"

# What is asked of each method, as lampctl says it.
POINTS: dict[str, tuple[str, ...]] = {
    "50%": ("--sparsity", "0.5"),
    "60%": ("--sparsity", "0.6"),
    "70%": ("--sparsity", "0.7"),
    "80%": ("--sparsity", "0.8"),
    "90%": ("--sparsity", "0.9"),
    "2:4": ("--pattern", "2:4"),
    "4:8": ("--pattern", "4:8"),
    "2:4+int4": ("--pattern", "2:4", "--bits", "4"),
    "2:4+int3": ("--pattern", "2:4", "--bits", "3"),
}

# Learning rate and epochs of the paper's method. Not tuned on 128 x 256 tokens yet (docs/benchmark.md).
PUBLISHED_TRAINING = ("1e-3", "2")

# Ours on a distillation set of its own, by its number of samples; nothing is generated.
DISTILLED = {f"LAMP, distilled on {count}": count for count in (256, 480, 1024)}
# The curve by samples of the distillation set; without --distill-samples it is the calibration set.
CURVE = {PLAIN: 128, **DISTILLED}

_GENERATES_NOTHING = ("--distill-generated", "0")
_THREE_EPOCHS = ("--distill", "--distill-epochs", "3")
_METHODS: dict[str, tuple[str, ...]] = {
    MAGNITUDE: ("--method", "magnitude"),
    WANDA: ("--method", "wanda"),
    REFERENCE: ("--method", "sparsegpt"),
    ALPS: ("--method", "alps"),
    PUBLISHED: (
        *("--method", "lamp", "--pruner", "sparsegpt", "--loss", "mse"),
        *("--no-refine", "--no-held-out", "--no-distill"),
    ),
    KD_MAGNITUDE: ("--method", "magnitude", *_THREE_EPOCHS),
    KD_REFERENCE: ("--method", "sparsegpt", *_THREE_EPOCHS),
    LOW: ("--method", "lamp", "--effort", "low"),
    PLAIN: ("--method", "lamp", *_GENERATES_NOTHING),
    OURS: ("--method", "lamp"),
    HIGH: ("--method", "lamp", "--effort", "high"),
    REFERENCE_BF16: ("--method", "sparsegpt"),
    **dict.fromkeys((OURS_TRAINS_BF16, OURS_STREAMS_BF16, OURS_BF16), ("--method", "lamp")),
    **{
        name: ("--method", "lamp", "--distill-samples", str(count), *_GENERATES_NOTHING)
        for name, count in DISTILLED.items()
    },
}
_FP32 = ("--dtype", "float32")
_ARITHMETIC: dict[str, tuple[str, ...]] = {
    REFERENCE_BF16: ("--dtype", "bfloat16"),
    OURS_TRAINS_BF16: ("--dtype", "float32", "--train-dtype", "bfloat16"),
    OURS_STREAMS_BF16: ("--dtype", "bfloat16", "--train-dtype", "float32"),
    OURS_BF16: ("--dtype", "bfloat16"),
}

# Methods that are no run of lampctl's: the script of each (benchmarks/quality/SCRIPT.py) and its flags.
PEERS: dict[str, tuple[str, ...]] = {
    "llm-compressor Wanda": ("peer_prune", "--pruner", "wanda"),
    "llm-compressor SparseGPT": ("peer_prune", "--pruner", "sparsegpt"),
    ADMM: ("global_admm",),
}
IN_PEER_PYTHON = "peer_prune"  # the script that needs the peers' environment
LLM_COMPRESSOR = tuple(method for method, (script, *_) in PEERS.items() if script == IN_PEER_PYTHON)
# As these say a point: sparsity and, where there is a pattern, the mask.
PEER_POINTS: dict[str, tuple[str, ...]] = {
    **{point: flags for point, flags in POINTS.items() if point.endswith("%")},
    "2:4": ("--sparsity", "0.5", "--mask", "2:4"),
    "4:8": ("--sparsity", "0.5", "--mask", "4:8"),
}

# In tables.
ORDER = (
    *(DENSE, MAGNITUDE, WANDA, "llm-compressor Wanda", REFERENCE, "llm-compressor SparseGPT", ALPS, PUBLISHED),
    *(ADMM, KD_MAGNITUDE, KD_REFERENCE),
    *(LOW, PLAIN, OURS, *DISTILLED, HIGH),
    *(REFERENCE_BF16, OURS_TRAINS_BF16, OURS_STREAMS_BF16, OURS_BF16),
)

# (method, point): why there is none.
LEFT_OUT = {
    **{
        (WANDA, point): "it changes no weight that it keeps, and so cannot quantize"
        for point in POINTS
        if "int" in point
    },
    **{
        (method, point): "it would prune and quantize one after the other, on another quantization grid"
        for method in PEERS
        for point in POINTS
        if "int" in point
    },
}


def flags_of(method: str, point: str) -> tuple[str, ...]:
    """The flags of `lampctl run` that make this method at this point what it is."""
    training: tuple[str, ...] = ()
    if method == PUBLISHED:
        rate, epochs = PUBLISHED_TRAINING
        training = ("--lr", rate, "--epochs", epochs)
    return (*_METHODS[method], *training, *_ARITHMETIC.get(method, _FP32), *POINTS[point])
