"""Segment Anything, one block of its image encoder at a time. Meta's own modules compute; weights stay on disk.

S: pixels on a side.    G: patches on a side.    C: channels of the encoder.    D: channels of the image embedding.
Prompt encoder and mask decoder are never pruned.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import IO, Any

import torch
from torch import Tensor, nn

from stages.errors import ResourceError, UsageError
from stages.formats.checkpoint_files import WeightFiles
from stages.models.base import BlockCall, Entry, ModelFolder, Part
from stages.models.companion_files import exported_companions, exported_config
from stages.models.meta_init import require_materialised, require_plain
from stages.models.sam.checkpoint import META_CHECKPOINT, preprocessor_config
from stages.models.sam.modules import SamSizes, build_image_encoder, build_sam, sam_sizes
from stages.models.sam.names import BLOCKS, FOLDER_POSITIONS, folder_name
from stages.models.stored_model import StoredModel

_CALL = BlockCall((), {})


class SamEncoder(StoredModel["SamEnds"]):
    """A `stages.models.base.BlockModel`: the image encoder, and what its embedding is for."""

    name = "sam"
    task = "vision"
    vocab_size = 0
    has_other_forms = True
    _blocks_path = BLOCKS

    def __init__(self, folder: ModelFolder) -> None:
        """Raises UsageError for a configuration that is not of Meta's form, ResourceError for missing weights."""
        try:
            self._config: dict[str, Any] = json.loads((folder.path / "config.json").read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"{folder.name}: its config.json cannot be read ({error})") from error
        self.sizes: SamSizes = sam_sizes(self._config, folder.name)
        super().__init__(folder, WeightFiles(folder.path))
        with torch.device("meta"):
            self._encoder = build_image_encoder(self.sizes).requires_grad_(False)
        self._blocks = tuple(self._encoder.blocks)  # type: ignore[arg-type]
        self.num_blocks = len(self._blocks)
        self.hidden_size = self.sizes.embed_dim
        self.max_positions: int | None = self.sizes.grid**2
        # Attention is written out: scores, positions added, and their softmax.
        self.attention_numbers = 3 * self.sizes.num_heads * self.sizes.grid**4
        self.fixed_tokens: int | None = self.sizes.grid**2
        self.input_bytes_per_token = 3 * self.sizes.patch_size**2 * 4  # fp32
        self._layers = tuple(self._linear_layers(index) for index in range(self.num_blocks))
        self._stored = self._match_weights()

    def hidden_shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        return (self.sizes.grid, self.sizes.grid, self.sizes.embed_dim)

    def run_block(self, block: nn.Module, hidden: Tensor, call: BlockCall) -> Tensor:
        out: Tensor = block(hidden)
        return out

    def _read_ends(self, device: torch.device, part: Part) -> SamEnds:
        with torch.device("meta"):
            sam: Any = build_sam(self.sizes)
        sam.image_encoder.blocks = nn.ModuleList()
        if part == "enter":
            sam.image_encoder.neck = sam.prompt_encoder = sam.mask_decoder = nn.Identity()
        state = {name: self.weights.load(self._stored[name], torch.float32, device) for name in sam.state_dict()}
        sam.load_state_dict(state, strict=True, assign=True)
        sam.to(device).eval().requires_grad_(False)
        require_materialised(sam, self.source.name)
        return SamEnds(sam, self.num_blocks)

    def unused_weights(self) -> tuple[str, ...]:
        used = {*self._stored.values(), *FOLDER_POSITIONS}
        return tuple(key for key in self.weights.keys if key not in used)

    def export_extras(self, requested_dtype: str) -> Iterator[tuple[str, bytes]]:
        extras = {
            "preprocessor_config.json": preprocessor_config(self.sizes),
            **dict(exported_companions(self.source.path)),
            "config.json": exported_config(self._config, requested_dtype),
        }
        yield from sorted(extras.items())

    def other_forms(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Callable[[IO[bytes]], None]]]:
        """The checkpoint that `segment_anything.sam_model_registry` opens."""

        def write(file: IO[bytes]) -> None:
            torch.save({name: tensors[key].contiguous() for name, key in self._stored.items()}, file)

        yield META_CHECKPOINT, write

    def _match_weights(self) -> dict[str, str]:
        """For each weight under Meta's name, its name in the files."""
        found, missing = {}, []
        for name, tensor in self._whole.state_dict().items():
            folder = folder_name(name, self.sizes.iou_head_depth)
            candidates = FOLDER_POSITIONS if folder in FOLDER_POSITIONS else (folder,)
            key = next((candidate for candidate in candidates if candidate in self.weights), None)
            if key is None:
                missing.append(folder)
                continue
            if tuple(tensor.shape) != self.weights.shape(key):
                raise UsageError(
                    f"{self.source.path}: {key} has shape {self.weights.shape(key)}, its config.json asks for "
                    f"{tuple(tensor.shape)}"
                )
            require_plain(self.weights, key, self.source.path)
            found[name] = key
        beyond = folder_name(f"{BLOCKS}.{self.num_blocks}.attn.qkv.weight", self.sizes.iou_head_depth)
        if beyond in self.weights:
            raise UsageError(
                f"{self.source.path} holds more blocks than the {self.num_blocks} of its config.json: they belong to "
                "two different models"
            )
        if missing:
            raise ResourceError(
                f"{self.source.path} lacks {len(missing)} weights of a Segment Anything model, {missing[0]} among them"
            )
        return found

    @cached_property
    def _whole(self) -> nn.Module:
        with torch.device("meta"):
            return build_sam(self.sizes)


class SamEnds:
    """A `stages.models.base.Ends`: patches in, image embedding out, and prompts to masks."""

    def __init__(self, sam: nn.Module, num_blocks: int) -> None:
        self._sam: Any = sam
        self._num_blocks = num_blocks

    def enter(self, inputs: Tensor) -> Entry:
        """inputs: preprocessed pixels (N, 3, S, S). The hidden state is (N, G, G, C)."""
        encoder = self._sam.image_encoder
        hidden = encoder.patch_embed(inputs) + encoder.pos_embed
        return Entry(hidden, (_CALL,) * self._num_blocks)

    def leave(self, inputs: Tensor, hidden: Tensor) -> Tensor:
        """The image embedding (N, D, G, G) of the last block's output (N, G, G, C)."""
        embedding: Tensor = self._sam.image_encoder.neck(hidden.permute(0, 3, 1, 2))
        return embedding

    def masks(self, embedding: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        """Multimask output for single points: logits (P, 3, 4G, 4G) and predicted quality (P, 3).

        embedding: (1, D, G, G) of one image. points: (P, 2), x and y in pixels of the resized image, all inside
        what they ask for. As `SamPredictor.predict_torch` computes it.
        """
        labels = torch.ones(len(points), 1, dtype=torch.int, device=points.device)
        sparse, dense = self._sam.prompt_encoder(points=(points[:, None], labels), boxes=None, masks=None)
        logits, quality = self._sam.mask_decoder(
            image_embeddings=embedding,
            image_pe=self._sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )
        return logits, quality

    def best_masks(
        self,
        embedding: Tensor,
        points: Sequence[tuple[float, float]],
        input_size: tuple[int, int],
        original_size: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        """For each point the mask of the best predicted quality, (P, H, W) bool on the CPU, and that quality (P,).

        points: x and y in pixels of the image itself. Sizes are (height, width): of the resized image, of the image.
        """
        scale = torch.tensor([input_size[1] / original_size[1], input_size[0] / original_size[0]], dtype=torch.float64)
        where = (torch.tensor(points, dtype=torch.float64) * scale).float().to(embedding.device)
        logits, quality = self.masks(embedding, where)
        best = quality.argmax(dim=1)
        rows = torch.arange(len(points), device=embedding.device)
        full = self._sam.postprocess_masks(logits[rows, best][:, None], input_size, original_size)
        return (full[:, 0] > 0).cpu(), quality[rows, best].cpu()
