"""How sparse a model folder is, whoever pruned it: by its masks where it has them, else by the zeros in its blocks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from stages.formats.pruning_masks import FOLDER as MASKS
from stages.formats.pruning_masks import read_mask_file
from stages.models.base import BlockModel


@dataclass(frozen=True)
class Achieved:
    """Pruned weights over prunable ones, counted one by one."""

    num_masked: int
    num_prunable: int


@torch.no_grad()
def achieved(model: BlockModel, folder: Path) -> Achieved:
    """The count for the model in `folder`, one block in memory at a time.

    With masks/, what they hold; without, every zero of every linear layer inside the blocks. Raises DamagedFileError.
    """
    files = sorted((folder / MASKS).glob("*.safetensors"))
    num_masked, num_prunable = 0, 0
    if files:
        for path in files:
            for weight in read_mask_file(path).values():
                num_masked += int(weight.mask.sum())
                num_prunable += weight.mask.numel()
        return Achieved(num_masked, num_prunable)
    for index in range(model.num_blocks):
        block = model.load_block(index, torch.device("cpu"))
        for info in model.layers(index):
            matrix = model.weight_matrix(block.get_submodule(info.path))
            num_masked += int((matrix == 0).sum())
            num_prunable += matrix.numel()
    return Achieved(num_masked, num_prunable)
