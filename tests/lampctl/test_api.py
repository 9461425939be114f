"""The Python API: models in memory, runs on disk, and the documentation's own examples."""

import doctest
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lampctl
from pipeline.errors import ConfigError, RunNotFound
from stages import calibrate
from stages.errors import UsageError
from tests.bos_model import BOS, TEXT, bos_tokenizer, save_needing_bos
from tests.small_models import VOCAB, build, save, tokenizer

pytestmark = pytest.mark.long  # seconds of tokenizing, conversion or pruning

ROOT = Path(__file__).parents[2]
TOKENS = torch.randint(4, VOCAB, (6, 16), generator=torch.Generator().manual_seed(0))
QUICK = {"sparsity": 0.6, "pruner": "sparsegpt", "epochs": 1, "refine_epochs": 1, "threads": 1, "micro_batch": 1}


def states(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_importing_it_imports_nothing_heavy():
    code = (
        "import sys, lampctl; assert lampctl.__version__; assert 'prune' in dir(lampctl);"
        "assert not {'torch', 'transformers', 'typer', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    with pytest.raises(AttributeError, match="no attribute 'prone'"):
        _ = lampctl.prone


def test_the_examples_of_the_documentation_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.testfile(str(ROOT / "docs" / "api.md"), module_relative=False)
    assert tried > 15
    assert failed == 0


@pytest.mark.parametrize("family", ["opt", "gpt2", "llama-gqa"])
def test_pruning_in_memory_gives_the_bits_of_a_run(family, tmp_path, words):
    from transformers import AutoModelForCausalLM

    folder = save(tmp_path / "m", family)
    data = {**QUICK, "num_samples": 4, "seqlen": 16, "sparsity": 0.7}
    run = lampctl.run(folder, calibration=f"text:{words}", evaluate=(), run_dir=tmp_path / "r", **data)
    expected = AutoModelForCausalLM.from_pretrained(run.model_path).state_dict()
    model = build(family)
    before = states(model)
    pruned, report = lampctl.prune(model, f"text:{words}", tokenizer=tokenizer(), **data)
    assert report.end_loss.value == run.status.end_loss.value > 1e-3
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in pruned.state_dict().items())
    assert report.num_masked == run.status.num_masked
    assert report.num_prunable == run.status.num_prunable
    assert [len(block.layers) for block in report.blocks] == [len(block.layers) for block in run.budget]


def test_a_spread_that_does_not_fit_is_a_warning_and_a_message_to_the_callbacks():
    from stages.in_memory import NullCallbacks

    settings = {"sparsity": 0.9, "method": "sparsegpt", "budget": "outliers", "budget_spread": 0.4}
    with pytest.warns(UserWarning, match=r"the spread of the budget is 0\.\d+: no layer can be pruned above 100%"):
        lampctl.prune(build("llama"), TOKENS, **settings)
    told = NullCallbacks()
    lampctl.prune(build("llama"), TOKENS, callbacks=told, **settings)
    assert [message for message in told.warnings if "the spread of the budget is" in message]


def test_in_place_the_model_itself_changes_to_the_same_bits():
    model, other = build("llama"), build("llama")
    copied = lampctl.prune(other, TOKENS, **QUICK).model
    expected = lampctl.prune(model, TOKENS, **QUICK)[1].end_loss
    found, report = lampctl.prune(model, TOKENS, inplace=True, **QUICK)
    assert report.end_loss == expected
    assert found is model
    assert all(torch.equal(tensor, copied.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert report.sparsity == pytest.approx(0.6, abs=1e-4)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_precision_of_products_is_as_before(precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        lampctl.prune(build("llama"), TOKENS, sparsity=0.5, method="magnitude")
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_half_precision_stays_half_precision_and_dtype_and_mode_stay():
    model = build("llama").to(torch.bfloat16).train()
    pruned, _ = lampctl.prune(model, TOKENS, sparsity=0.5, method="wanda")
    assert {tensor.dtype for tensor in pruned.parameters()} == {torch.bfloat16}
    assert pruned.training


def test_a_budget_that_follows_the_data_and_quantization_in_memory():
    pruned, report = lampctl.prune(
        build("llama"), TOKENS, sparsity=0.6, method="sparsegpt", budget="outliers", budget_spread=0.2, bits=4
    )
    assert report.num_masked == round(0.6 * report.num_prunable)
    row = pruned.model.layers[0].mlp.up_proj.weight[0]
    assert len(row.unique()) <= 16
    shares = [sum(x.num_masked for x in block.layers) for block in report.blocks]
    assert len(set(shares)) > 1


def test_texts_are_a_calibration_set_and_threads_are_as_before(words):
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    texts = [words.read_text(), words.read_text()[::-1]]
    _, report = lampctl.prune(
        build("llama"), texts, tokenizer=tokenizer(), sparsity=0.5, method="wanda", num_samples=4, seqlen=16, threads=1
    )
    assert report.sparsity == 0.5
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (threads, precision)


@pytest.mark.parametrize("wrong", ["models/opt", 3, str.split])
def test_a_tokenizer_that_is_none_is_refused(words, wrong):
    with pytest.raises(ConfigError, match=r"tokenizer= is a \w+, no tokenizer of transformers"):
        lampctl.prune(
            build("llama"), [words.read_text()], tokenizer=wrong, sparsity=0.5, method="wanda", num_samples=4, seqlen=16
        )


def test_calls_from_several_threads_give_the_same_bits_and_leave_torch_as_it_was():
    model, settings = build("llama"), {"sparsity": 0.5, "pruner": "sparsegpt", "epochs": 1, "refine_epochs": 1}
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    alone, _ = lampctl.prune(model, TOKENS, **settings)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: lampctl.prune(model, TOKENS, **settings).model, range(4)))
    for other in found:
        assert all(torch.equal(tensor, alone.state_dict()[name]) for name, tensor in other.state_dict().items())
    assert torch.are_deterministic_algorithms_enabled() == is_deterministic
    assert not torch.nn.Linear(2, 2).weight.is_meta


@pytest.mark.parametrize(
    "asked", [{"num_samples": 4}, {"seqlen": 8}, {"calibration_sampling": "random"}, {"calibration_skip": 32}]
)
def test_settings_that_disagree_with_the_token_ids_are_refused(asked):
    name = next(iter(asked))
    with pytest.raises(ConfigError, match=rf"^{name}=.* are 6 samples of 16 tokens.*leave {name} out"):
        lampctl.prune(build("llama"), TOKENS, sparsity=0.5, method="wanda", **asked)


def test_settings_that_agree_with_the_token_ids_are_fine():
    agreeing = {"num_samples": 6, "seqlen": 16, "calibration_sampling": "contiguous"}
    _, report = lampctl.prune(build("llama"), TOKENS, sparsity=0.5, method="wanda", preset="quick", **agreeing)
    assert (report.settings["num_samples"], report.settings["seqlen"]) == (6, 16)


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "message"),
    [
        ((), {"sparsity": 0.5}, ConfigError, "LAMP needs calibration data"),
        (("pydocs",), {"sparsity": 0.5}, ConfigError, "needs a tokenizer"),
        ((TOKENS,), {}, ConfigError, "--sparsity is missing"),
        ((TOKENS,), {"sparsity": 0.5, "sparsty": 1}, ConfigError, "sparsty"),
        ((TOKENS,), {"sparsity": 0.5, "evaluate": ("c4",)}, ConfigError, "evaluate is a setting of runs"),
        ((TOKENS,), {"sparsity": 0.5, "method": "wanda", "bits": 4}, ConfigError, "cannot quantize"),
        (([TOKENS[0], TOKENS[0][:3]],), {"sparsity": 0.5}, ConfigError, "of one length"),
        ((TOKENS + 1000,), {"sparsity": 0.5}, UsageError, "embeddings"),
        (("coco:nowhere",), {"sparsity": 0.5}, UsageError, "nowhere"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(arguments, settings, error, message):
    with pytest.raises(error, match=message):
        lampctl.prune(build("llama"), *arguments, **settings)


@pytest.mark.parametrize(
    "mode",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_the_callers_modes_of_torch_change_no_bit(mode):
    model = build("opt")
    expected = states(lampctl.prune(model, TOKENS, **QUICK).model)
    with mode():
        found = lampctl.prune(model, TOKENS, **QUICK).model
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def _with_a_bias(model):
    old = model.model.layers[1].mlp.up_proj
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(old.in_features, old.out_features, bias=True)


def _with_fewer_blocks_in_the_config(model):
    model.config.num_hidden_layers -= 1


def _with_a_shared_block(model):
    model.model.layers[1] = model.model.layers[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_with_a_bias, "layers.1.mlp.up_proj.bias"),
        (_with_fewer_blocks_in_the_config, "its config knows nothing of"),
        (_with_a_shared_block, "are one tensor"),
    ],
)
def test_a_model_that_is_not_what_its_config_says_is_refused(change, message):
    model = build("llama")
    change(model)
    with pytest.raises(UsageError, match=message):
        lampctl.prune(model, TOKENS, **QUICK)


def test_the_callers_settings_of_torch_stay():
    before = torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype()
    filling = torch.utils.deterministic.fill_uninitialized_memory
    for deterministic, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        model = build("opt")
        try:
            torch.use_deterministic_algorithms(deterministic)
            torch.set_default_dtype(dtype)
            lampctl.prune(model, TOKENS, sparsity=0.5, method="wanda", threads=1, micro_batch=1)
            assert torch.are_deterministic_algorithms_enabled() is deterministic
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            assert torch.get_default_dtype() is dtype
            assert torch.utils.deterministic.fill_uninitialized_memory is filling
        finally:
            torch.use_deterministic_algorithms(before[0])
            torch.set_default_dtype(before[1])


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "token ids"),
        (TOKENS[:0], "token ids"),
        (TOKENS[0], "token ids"),
        ([1, 2, 3], "token ids"),
        (5, "this is a int"),
        ({"input_ids": TOKENS}, "this is a dict"),
        (TOKENS.float(), "integers"),
        (TOKENS - 100, "token ids from -"),
        (TOKENS + 10**6, "the model's own tokenizer"),
    ],
)
def test_a_calibration_set_that_is_none_is_said_to_be(calibration, message):
    with pytest.raises((ConfigError, UsageError), match=message):
        lampctl.prune(build("opt"), calibration, **QUICK)


def test_warnings_of_the_work_are_python_warnings():
    with pytest.warns(UserWarning, match="only one calibration sample"):
        lampctl.prune(build("llama"), TOKENS[:1], **QUICK)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lampctl.prune(build("llama"), TOKENS, **QUICK)


def test_a_run_from_python_can_be_opened_resumed_and_measured_again(tmp_path, words):
    folder, settings = (
        save(tmp_path / "m", "llama"),
        {"sparsity": 0.5, "method": "wanda", "num_samples": 2, "seqlen": 16},
    )
    place = tmp_path / "r"
    run = lampctl.run(folder, calibration=f"text:{words}", evaluate=(), run_dir=place, **settings)
    assert run.is_finished
    assert run.metrics == ()
    opened = lampctl.open_run(place)
    opened.resume(evaluate=(f"text:{words}",), eval_max_tokens=64, evaluate_dense=False)
    (measured,) = opened.metrics
    assert (measured.metric, measured.which, measured.is_partial) == ("perplexity", "pruned", True)
    assert sum(layer.num_masked for block in opened.budget for layer in block.layers) == opened.status.num_masked
    assert "steps done" in repr(opened)
    with pytest.raises(ConfigError, match="decides the weights"):
        opened.resume(sparsity=0.6)
    with pytest.raises(ConfigError, match="no setting"):
        opened.resume(sparsty=0.6)
    with pytest.raises(RunNotFound):
        lampctl.open_run(tmp_path / "nothing")


def test_a_run_that_was_only_begun_has_no_model_yet(tmp_path, lampctl, words):
    import lampctl as api

    folder = save(tmp_path / "m", "llama")
    flags = ("--sparsity", 0.5, "--num-samples", 2, "--seqlen", 16, "--calibration", f"text:{words}", "--evaluate", "")
    assert lampctl("init", folder, *flags, "--run-dir", "r").code == 0
    run = api.open_run("r")
    assert not run.is_finished
    with pytest.raises(ConfigError, match="has no model yet"):
        _ = run.model_path


def test_bos_stands_where_the_model_has_it_best(tmp_path, monkeypatch):
    drawn = []
    original = calibrate.draw_tokens
    monkeypatch.setattr(calibrate, "draw_tokens", lambda *args: drawn.append(original(*args)) or drawn[-1])
    model = AutoModelForCausalLM.from_pretrained(save_needing_bos(tmp_path / "m"))
    size = {"num_samples": 4, "seqlen": 16, "sparsity": 0.3, "method": "wanda"}
    lampctl.prune(model, [TEXT], tokenizer=bos_tokenizer(), **size)
    assert drawn[0][:, 0].tolist() == [BOS] * 4
