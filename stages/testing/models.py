"""Conformance kit for model families: `check_model_family` raises AssertionError with the failed requirement."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stages.models.base import BlockModel, ModelFolder
from stages.models.family import ModelFamily
from stages.models.registry import MODEL_FAMILIES, family_of
from stages.tasks.registry import TASKS

_CPU = torch.device("cpu")


@torch.no_grad()
def check_model_family(
    family: type[ModelFamily] | str, folder: ModelFolder, inputs: Tensor, forward: Callable[[Tensor], Tensor]
) -> None:
    """Check a model family on one of its models.

    Requirements: name, title, help and task are complete; the folder is recognised; the chain of its blocks gives what
    the model's own forward gives, to the last bit, also with weights handed over as a state; shapes, layers, names,
    sizes and dtypes agree with the block; every stored name belongs to one block or to what is outside of them; a
    weight matrix that is set is the one that is read.

    Args:
        family: The class, or its name in the registry.
        folder: A small model with at least two blocks.
        inputs: A batch (N, ...) for its `Ends.enter`: token ids (N, T), pixels (N, 3, S, S).
        forward: The model's own forward in fp32: what `Ends.leave` should give for the inputs.

    Raises:
        AssertionError: A requirement fails. The message names it.
    """
    if isinstance(family, str):
        assert MODEL_FAMILIES.get(family).name == family, f"{family} has the name {MODEL_FAMILIES.get(family).name}"
        family = MODEL_FAMILIES.get(family)
    _check_description(family)
    assert family_of(folder) is family, f"{folder.name} is recognised by {family_of(folder).name}, not {family.name}"
    model = family.open(folder)
    assert model.task == family.task, f"{folder.name}: its task is {model.task}, the family's is {family.task}"
    assert model.source == folder, f"{folder.name}: source is another folder"
    assert model.num_blocks >= 2, f"{folder.name}: the kit needs a model with two blocks"
    expected = forward(inputs)
    assert torch.equal(_chain(model, inputs, by_state=False), expected), f"{folder.name}: the block chain differs"
    assert torch.equal(_chain(model, inputs, by_state=True), expected), f"{folder.name}: blocks from a state differ"
    model.drop_ends()
    assert torch.equal(_chain(model, inputs, by_state=False), expected), f"{folder.name}: its ends are not read again"
    assert model.outside_numbers > 0, f"{folder.name}: outside_numbers counts nothing"
    stored: set[str] = set()
    for index in range(model.num_blocks):
        _check_block(model, index)
        names = set(model.stored_names(index).values())
        assert not names & stored, f"{folder.name}, block {index}: {sorted(names & stored)[0]} is in two blocks"
        stored |= names
    keys = set(model.weights.keys)
    assert keys - stored, f"{folder.name}: no weight outside the blocks"
    unused = set(model.unused_weights())
    assert unused <= keys, f"{folder.name}: unused_weights names {sorted(unused - keys)[:1]}, which is not in its files"
    assert not unused & stored, f"{folder.name}: {sorted(unused & stored)[:1]} is unused and in a block"
    extras = dict(model.export_extras("original"))
    assert "config.json" in extras, f"{folder.name}: export_extras gives no config.json"


def _check_description(family: type[ModelFamily]) -> None:
    for attribute in ("name", "title", "help", "task"):
        value = getattr(family, attribute, None)
        assert isinstance(value, str), f"{family.__name__}.{attribute} is missing"
        assert value, f"{family.__name__}.{attribute} is empty"
        assert "\n" not in value, f"{family.__name__}.{attribute} is more than one line"
    assert family.task in TASKS, f"{family.__name__}.task is {family.task}, which is not registered"
    assert isinstance(family.recognises({}), bool), f"{family.__name__}.recognises({{}}) is not a bool"
    assert family.is_fallback or not family.recognises({}), f"{family.__name__} recognises an empty configuration"


def _chain(model: BlockModel, inputs: Tensor, *, by_state: bool) -> Tensor:
    """What the ends give after all blocks; by_state: each block's weights are read and handed over as a state."""
    ends = model.load_ends(_CPU, "all")
    entry = ends.enter(inputs)
    assert len(entry.calls) == model.num_blocks, f"{model.source.name}: one call for each block is required"
    shape = (len(inputs), *model.hidden_shape(tuple(inputs.shape[1:])))
    hidden = entry.hidden
    for index in range(model.num_blocks):
        assert tuple(hidden.shape) == shape, f"{model.source.name}, block {index}: {tuple(hidden.shape)}, not {shape}"
        block = model.load_block(index, _CPU)
        if by_state:
            block = model.load_block(index, _CPU, state={name: t.clone() for name, t in block.state_dict().items()})
        hidden = model.run_block(block, hidden, entry.calls[index])
    return ends.leave(inputs, hidden)


def _check_block(model: BlockModel, index: int) -> None:
    where = f"{model.source.name}, block {index}"
    block = model.load_block(index, _CPU)
    state = block.state_dict()
    assert model.stored_names(index).keys() == state.keys(), f"{where}: stored_names and the block's state differ"
    sizes = {name: tensor.numel() for name, tensor in state.items()}
    assert model.entry_sizes(index) == sizes, f"{where}: entry_sizes and the block's state differ"
    assert model.original_dtypes(index).keys() == state.keys(), f"{where}: original_dtypes lacks or adds an entry"
    assert {tensor.dtype for tensor in state.values() if tensor.is_floating_point()} == {torch.float32}, (
        f"{where}: a block is loaded in fp32 unless another dtype is named"
    )
    assert model.layers(index), f"{where}: no prunable layer"
    modules = dict(block.named_modules())
    for info in model.layers(index):
        assert info.path in modules, f"{where}: no module {info.path}"
        weight = model.weight_matrix(modules[info.path])
        assert tuple(weight.shape) == (info.rows, info.cols), f"{where}, {info.path}: not (rows, cols)"
        changed = weight.clone()
        changed[0] = 0
        model.set_weight_matrix(modules[info.path], changed)
        found = model.weight_matrix(modules[info.path])
        assert torch.equal(found, changed), f"{where}, {info.path}: set_weight_matrix writes another matrix"
