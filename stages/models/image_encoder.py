"""An image encoder of transformers, one block at a time. Weights stay on disk.

S: pixels on a side.    T: tokens of a picture: its patches, the class token, registers.    H: hidden size.
F: numbers of a picture's features.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Dinov2Model,
    Dinov2WithRegistersModel,
    PreTrainedConfig,
    PreTrainedModel,
    ViTModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from stages.errors import UsageError
from stages.formats.checkpoint_files import WeightFiles, match_names
from stages.machine.hub import reason_of
from stages.models.architecture import without_weights
from stages.models.base import Entry, ModelFolder, Part
from stages.models.companion_files import exported_companions, exported_config
from stages.models.decoder_ends import put_recorders
from stages.models.image_processor import ImageProcessor
from stages.models.meta_init import require_materialised, require_plain
from stages.models.recorder import StopForward, Tape
from stages.models.stored_model import StoredModel
from stages.models.weight_pieces import place_rows

_PROJECTION = "visual_projection.weight"


class ImageEncoder(StoredModel["ImageEnds"]):
    """A `stages.models.base.BlockModel`: the encoder alone, without what is built on its features."""

    task = "vision-features"
    vocab_size = 0
    max_positions: int | None = None  # every sample has `fixed_tokens`

    def __init__(self, folder: ModelFolder) -> None:
        """Open a folder. Reads no weight.

        Raises:
            UsageError: The configuration, the image processor or the weights cannot be used, with the reason.
            ResourceError: A file of the weights is missing.
        """
        super().__init__(folder, WeightFiles(folder.path))
        config = _read_config(folder)
        self.name: str = config.model_type
        self.processor = ImageProcessor.of(folder.path)
        with without_weights():
            self._model = _tower(config, has_projection=_PROJECTION in self.weights).eval().requires_grad_(False)
        own = self._model.config
        self._blocks_path, blocks = _block_list(self._model, own.num_hidden_layers)
        self._blocks = tuple(blocks)
        self.num_blocks = len(self._blocks)
        self.hidden_size: int = own.hidden_size
        self.fixed_tokens: int | None = _num_tokens(self._model, self.processor.size, folder)
        # fp32, rounded up
        self.input_bytes_per_token = math.ceil(3 * math.prod(self.processor.size) * 4 / self.fixed_tokens)
        self._layers = tuple(self._linear_layers(index) for index in range(self.num_blocks))
        self._stored = self._match_weights()

    def hidden_shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        assert self.fixed_tokens is not None
        return (self.fixed_tokens, self.hidden_size)

    def load_ends(self, device: torch.device, part: Part = "all") -> ImageEnds:
        """The whole of the model outside its blocks, whichever part is asked for: it is small."""
        return super().load_ends(device, "all")

    def _read_ends(self, device: torch.device, part: Part) -> ImageEnds:
        tape = Tape({type(block): None for block in self._blocks})
        skeleton = copy.deepcopy(self._model)
        put_recorders(skeleton, self._blocks_path, self._blocks, tape)
        outside = {name: key for name, key in self._stored.items() if not name.startswith(f"{self._blocks_path}.")}
        state = {name: self.weights.load(key, torch.float32, device) for name, key in outside.items()}
        skeleton.load_state_dict(state, strict=False, assign=True)
        skeleton.to(device)
        require_materialised(skeleton, self.source.name)
        return ImageEnds(skeleton, tape, self.num_blocks)

    def export_extras(self, requested_dtype: str) -> Iterator[tuple[str, bytes]]:
        settings = json.loads((self.source.path / "config.json").read_text())
        extras = dict(exported_companions(self.source.path)) | {
            "config.json": exported_config(settings, requested_dtype)
        }
        yield from sorted(extras.items())

    def _match_weights(self) -> dict[str, str]:
        """For each weight of the model, its name in the files."""
        state = self._model.state_dict()
        transforms = get_model_conversion_mapping(self._model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        prefix = _PREFIXES.get(type(self._model), self._model.base_model_prefix)
        inside = {name: tuple(t.shape) for name, t in state.items() if name.startswith(f"{self._blocks_path}.")}
        self._parts = place_rows(self.weights.keys, inside, transforms, prefix, self.weights.shape)
        others = [name for name in state if name not in self._parts]
        stored = match_names(self.weights.keys, others, renamings, prefix)
        missing = [name for name in others if state[name].is_meta and name not in stored]
        if missing:
            raise UsageError(
                f"{self.source.path} lacks {len(missing)} weights of a {type(self._model).__name__}, {missing[0]} "
                "among them: the files are incomplete, or stored in a form that cannot be read one block at a time"
            )
        for name, key in stored.items():
            if tuple(state[name].shape) != self.weights.shape(key):
                raise UsageError(
                    f"{self.source.path}: {key} has shape {self.weights.shape(key)}, its config.json asks for "
                    f"{tuple(state[name].shape)}"
                )
            require_plain(self.weights, key, self.source.path)
        for part in self._parts.values():
            require_plain(self.weights, part.key, self.source.path)
        beyond = set(self._beyond()) & set(match_names(self.weights.keys, self._beyond(), renamings, prefix))
        if beyond:
            raise UsageError(
                f"{self.source.path} holds more blocks than the {self.num_blocks} of its config.json: they belong to "
                "two different models"
            )
        return stored

    def _beyond(self) -> list[str]:
        """What the weights of one more block would be called."""
        return [f"{self._prefix(self.num_blocks)}{name}" for name in self._blocks[0].state_dict()]


class ImageEnds:
    """A `stages.models.base.Ends`: the model's own forward, around recorders in place of its blocks."""

    def __init__(self, model: PreTrainedModel, tape: Tape, num_blocks: int) -> None:
        self._model, self._tape, self._num_blocks = model, tape, num_blocks

    def enter(self, inputs: Tensor) -> Entry:
        """inputs: pixels (N, 3, S, S). The hidden state is (N, T, H)."""
        self._tape.start(self._num_blocks, None)
        with contextlib.suppress(StopForward):
            self._model(pixel_values=inputs)
        return Entry(self._tape.hidden[0], tuple(self._tape.calls))

    def leave(self, inputs: Tensor, hidden: Tensor) -> Tensor:
        """Features (N, F) of the last block's output (N, T, H). Of the inputs, only the shape matters.

        ViT, DINOv2: the class token after the last norm. CLIP: the image embedding, or, without a projection, what
        transformers calls the pooled output.
        """
        self._tape.start(self._num_blocks, hidden)
        output: Any = self._model(pixel_values=inputs)
        if isinstance(self._model, CLIPVisionModelWithProjection):
            features: Tensor = output.image_embeds
        elif isinstance(self._model, CLIPVisionModel):
            features = output.pooler_output
        else:
            features = output.last_hidden_state[:, 0]
        return features


# What files may have before a name, where it is not transformers' own `base_model_prefix`.
_PREFIXES: dict[type[PreTrainedModel], str] = {CLIPVisionModel: "vision_model"}


def _tower(config: PreTrainedConfig, *, has_projection: bool) -> PreTrainedModel:
    """The encoder that a configuration describes, without heads, with random weights."""
    if config.model_type == "vit":
        return ViTModel(config, add_pooling_layer=False)
    if config.model_type == "dinov2":
        return Dinov2Model(config)
    if config.model_type == "dinov2_with_registers":
        return Dinov2WithRegistersModel(config)
    vision = config
    if config.model_type == "clip":
        vision = copy.deepcopy(config.vision_config)
        vision.projection_dim = config.projection_dim
    return CLIPVisionModelWithProjection(vision) if has_projection else CLIPVisionModel(vision)


def _block_list(model: PreTrainedModel, num_blocks: int) -> tuple[str, nn.ModuleList]:
    """The name of the list of blocks, and the list."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_blocks > 0:
            return name, module
    raise UsageError(f"this {type(model).__name__} has no blocks: its config.json says {num_blocks}")


def _num_tokens(model: PreTrainedModel, size: tuple[int, int], folder: ModelFolder) -> int:
    """Tokens of a picture of this size.

    Raises:
        UsageError: The model does not take pictures of this size.
    """
    sides, patches = _pair(model.config.image_size), _pair(model.config.patch_size)
    interpolates = isinstance(model, Dinov2Model | Dinov2WithRegistersModel)
    if (size != sides and not interpolates) or any(side < patch for side, patch in zip(size, patches, strict=True)):
        raise UsageError(
            f"{folder.path}: its image processor gives pictures of {size[0]}x{size[1]} pixels, its config.json asks "
            f"for {sides[0]}x{sides[1]}"
        )
    registers: int = getattr(model.config, "num_register_tokens", 0)
    return math.prod(side // patch for side, patch in zip(size, patches, strict=True)) + 1 + registers


def _pair(value: Any) -> tuple[int, int]:
    """Height and width, of one number or two."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _read_config(folder: ModelFolder) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(folder.path)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise UsageError(f"{folder.name}: transformers cannot read its config.json ({reason_of(error)})") from error
    if getattr(config, "quantization_config", None) is not None:
        raise UsageError(f"{folder.name} is quantized: name the original model")
    return config
