"""Save a pruned model as it was stored before. Imported by the peers' Python, too: it knows nothing of lampctl."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def save_like(original: Path, model: torch.nn.Module, out: Path) -> None:
    """Write `model` with the files, names and dtypes of `original`: whatever the peer's own way of saving is."""
    state = model.state_dict()
    shutil.rmtree(out, ignore_errors=True)  # half of it, from a call that was stopped
    out.mkdir()
    for path in sorted(original.iterdir()):
        if path.suffix != ".safetensors":
            shutil.copy(path, out)
            continue
        with safe_open(path, framework="pt") as stored:
            tensors = {}
            names = stored.keys()  # of a file, which is not a dictionary
            for name in names:
                before = stored.get_tensor(name)
                after = state[name].detach().to("cpu", before.dtype).contiguous()
                assert after.shape == before.shape, name
                tensors[name] = after
        save_file(tensors, out / path.name, metadata={"format": "pt"})
