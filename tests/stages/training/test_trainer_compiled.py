"""Compiled training steps give the results of plain ones, up to rounding."""

import dataclasses
import shutil

import pytest
import torch

from stages.capture import capture
from stages.compensate_block import compensate_block
from stages.in_memory import ListStream
from stages.machine.device import DeviceChoices
from stages.models.decoder import open_model
from stages.models.resolve import resolve
from stages.training.rates import Rate
from stages.training.trainer import TrainingSettings
from tests.blocks import context_of
from tests.small_models import VOCAB, save

N, T = 4, 8
CHOICES = DeviceChoices("cpu", "float32", 1, "highest", "here")


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.slow
def test_compiled_training_ends_where_plain_training_does(tmp_path):
    model = open_model(resolve(str(save(tmp_path, "llama-gqa"))))
    generator = torch.Generator().manual_seed(0)
    inputs = ListStream(N, (T,), torch.int64)
    for index in range(N):
        inputs.write(index, torch.randint(4, VOCAB, (T,), generator=generator))
    biased, dense, out = (ListStream(N, (T, model.hidden_size), torch.float32) for _ in range(3))
    capture(context_of(model, inputs, CHOICES), biased, dense)
    settings = TrainingSettings(epochs=2, lr=Rate(1e-3), lr_decay=1.0, holds_out=False, seed=0)

    def train(choices):
        return compensate_block(context_of(model, inputs, choices).block(1), biased, dense, out, settings)

    plain, compiled = train(CHOICES), train(dataclasses.replace(CHOICES, compiles=True))
    assert compiled.training.after.trained == pytest.approx(plain.training.after.trained, rel=1e-3)
    for name, tensor in plain.state.items():
        assert torch.allclose(compiled.state[name], tensor, rtol=1e-2, atol=1e-4), name
