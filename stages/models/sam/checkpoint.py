"""Meta's checkpoints of Segment Anything (.pth): found or fetched, checked, and kept as a `SamModel` folder.

They are read with weights_only, once: nothing in them is executed.
"""

from __future__ import annotations

import json
import logging
import pickle
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from stages.errors import ResourceError, UsageError
from stages.formats.checkpoint_files import SINGLE, serialized
from stages.formats.disk_errors import reading
from stages.formats.file_digest import digest_file
from stages.machine.cache import cache_dir
from stages.models.aliases import MetaCheckpoint
from stages.models.converted_folders import cached, converted
from stages.models.sam.modules import META_SIZES, PIXEL_MEAN, PIXEL_STD, SamSizes, build_sam
from stages.models.sam.names import folder_name

log = logging.getLogger(__name__)

# What an exported folder calls the checkpoint that `sam_model_registry` opens.
META_CHECKPOINT = "sam.pth"
_CHUNK = 1 << 20
# Keys under which training loops save weights, and what DistributedDataParallel and torch.compile put before names.
_WRAPPERS = ("model", "state_dict", "model_state_dict")
_PREFIXES = ("module.", "_orig_mod.")


def checkpoint_place(published: MetaCheckpoint) -> Path:
    """Where in the user's cache a published checkpoint is looked for, and put."""
    return cache_dir() / "sam" / published.file


def published_checkpoint(published: MetaCheckpoint) -> Path:
    """The checkpoint in the user's cache, fetched if it is not there, and the very one that Meta publishes.

    Raises ResourceError where no source has it, or the file is not the published one.
    """
    path = checkpoint_place(published)
    if not path.exists():
        _fetch(published, path)
    found = digest_file(path).sha256
    if found != published.sha256:
        raise ResourceError(
            f"{path} is not the {published.file} that Meta publishes (sha256 {found[:12]}..., published "
            f"{published.sha256[:12]}...): it is truncated or another file; delete it and run again, or name it as "
            "MODEL by its path if it is meant"
        )
    return path


def _fetch(published: MetaCheckpoint, path: Path) -> None:
    log.info("fetching %s (%d MB) from Meta", published.file, published.size_mb)
    unfinished = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(published.url, timeout=20) as answer, unfinished.open("wb") as file:
            while piece := answer.read(_CHUNK):
                file.write(piece)
        unfinished.replace(path)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise ResourceError(
            f"{published.file} comes from dl.fbaipublicfiles.com, which is out of reach ({reason}): put a copy at "
            f"{path}, or give the path of a .pth or of a SamModel folder as MODEL; examples/sam-tiny needs no download"
        ) from error
    except OSError as error:
        raise ResourceError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def from_checkpoint(fetch: Callable[[], Path], sha256: str | None = None) -> Path:
    """A `SamModel` folder in the cache with the weights of a checkpoint of Meta's form.

    fetch: gives the file, and is called only if it has not been converted yet. sha256: of the file, if known.
    Raises ResourceError for a truncated file or one that is no pickle of plain tensors, UsageError for weights that
    are no Segment Anything model.
    """
    digest = sha256 or digest_file(fetch()).sha256
    with converted(digest) as (target, is_new):
        if is_new:
            path = fetch()
            log.info("converting %s to safetensors, once", path.name)
            state = _read(path)
            sizes = sizes_of_state(state, path)
            with torch.device("meta"):
                expected = build_sam(sizes).state_dict()
            missing = sorted(expected.keys() - state.keys())
            if missing:
                raise UsageError(f"{path} lacks {len(missing)} weights of Segment Anything, {missing[0]} among them")
            others = sorted(state.keys() - expected.keys())
            if others:
                log.warning(
                    "%s holds %d tensors that Segment Anything has not, left out: %s", path, len(others), others
                )
            for name, tensor in expected.items():
                if tensor.shape != state[name].shape:
                    shapes = f"{tuple(state[name].shape)}, not {tuple(tensor.shape)}"
                    raise UsageError(f"{path}: {name} has shape {shapes} as its other weights ask for")
            write_folder({name: state[name] for name in expected}, sizes, target)
    return cached(target)


def write_folder(state: Mapping[str, Tensor], sizes: SamSizes, folder: Path) -> None:
    """A `SamModel` folder of the weights of a `segment_anything` model, in their own dtypes."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {folder_name(name, sizes.iou_head_depth): tensor for name, tensor in state.items()}
    with (folder / SINGLE).open("wb") as file:
        file.writelines(serialized(named, {"format": "pt"}))
    (folder / "config.json").write_text(json.dumps(sizes.config(), indent=2) + "\n")
    (folder / "preprocessor_config.json").write_bytes(preprocessor_config(sizes))


def _read(path: Path) -> dict[str, Tensor]:
    try:
        damaged = state = None
        # Not mapped: a mapped file that goes away ends the process by SIGBUS.
        with reading(path), path.open("rb") as file:
            if zipfile.is_zipfile(file):  # what torch wrote before version 1.6 is none
                with zipfile.ZipFile(file) as archive:
                    damaged = archive.testzip()
            if damaged is None:
                file.seek(0)
                state = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, zipfile.BadZipFile) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].partition("\x1b")[0][:200]
        raise ResourceError(
            f"{path} cannot be read as a checkpoint of plain tensors ({reason}): it is truncated, or no checkpoint; "
            "fetch it again"
        ) from error
    if damaged is not None:
        raise ResourceError(f"{path} is damaged ({damaged} in it is not what was written): fetch it again")
    state = _unwrapped(state)
    if not isinstance(state, Mapping) or not all(_is_plain(name, value) for name, value in state.items()):
        raise UsageError(f"{path} holds no plain dictionary of floating-point tensors, as Meta's checkpoints do")
    return dict(state)


def _unwrapped(content: object) -> object:
    """The weights in what a training loop saved: {"model": weights, "optimizer": ...}, names with "module." before."""
    while isinstance(content, Mapping):
        wrapper = next((key for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        prefix = next((p for p in _PREFIXES if content and all(str(name).startswith(p) for name in content)), None)
        if wrapper is not None:
            content = content[wrapper]
        elif prefix is not None:
            content = {str(name).removeprefix(prefix): value for name, value in content.items()}
        else:
            break
    return content


def _is_plain(name: object, value: object) -> bool:
    if not isinstance(name, str) or not isinstance(value, Tensor):
        return False
    return value.is_floating_point() and value.layout == torch.strided and not value.is_meta


def sizes_of_state(state: Mapping[str, Tensor], path: Path) -> SamSizes:
    """The sizes of the model that a checkpoint holds, read off the shapes of its weights.

    Raises UsageError if they are not Segment Anything's.
    """
    try:
        position, patch = state["image_encoder.pos_embed"], state["image_encoder.patch_embed.proj.weight"]
        depth = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("image_encoder.blocks."))
        grid, embed_dim, patch_size = position.shape[1], position.shape[3], patch.shape[2]
        reach = [len(state[f"image_encoder.blocks.{index}.attn.rel_pos_h"]) for index in range(depth)]
        windows = [(length + 1) // 2 for length in reach if length != 2 * grid - 1]
        decoder = "mask_decoder.transformer.layers."
        heads = embed_dim // state["image_encoder.blocks.0.attn.rel_pos_h"].shape[1]
        iou_head = "mask_decoder.iou_prediction_head.layers."
        prompt_dim = state["image_encoder.neck.0.weight"].shape[0]
        decoder_depth = 1 + max(int(name.split(".")[3]) for name in state if name.startswith(decoder))
        sizes = SamSizes(
            image_size=grid * patch_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=heads,
            mlp_dim=len(state["image_encoder.blocks.0.mlp.lin1.weight"]),
            window_size=windows[0] if windows else 0,
            global_attn_indexes=tuple(index for index, length in enumerate(reach) if length == 2 * grid - 1),
            prompt_dim=prompt_dim,
            decoder_depth=decoder_depth,
            decoder_heads=8,  # no shape shows it; 8 in all three of Meta's models
            decoder_mlp_dim=len(state[f"{decoder}0.mlp.lin1.weight"]),
            iou_head_depth=1 + max(int(name.split(".")[3]) for name in state if name.startswith(iou_head)),
            iou_head_hidden_dim=len(state[f"{iou_head}0.weight"]),
            mask_in_chans=len(state["prompt_encoder.mask_downscaling.3.weight"]),
            num_multimask_outputs=len(state["mask_decoder.mask_tokens.weight"]) - 1,
            decoder_norm_eps=META_SIZES["vit_b"].decoder_norm_eps,
        )
    except KeyError as error:
        raise UsageError(f"{path} is no checkpoint of Segment Anything: it lacks {error}") from error
    except (ValueError, IndexError, TypeError, ZeroDivisionError) as error:
        raise UsageError(f"{path} is no checkpoint of Segment Anything: its weights have other shapes") from error
    return sizes


def preprocessor_config(sizes: SamSizes) -> bytes:
    """`preprocessor_config.json` of a `SamModel` folder: Meta's preprocessing, for transformers' `SamProcessor`."""
    side = sizes.image_size
    settings = {
        "image_processor_type": "SamImageProcessor",
        "processor_class": "SamProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"longest_edge": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [value / 255 for value in PIXEL_MEAN],
        "image_std": [value / 255 for value in PIXEL_STD],
        "do_pad": True,
        "pad_size": {"height": side, "width": side},
        "mask_size": {"longest_edge": 4 * sizes.grid},
        "mask_pad_size": {"height": 4 * sizes.grid, "width": 4 * sizes.grid},
    }
    return (json.dumps(settings, indent=2) + "\n").encode()
