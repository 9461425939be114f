"""Every decoder-only language model of Hugging Face, by one code path.

The model lives on `meta`; its blocks are replaced by recorders, so that the model's own forward tells what each
block gets; a block's weights are read when it is its turn.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from stages.errors import UsageError
from stages.formats.checkpoint_files import WeightFiles, match_names
from stages.formats.tensor_parts import TensorPart
from stages.models.architecture import AbsentTower, build_empty, other_towers, text_tower
from stages.models.base import BlockCall, Fetch, LayerInfo, ModelFolder, Part, Weights
from stages.models.block_layers import prunable_layers, require_reachable
from stages.models.companion_files import exported_companions, exported_config
from stages.models.decoder_ends import DecoderEnds, Fetching, put_recorders
from stages.models.expert_names import place_experts
from stages.models.expert_separation import separate_experts
from stages.models.layer_roles import VITAL
from stages.models.meta_init import require_materialised, require_plain
from stages.models.probe import probed
from stages.models.recorder import Tape, Visitor
from stages.models.stored_model import StoredModel
from stages.models.weight_pieces import place_rows, separate_pieces

# Families of which transformers (5.24) cannot generate: the state of xLSTM has another shape than its step asks for.
_WRITES_NOTHING = frozenset({"xlstm"})


def open_model(folder: ModelFolder) -> Decoder:
    """The model in `folder`, with no weight read yet.

    Raises UsageError for what is no decoder-only language model, is quantized, or has weights in its blocks
    that no pruner here could reach.
    """
    model = build_empty(folder)
    return Decoder(folder, model, WeightFiles(folder.path))


class Decoder(StoredModel[DecoderEnds]):
    """A `stages.models.base.BlockModel`. Build one with `open_model`."""

    task = "language"
    fixed_tokens: int | None = None
    input_bytes_per_token = 8  # token ids

    def __init__(self, folder: ModelFolder, model: PreTrainedModel, files: Weights) -> None:
        """Wrap a model that has no weights yet.

        Args:
            folder: Where the model comes from.
            model: On `meta`, built inside `without_weights`; it becomes part of the decoder.
            files: The weights, by their names in the model's own files.
        """
        config = model.config.get_text_config()
        super().__init__(folder, files)
        self.config = config
        model.eval().requires_grad_(False)
        model.tie_weights()
        self._model = model
        self.name: str = config.model_type
        self._towers = other_towers(model)
        self._experts = separate_experts(model, self._towers)
        self._blocks_path, blocks = _find_blocks(model, config.num_hidden_layers)
        self._blocks = tuple(blocks)
        self.num_blocks = len(self._blocks)
        self.vocab_size = len(model.get_input_embeddings().weight)
        self.max_positions: int | None = getattr(config, "max_position_embeddings", None)
        self._layers = tuple(
            prunable_layers(block, self._prefix(index), config) for index, block in enumerate(self._blocks)
        )
        self._require_own_weights()
        for index, block in enumerate(self._blocks):
            require_reachable(block, self._layers[index], index, folder.name)
        self._stored = self._match_weights()
        self._traits = probed(copy.deepcopy(self._skeleton), self._blocks_path, self._blocks, folder.name)
        self.hidden_size = self._traits.layout.width
        self._layers = tuple(self._without_uncalled(layers) for layers in self._layers)

    @property
    def blocks_path(self) -> str:
        """Where the list of blocks is in the model: "model.layers"."""
        return self._blocks_path

    def hidden_shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*input_shape, self.hidden_size)

    def run_block(self, block: nn.Module, hidden: Tensor, call: BlockCall) -> Tensor:
        return self._traits.layout.run(block, hidden, call)

    @property
    def can_generate(self) -> bool:
        return bool(self._model.can_generate()) and self.name not in _WRITES_NOTHING

    @property
    def outside_numbers(self) -> int:
        towers = tuple(f"{tower}." for tower in self._towers)
        stored = (key for names, key in self._outside if not names[0].startswith(towers))
        return sum(math.prod(self.weights.shape(key)) for key in stored)

    @property
    def cache_numbers_per_token(self) -> int:
        """Keys and values of all blocks, as if each had attention over all positions."""
        return sum(_cached_numbers(layers) or 2 * self.hidden_size for layers in self._layers)

    def generation_model(self, device: torch.device, fetch: Fetch) -> PreTrainedModel:
        return self._read_around(device, "all", Fetching(self._blocks, fetch))

    def _read_ends(self, device: torch.device, part: Part) -> DecoderEnds:
        tape = Tape(self._traits.returns)
        return DecoderEnds(self._read_around(device, part, tape), self._traits.layout, tape, self.num_blocks)

    def _read_around(self, device: torch.device, part: Part, visitor: Visitor) -> PreTrainedModel:
        """The model with what lies outside its blocks, and recorders in their place."""
        skeleton = copy.deepcopy(self._skeleton)
        head = "" if part != "enter" else self._untied_head()
        state: dict[str, Tensor] = {}
        for names, stored in self._outside:
            if not (head and all(name.startswith(head) for name in names)):
                tensor = self.weights.load(stored, torch.float32, device)
                state.update(dict.fromkeys(names, tensor))
        skeleton.load_state_dict(state, strict=False, assign=True)
        skeleton.tie_weights()
        put_recorders(skeleton, self._blocks_path, self._blocks, visitor)
        for name, module in skeleton.named_modules():
            if not (head and (name + ".").startswith(head)):
                require_materialised(module, f"{name} of {self.source.name}", recurse=False)
                for key, buffer in module.named_buffers(recurse=False):
                    setattr(module, key, buffer.to(device))
        return skeleton

    def export_extras(self, requested_dtype: str) -> Iterator[tuple[str, bytes]]:
        settings = json.loads((self.source.path / "config.json").read_text())
        yield "config.json", exported_config(settings, requested_dtype)
        yield from (
            (name, contents) for name, contents in exported_companions(self.source.path) if name != "config.json"
        )

    @cached_property
    def _skeleton(self) -> PreTrainedModel:
        """The model on `meta` with nothing where its blocks, and its towers for other inputs, were."""
        blocks = self._model.get_submodule(self._blocks_path)
        self._model.set_submodule(self._blocks_path, nn.ModuleList())
        try:
            skeleton = copy.deepcopy(self._model)
        finally:
            self._model.set_submodule(self._blocks_path, blocks)
        for tower in self._towers:
            skeleton.set_submodule(tower, AbsentTower())
        if getattr(skeleton.config, "rescale_every", 0):
            # RWKV halves weights and hidden state every few blocks, against overflow in fp16; the function is the same.
            skeleton.config.rescale_every = 0
        return skeleton

    @cached_property
    def _outside(self) -> tuple[tuple[tuple[str, ...], str], ...]:
        """Entries of the state that lie outside the blocks: (names that are tied together, name in the files)."""
        groups: dict[int, list[str]] = {}
        for name, tensor in self._model.state_dict(keep_vars=True).items():
            if not name.startswith(f"{self._blocks_path}."):
                groups.setdefault(id(tensor), []).append(name)
        outside = []
        for names in groups.values():
            stored = next((self._stored[name] for name in names if name in self._stored), None)
            if stored is not None:
                self._require_one_value([self._stored[name] for name in names if name in self._stored])
                outside.append((tuple(names), stored))
        return tuple(outside)

    def _require_own_weights(self) -> None:
        """Raise UsageError if two blocks share a weight: pruning the one would change the other."""
        owners: dict[int, str] = {}
        for index, block in enumerate(self._blocks):
            for name, parameter in block.named_parameters():
                owner = owners.setdefault(id(parameter), f"{self._prefix(index)}{name}")
                if owner != f"{self._prefix(index)}{name}":
                    raise UsageError(
                        f"{self.source.name}: {owner} and {self._prefix(index)}{name} are one weight; models whose "
                        "blocks share weights cannot be pruned block by block"
                    )

    def _require_one_value(self, stored: list[str]) -> None:
        """Raise UsageError if weights that the configuration ties differ in the files: transformers unties them."""
        first, *others = stored
        for other in others:
            if not torch.equal(self.weights.load(first), self.weights.load(other)):
                raise UsageError(
                    f"{self.source.name}: config.json ties {first} and {other}, but the files hold two different "
                    "matrices: set tie_word_embeddings to false there"
                )

    def _match_weights(self) -> dict[str, str]:
        transforms, prefix = get_model_conversion_mapping(self._model), self._model.base_model_prefix
        pieces = separate_pieces(self._model, self.weights.keys, transforms, prefix, self.weights.shape)
        state = self._model.state_dict(keep_vars=True)
        self._parts = place_experts(self.weights.keys, self._experts, transforms, prefix, self.weights.shape)
        inside = {name: tuple(t.shape) for name, t in state.items() if name.startswith(f"{self._blocks_path}.")}
        self._parts |= place_rows(self.weights.keys, inside, transforms, prefix, self.weights.shape)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        others = [name for name in state if name not in self._parts and name not in pieces]
        matched = match_names(self.weights.keys, others, renamings, prefix) | pieces
        # What text does not pass is exported as it is, whatever it is.
        towers = tuple(f"{tower}." for tower in self._towers)
        state = {name: tensor for name, tensor in state.items() if not name.startswith(towers)}
        stored = {name: key for name, key in matched.items() if name in state}
        found = {id(state[name]) for name in (*stored, *self._parts)}
        missing = [name for name, tensor in state.items() if tensor.is_meta and id(tensor) not in found]
        if missing:
            raise UsageError(
                f"{self.source.path} lacks {len(missing)} weights of a {type(self._model).__name__}, {missing[0]} "
                "among them: the files are incomplete, or stored in a form that cannot be read one block at a time"
            )
        for name, part in ({name: TensorPart(key) for name, key in stored.items()} | self._parts).items():
            shape = self.weights.shape(part.key)
            if part.of(torch.empty(shape, device="meta")).shape != state[name].shape:
                raise UsageError(
                    f"{self.source.path}: {part.key} has shape {shape}, its config.json asks for "
                    f"{tuple(state[name].shape)}"
                )
            require_plain(self.weights, part.key, self.source.path)
        return stored

    def _without_uncalled(self, layers: tuple[LayerInfo, ...]) -> tuple[LayerInfo, ...]:
        """The layers but small ones whose input no pruner can see (dt_proj of Mamba): they stay dense."""
        return tuple(layer for layer in layers if layer.role != VITAL or layer.name not in self._traits.uncalled)

    def _untied_head(self) -> str:
        """The prefix of the output head's names, if entering the model does without it; else nothing."""
        head, embeddings = self._model.get_output_embeddings(), self._model.get_input_embeddings()
        if head is None or head.weight is embeddings.weight:
            return ""
        return next(name for name, module in self._model.named_modules() if module is head) + "."


def _cached_numbers(layers: Sequence[LayerInfo]) -> int:
    """Keys and values of a token in a block; 0: its layers do not say."""
    return sum(layer.rows for layer in layers if layer.role in ("k", "v")) or sum(
        layer.rows for layer in layers if layer.role == "qkv"
    )


def _find_blocks(model: PreTrainedModel, num_blocks: int) -> tuple[str, Iterable[nn.Module]]:
    """The name of the block list and the blocks: of the language model's lists of that length, the heaviest."""
    if num_blocks < 1:
        raise UsageError(f"this {type(model).__name__} has no blocks: its config.json says {num_blocks}")
    tower = text_tower(model)
    lists = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_blocks and name.startswith(tower)
    }
    if not lists:
        raise UsageError(f"{type(model).__name__} has no list of {num_blocks} blocks: this family cannot be pruned")
    name = max(lists, key=lists.__getitem__)
    return name, model.get_submodule(name)
