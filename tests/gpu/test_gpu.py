"""What must hold on a GPU. Without one, what can runs on a processor: `pytest -m gpu`."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf

from stages.compensate_block import compensate_block
from stages.in_memory import ListStream
from stages.machine.device import DeviceChoices, apply, choose, reproducible
from stages.models.decoder import open_model
from stages.models.resolve import resolve
from stages.sparsity.topk import smallest
from stages.training.rates import Rate
from stages.training.trainer import TrainingSettings
from tests.blocks import context_of
from tests.distillation import SETTINGS, Case, ids, require_same
from tests.killed_runs import BOMB_AT_CHECKPOINT, exported_weights

pytestmark = pytest.mark.gpu
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda:0" if HAS_GPU else "cpu"
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
TINY_OPT = Path(__file__).parents[2] / "examples" / "tiny-opt"
N, T, H = 4, 256, 256
# Heads of 64 numbers and windows of 256 tokens: the kernels of attention that real models get. A sliding window passes
# a mask to attention, which flash attention does not take.
_SIZES = {
    "vocab_size": 320,
    "hidden_size": H,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": T,
}
CONFIGS = {
    "llama": tf.LlamaConfig(**_SIZES, num_key_value_heads=2),
    "mistral": tf.MistralConfig(**_SIZES, num_key_value_heads=2, sliding_window=64),
    "opt": tf.OPTConfig(
        vocab_size=320,
        hidden_size=H,
        word_embed_proj_dim=H,
        ffn_dim=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=T,
        dropout=0.0,
    ),
}
PRECISIONS = [
    "float32",
    "bfloat16",
    pytest.param("float16", marks=needs_gpu),
]


def precision(train_dtype):
    return DeviceChoices(DEVICE, "float32", 1, "highest", "here", train_dtype=train_dtype)


@pytest.fixture(params=CONFIGS)
def model(request, tmp_path):
    torch.manual_seed(0)
    tf.AutoModelForCausalLM.from_config(CONFIGS[request.param]).save_pretrained(tmp_path / "m")
    return open_model(resolve(str(tmp_path / "m")))


@pytest.fixture(autouse=True)
def _as_in_a_run():
    apply(precision("float32"))


@pytest.mark.parametrize("train_dtype", PRECISIONS)
def test_a_block_is_trained_to_the_same_bits_again(model, train_dtype):
    inputs = ids(model, N, T)
    biased, dense = (ListStream(N, (T, H), torch.float32) for _ in range(2))
    for i in range(N):
        sample = torch.randn(T, H, generator=torch.Generator().manual_seed(i))
        dense.write(i, sample)
        biased.write(i, sample + 0.1 * torch.randn(T, H, generator=torch.Generator().manual_seed(100 + i)))
    settings = TrainingSettings(2, Rate(1e-3), 0.9, False, 0, "token")  # the last weights are kept
    context = context_of(model, inputs, precision(train_dtype))

    def trained():
        out = ListStream(N, (T, H), torch.float32)
        return compensate_block(context.block(0), biased, dense, out, settings)

    first, again = trained(), trained()
    assert first.training == again.training
    before = context.block(0).load().state_dict()
    assert any(not torch.equal(tensor.cpu(), before[name].cpu()) for name, tensor in first.state.items())
    for name, tensor in first.state.items():
        assert torch.equal(tensor, again.state[name]), name


@pytest.mark.parametrize("train_dtype", PRECISIONS)
def test_distillation_gives_the_same_bits_again_resident_and_streamed(model, train_dtype):
    case = Case(model, device=precision(train_dtype))
    resident = case.distilled(is_resident=True, settings=SETTINGS)
    require_same(case.distilled(is_resident=True, settings=SETTINGS), resident)
    require_same(case.distilled(is_resident=False, settings=SETTINGS), resident)


def test_the_smallest_scores_are_those_of_a_processor():
    scores = (1000 * torch.rand(1024, 1536, generator=torch.Generator().manual_seed(0))).round()
    for count in (1, 700_000, scores.numel()):
        assert torch.equal(smallest(scores.to(DEVICE), count).cpu(), smallest(scores, count))


FLAGS = (
    *("--sparsity", "0.7", "--calibration", "pydocs", "--num-samples", "8", "--seqlen", "128", "--evaluate", ""),
    *("--epochs", "1", "--refine-epochs", "1", "--distill-epochs", "1", "--device", DEVICE, "--run-dir", "run"),
    *("--threads", "1", "--micro-batch", "1"),  # they change last bits, and are chosen by time otherwise
)


def test_a_run_that_is_stopped_inside_steps_ends_with_the_same_weights(tmp_path):
    quiet, stopped = tmp_path / "quiet", tmp_path / "stopped"
    quiet.mkdir()
    stopped.mkdir()
    lampctl = (sys.executable, "-m", "lampctl")
    subprocess.run((*lampctl, "run", str(TINY_OPT), *FLAGS), cwd=quiet, check=True)
    command = ("run", str(TINY_OPT), *FLAGS)
    for kind in ("compensate-block", "refine-block", "distill"):
        bomb = (sys.executable, "-c", BOMB_AT_CHECKPOINT, kind, str(int(signal.SIGTERM)), "3")
        answer = subprocess.run((*bomb, *command), cwd=stopped, capture_output=True, text=True, check=False)
        assert answer.returncode == 75, answer.stderr
        command = ("resume", "run")
    subprocess.run((*lampctl, *command), cwd=stopped, check=True)
    assert exported_weights(stopped / "run") == exported_weights(quiet / "run")
    if HAS_GPU:
        answer = subprocess.run((*lampctl, "status", "run", "--json"), cwd=stopped, capture_output=True, check=True)
        assert json.loads(answer.stdout)["peak_device_bytes"] > 0


@needs_gpu
def test_training_is_in_bf16_where_the_gpu_has_it():
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    assert choose("cuda").torch_train_dtype == (torch.bfloat16 if has_bf16 else torch.float32)


@needs_gpu
def test_an_operation_without_a_deterministic_form_is_refused():
    from stages.errors import UsageError

    image = torch.rand(1, 1, 8, 8, device=DEVICE, requires_grad=True)
    with pytest.raises(UsageError, match="--device cpu"), reproducible(torch.device(DEVICE)):
        torch.nn.functional.interpolate(image, scale_factor=2, mode="bilinear").sum().backward()


@needs_gpu
def test_a_gpu_that_others_have_filled_is_refused_before_anything_is_computed(tmp_path):
    free, _ = torch.cuda.mem_get_info()
    taken = torch.empty(free - 400_000_000, dtype=torch.uint8, device=DEVICE)  # PyTorch's context takes the rest
    command = (sys.executable, "-m", "lampctl", "run", str(TINY_OPT), *FLAGS)
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    del taken
    assert answer.returncode == 5, answer.stderr
    assert "Traceback" not in answer.stderr
