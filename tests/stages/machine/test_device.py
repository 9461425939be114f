"""Choices of device and arithmetic, on GPUs that are not there."""

import pytest
import torch

from stages.errors import UsageError
from stages.machine.device import choose, reproducible


@pytest.fixture(params=[True, False], ids=["bf16", "no bf16"])
def has_bf16(request, monkeypatch):
    """A GPU that computes in bf16, or only emulates it."""

    def is_supported(including_emulation=True):
        return including_emulation or request.param

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    return request.param


def test_a_gpu_keeps_streams_in_fp32_and_trains_in_bf16_if_it_has_that(has_bf16):
    choices = choose("cuda")
    assert choices.torch_dtype == torch.float32
    assert choices.torch_train_dtype == (torch.bfloat16 if has_bf16 else torch.float32)
    assert choices.training_in("auto") == choices
    assert choices.training_in("float32").torch_train_dtype == torch.float32
    assert choices.training_in("float16").torch_train_dtype == torch.float16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_dtype_that_is_given_is_that_of_training_too(has_bf16, dtype):
    choices = choose("cuda", dtype)
    assert choices.torch_dtype == choices.torch_train_dtype == getattr(torch, dtype)


def test_a_processor_computes_in_fp32():
    choices = choose("cpu")
    assert (choices.torch_dtype, choices.torch_train_dtype) == (torch.float32, torch.float32)
    assert choices.training_in("bfloat16").torch_train_dtype == torch.bfloat16


def settings_of_training():
    """Whether operations must be deterministic, whether they only warn, and whether attention may be cuDNN's."""
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
    )


def test_training_on_a_gpu_uses_deterministic_kernels_only_and_leaves_the_rest_as_it_was():
    before = settings_of_training()
    with reproducible(torch.device("cuda")):
        assert settings_of_training() == (True, False, False)
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
    assert settings_of_training() == before
    with reproducible(torch.device("cpu")):
        assert settings_of_training() == before


def test_an_operation_without_a_deterministic_form_is_named_and_other_errors_are_not_touched():
    before = settings_of_training()
    named = pytest.raises(UsageError, match=r"upsample_bilinear has no deterministic form.*--device cpu")
    with named, reproducible(torch.device("cuda")):
        raise RuntimeError("upsample_bilinear does not have a deterministic implementation, but you set ...")
    with pytest.raises(RuntimeError, match="out of memory"), reproducible(torch.device("cuda")):
        raise RuntimeError("out of memory")
    assert settings_of_training() == before
