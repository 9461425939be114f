"""Every decoder-only language model of Hugging Face, by one code path.

The model lives on `meta`; its blocks are replaced by recorders, so that the model's own forward tells what each
block gets; a block's weights are read when it is its turn.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import IO

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.pytorch_utils import Conv1D

from stages.errors import UsageError
from stages.formats.checkpoint_files import WeightFiles, match_names
from stages.models.architecture import AbsentTower, build_empty, other_towers, text_tower
from stages.models.base import BlockCall, LayerInfo, ModelFolder, Part, Weights
from stages.models.block_inputs import CachedBlockInputs
from stages.models.companion_files import companion_files, exported_config
from stages.models.decoder_ends import DecoderEnds, put_recorders
from stages.models.layer_roles import VITAL, role_of
from stages.models.meta_init import copied, materialised, require_materialised, require_plain
from stages.models.probe import probed
from stages.models.recorder import Tape

# Blocks whose linear layers hold less of their matrix weights than this are refused: the rest would stay dense.
_SMALLEST_SHARE = 0.95


def open_model(folder: ModelFolder) -> Decoder:
    """The model in `folder`, with no weight read yet.

    Raises UsageError for what is no decoder-only language model, is quantized, or has weights in its blocks
    that no pruner here could reach.
    """
    model = build_empty(folder)
    return Decoder(folder, model, WeightFiles(folder.path))


class Decoder:
    """A `stages.models.base.BlockModel`. Build one with `open_model`."""

    task = "language"
    fixed_tokens: int | None = None
    input_bytes_per_token = 8  # token ids
    attention_numbers = 0
    has_other_forms = False

    def __init__(self, folder: ModelFolder, model: PreTrainedModel, files: Weights) -> None:
        """Wrap a model that has no weights yet.

        Args:
            folder: Where the model comes from.
            model: On `meta`, built inside `without_weights`; it becomes part of the decoder.
            files: The weights, by their names in the model's own files.
        """
        config = model.config.get_text_config()
        self.source, self.config, self.weights = folder, config, files
        model.eval().requires_grad_(False)
        model.tie_weights()
        self._model = model
        self.name: str = config.model_type
        self._towers = other_towers(model)
        self._list_name, blocks = _find_blocks(model, config.num_hidden_layers)
        self._blocks = tuple(blocks)
        self.num_blocks = len(self._blocks)
        self.vocab_size = len(model.get_input_embeddings().weight)
        self.max_positions: int | None = getattr(config, "max_position_embeddings", None)
        self._layers = tuple(self._find_layers(index) for index in range(self.num_blocks))
        for index in range(self.num_blocks):
            self._require_reachable(index)
        self._stored = self._match_weights()
        self._require_own_weights()
        self._traits = probed(copy.deepcopy(self._skeleton), self._list_name, self._blocks, folder.name)
        self.hidden_size = self._traits.layout.width
        self._layers = tuple(self._without_uncalled(layers) for layers in self._layers)
        self._ends: tuple[torch.device, Part, DecoderEnds] | None = None
        self._calls: dict[torch.device, CachedBlockInputs] = {}

    # -- what is in it

    @property
    def blocks_path(self) -> str:
        """Where the list of blocks is in the model: "model.layers"."""
        return self._list_name

    def hidden_shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*input_shape, self.hidden_size)

    def layers(self, block_index: int) -> tuple[LayerInfo, ...]:
        return self._layers[block_index]

    def stored_names(self, block_index: int) -> dict[str, str]:
        prefix = self._prefix(block_index)
        return {name: self._stored.get(prefix + name, prefix + name) for name in self._blocks[block_index].state_dict()}

    def entry_sizes(self, block_index: int) -> dict[str, int]:
        return {name: tensor.numel() for name, tensor in self._blocks[block_index].state_dict().items()}

    def original_dtypes(self, block_index: int) -> dict[str, torch.dtype]:
        state = self._blocks[block_index].state_dict()
        return {
            name: self.weights.dtype(key) if key in self.weights else state[name].dtype
            for name, key in self.stored_names(block_index).items()
        }

    # -- blocks

    def load_block(
        self,
        block_index: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        state: Mapping[str, Tensor] | None = None,
    ) -> nn.Module:
        if state is None:
            state = {
                name: self.weights.load(key, dtype, device)
                for name, key in self.stored_names(block_index).items()
                if key in self.weights
            }
        else:
            state = {name: copied(tensor, dtype, device) for name, tensor in state.items()}
        return materialised(self._blocks[block_index], state, device, block_index, self.source.name)

    def run_block(self, block: nn.Module, hidden: Tensor, call: BlockCall) -> Tensor:
        return self._traits.layout.run(block, hidden, call)

    def weight_matrix(self, layer: nn.Module) -> Tensor:
        weight: Tensor = layer.weight  # type: ignore[assignment]
        return weight.T if isinstance(layer, Conv1D) else weight

    @torch.no_grad()
    def set_weight_matrix(self, layer: nn.Module, weight: Tensor) -> None:
        self.weight_matrix(layer).copy_(weight)

    # -- what lies around the blocks

    def calls(self, device: torch.device) -> CachedBlockInputs:
        if device not in self._calls:
            self._calls[device] = CachedBlockInputs(lambda: self.load_ends(device, "enter"), self._drop_ends)
        return self._calls[device]

    def _drop_ends(self) -> None:
        self._ends = None

    def load_ends(self, device: torch.device, part: Part = "all") -> DecoderEnds:
        """The last instance is kept until somebody has no more use for it: it holds the embeddings."""
        if self._ends is not None and self._ends[0] == device and self._ends[1] in (part, "all"):
            return self._ends[2]
        self._ends = None
        skeleton = copy.deepcopy(self._skeleton)
        head = "" if part != "enter" else self._untied_head()
        state: dict[str, Tensor] = {}
        for names, stored in self._outside:
            if not (head and all(name.startswith(head) for name in names)):
                tensor = self.weights.load(stored, torch.float32, device)
                state.update(dict.fromkeys(names, tensor))
        skeleton.load_state_dict(state, strict=False, assign=True)
        skeleton.tie_weights()
        tape = Tape(self._traits.returns)
        put_recorders(skeleton, self._list_name, self._blocks, tape)
        ends = DecoderEnds(skeleton, self._traits.layout, tape, self.num_blocks)
        for name, module in skeleton.named_modules():
            if not (head and (name + ".").startswith(head)):
                require_materialised(module, f"{name} of {self.source.name}", recurse=False)
                for key, buffer in module.named_buffers(recurse=False):
                    setattr(module, key, buffer.to(device))
        self._ends = (device, part, ends)
        return ends

    def unused_weights(self) -> tuple[str, ...]:
        used = set(self._stored.values())
        return tuple(key for key in self.weights.keys if key not in used)

    def export_extras(self, requested_dtype: str) -> Iterator[tuple[str, bytes]]:
        settings = json.loads((self.source.path / "config.json").read_text())
        yield "config.json", exported_config(settings, requested_dtype)
        yield from ((name, contents) for name, contents in companion_files(self.source.path) if name != "config.json")

    def other_forms(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Callable[[IO[bytes]], None]]]:
        yield from ()

    # -- inside

    def _prefix(self, block_index: int) -> str:
        return f"{self._list_name}.{block_index}."

    @cached_property
    def _skeleton(self) -> PreTrainedModel:
        """The model on `meta` with nothing where its blocks, and its towers for other inputs, were."""
        blocks = self._model.get_submodule(self._list_name)
        self._model.set_submodule(self._list_name, nn.ModuleList())
        try:
            skeleton = copy.deepcopy(self._model)
        finally:
            self._model.set_submodule(self._list_name, blocks)
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
            if not name.startswith(f"{self._list_name}."):
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
        state = self._model.state_dict(keep_vars=True)
        renamings = [t for t in get_model_conversion_mapping(self._model) if isinstance(t, WeightRenaming)]
        matched = match_names(self.weights.keys, state, renamings, self._model.base_model_prefix)
        # What text does not pass is exported as it is, whatever it is.
        towers = tuple(f"{tower}." for tower in self._towers)
        state = {name: tensor for name, tensor in state.items() if not name.startswith(towers)}
        stored = {name: key for name, key in matched.items() if name in state}
        found = {id(state[name]) for name in stored}
        missing = [name for name, tensor in state.items() if tensor.is_meta and id(tensor) not in found]
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
        return stored

    def _find_layers(self, block_index: int) -> tuple[LayerInfo, ...]:
        infos = []
        for path, module in self._blocks[block_index].named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                rows, cols = self.weight_matrix(module).shape
                name = self._prefix(block_index) + path
                infos.append(LayerInfo(name, path, role_of(path), rows, cols, isinstance(module, Conv1D)))
        return tuple(infos)

    def _without_uncalled(self, layers: tuple[LayerInfo, ...]) -> tuple[LayerInfo, ...]:
        """The layers but small ones whose input no pruner can see (dt_proj of Mamba): they stay dense."""
        return tuple(layer for layer in layers if layer.role != VITAL or layer.name not in self._traits.uncalled)

    def _require_reachable(self, block_index: int) -> None:
        block, paths = self._blocks[block_index], {layer.path for layer in self._layers[block_index]}
        matrices = {name: p.numel() for name, p in block.named_parameters() if p.ndim >= 2}
        others = {name: size for name, size in matrices.items() if name.rpartition(".")[0] not in paths}
        total = sum(matrices.values())
        if total == 0 or total - sum(others.values()) < _SMALLEST_SHARE * total:
            share = 1 - sum(others.values()) / total if total else 0.0
            largest = max(others, key=others.__getitem__) if others else "none"
            raise UsageError(
                f"{self.source.name}: only {share:.0%} of the matrix weights of block {block_index} lie in linear "
                f"layers (the largest that does not: {largest}); such models, mixtures of experts among them, "
                "cannot be pruned"
            )

    def _untied_head(self) -> str:
        """The prefix of the output head's names, if entering the model does without it; else nothing."""
        head, embeddings = self._model.get_output_embeddings(), self._model.get_input_embeddings()
        if head is None or head.weight is embeddings.weight:
            return ""
        return next(name for name, module in self._model.named_modules() if module is head) + "."


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
