"""Model folders as lampctl exports them, with masks/, pruned at random: what matters here is how they are stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from stages import export
from stages.formats import pruning_masks
from stages.formats.pruning_masks import PrunedWeight
from stages.models.decoder import open_model
from stages.models.resolve import resolve
from stages.quantization.grid import fit_grid
from tests.small_models import save

MaskOf = Callable[[Tensor], Tensor]


def share(sparsity: float) -> MaskOf:
    """Masks of the given share of the weights, at random places."""

    def mask(weight: Tensor) -> Tensor:
        chosen = torch.randperm(weight.numel())[: round(sparsity * weight.numel())]
        return torch.zeros(weight.numel(), dtype=torch.bool).index_fill_(0, chosen, True).reshape(weight.shape)

    return mask


_SEVENTY_PERCENT = share(0.7)


def two_of_four(weight: Tensor) -> Tensor:
    """Masks the two smallest of each four weights in a row."""
    order = weight.abs().reshape(weight.shape[0], -1, 4).argsort(dim=2).argsort(dim=2)
    return (order < 2).reshape(weight.shape)


def pruned_folder(
    folder: Path,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    mask_of: MaskOf = _SEVENTY_PERCENT,
    bits: int | None = None,
    group_size: int | None = None,
    change: Callable[[str, Tensor, Tensor], None] | None = None,
) -> Path:
    """A pruned model folder. change: called with each layer's key, weight and mask as (R, C), to change the weight."""
    original = save(folder.with_name(f"{folder.name}-original"), family, dtype)
    model = open_model(resolve(str(original), None))
    (folder / pruning_masks.FOLDER).mkdir(parents=True)
    files: dict[str, list[str]] = {}
    plan = export.ExportPlan.of(model, "original")
    torch.manual_seed(1)
    for index in range(model.num_blocks):
        block = model.load_block(index, torch.device("cpu"))
        dtypes, names = export.block_dtypes(model, index, "original"), model.stored_names(index)
        layers = {}
        for info in model.layers(index):
            module = block.get_submodule(info.path)
            weight = model.weight_matrix(module).detach().clone()
            mask = mask_of(weight)
            grid = None
            if bits is not None:
                grid = fit_grid(weight, bits, group_size)
                weight = grid.nearest(weight).to(dtype).float()
            weight[mask] = 0
            key = names[f"{info.path}.weight"]
            if change is not None:
                change(key, weight, mask)
            model.set_weight_matrix(module, weight)
            layers[info.name] = PrunedWeight(key, info.transposed, mask, grid)
        state = {name: tensor.to(dtypes[name]) for name, tensor in block.state_dict().items()}
        name = plan.filename(index)
        (folder / name).write_bytes(b"".join(export.block_shard(model, index, state)))
        (folder / pruning_masks.FOLDER / f"block-{index:05d}.safetensors").write_bytes(pruning_masks.mask_file(layers))
        files[name] = [names[entry] for entry in state]
    for filename, tensors in plan.outside_shards(model, "original"):
        (folder / filename).write_bytes(b"".join(export.shard_bytes(tensors)))
        files[filename] = list(tensors)
    size = sum((folder / name).stat().st_size for name in files)
    (folder / "model.safetensors.index.json").write_bytes(export.index_json(files, size))
    for name, contents in model.export_extras("original"):
        (folder / name).write_bytes(contents)
    (folder / "README.md").write_text("A card.\n")
    return folder


def contents_of(folder: Path) -> dict[str, bytes]:
    """Every file in it."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
