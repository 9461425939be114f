"""Choices of device and arithmetic, on GPUs that are not there."""

import pytest
import torch

from stages.machine.device import choose


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
