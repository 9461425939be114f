"""Meta's Segment Anything modules, built to the sizes that a `SamModel` configuration states.

Source: Kirillov et al. 2023, package `segment_anything`; the configuration is transformers' `SamConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from stages.errors import UsageError

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class SamSizes:
    """What decides the modules of a Segment Anything model."""

    image_size: int  # pixels on the longest side, padded to a square
    patch_size: int
    embed_dim: int  # channels of the image encoder
    depth: int
    num_heads: int
    mlp_dim: int
    window_size: int
    global_attn_indexes: tuple[int, ...]
    prompt_dim: int  # channels of the image embedding, the prompts and the decoder
    decoder_depth: int
    decoder_heads: int
    decoder_mlp_dim: int
    iou_head_depth: int
    iou_head_hidden_dim: int
    mask_in_chans: int
    num_multimask_outputs: int
    decoder_norm_eps: float  # Meta's is 1e-5; transformers' configurations say 1e-6

    def __post_init__(self) -> None:
        """Raises UsageError for sizes that no model has."""
        for name, value in asdict(self).items():
            least = 0 if name == "window_size" else 1
            if name == "decoder_norm_eps":
                fits = isinstance(value, float) and 0 < value < 1
            elif name == "global_attn_indexes":
                fits = all(type(index) is int for index in value)
            else:
                fits = type(value) is int and least <= value <= _LARGEST
            if not fits:
                raise UsageError(f"no Segment Anything model has {name} = {value!r}")
        parts = {
            "image_size by patch_size": self.image_size % self.patch_size,
            "embed_dim by num_heads": self.embed_dim % self.num_heads,
            "prompt_dim by 8": self.prompt_dim % 8,
            "half of prompt_dim by decoder_heads": self.prompt_dim // 2 % self.decoder_heads,
        }
        uneven = [what for what, rest in parts.items() if rest]
        if uneven:
            raise UsageError(f"no Segment Anything model has such sizes: {uneven[0]} does not come out even")

    @property
    def grid(self) -> int:
        """Patches on a side."""
        return self.image_size // self.patch_size

    def config(self) -> dict[str, Any]:
        """As the `config.json` of a `SamModel` folder."""
        return {
            "architectures": ["SamModel"],
            "model_type": "sam",
            "vision_config": {
                "model_type": "sam_vision_model",
                "hidden_size": self.embed_dim,
                "output_channels": self.prompt_dim,
                "num_hidden_layers": self.depth,
                "num_attention_heads": self.num_heads,
                "image_size": self.image_size,
                "patch_size": self.patch_size,
                "mlp_dim": self.mlp_dim,
                "mlp_ratio": self.mlp_dim / self.embed_dim,
                "window_size": self.window_size,
                "global_attn_indexes": list(self.global_attn_indexes),
                "num_pos_feats": self.prompt_dim // 2,
                "layer_norm_eps": 1e-6,
                "hidden_act": "gelu",
                "qkv_bias": True,
                "use_abs_pos": True,
                "use_rel_pos": True,
            },
            "prompt_encoder_config": {
                "hidden_size": self.prompt_dim,
                "image_size": self.image_size,
                "patch_size": self.patch_size,
                "mask_input_channels": self.mask_in_chans,
                "num_point_embeddings": 4,
            },
            "mask_decoder_config": {
                "hidden_size": self.prompt_dim,
                "mlp_dim": self.decoder_mlp_dim,
                "num_hidden_layers": self.decoder_depth,
                "num_attention_heads": self.decoder_heads,
                "attention_downsample_rate": 2,
                "num_multimask_outputs": self.num_multimask_outputs,
                "iou_head_depth": self.iou_head_depth,
                "iou_head_hidden_dim": self.iou_head_hidden_dim,
                "layer_norm_eps": self.decoder_norm_eps,
            },
        }


def sam_sizes(config: Mapping[str, Any], name: str = "the model") -> SamSizes:
    """The sizes that a `config.json` states. Raises UsageError for forms that Meta's modules do not have."""
    parts = [config.get(f"{part}_config") or {} for part in ("vision", "prompt_encoder", "mask_decoder")]
    if not all(isinstance(part, Mapping) for part in parts):
        raise UsageError(f"{name}: its config.json describes no Segment Anything model")
    defaults = (_VISION_DEFAULTS, _PROMPT_DEFAULTS, _DECODER_DEFAULTS)
    vision, prompt, decoder = ({**usual, **part} for usual, part in zip(defaults, parts, strict=True))
    fixed = {"qkv_bias": True, "use_abs_pos": True, "use_rel_pos": True, "hidden_act": "gelu", "num_channels": 3}
    odd = [f"{key} = {vision[key]}" for key, value in fixed.items() if vision[key] != value]
    if decoder["attention_downsample_rate"] != 2:
        odd.append(f"attention_downsample_rate = {decoder['attention_downsample_rate']}")
    same = {
        "vision_config.layer_norm_eps": (vision["layer_norm_eps"], 1e-6),
        "mask_decoder_config.hidden_act": (decoder["hidden_act"], "relu"),
        "mask_decoder_config.hidden_size": (decoder["hidden_size"], vision["output_channels"]),
        "prompt_encoder_config.hidden_act": (prompt["hidden_act"], "gelu"),
        "prompt_encoder_config.hidden_size": (prompt["hidden_size"], vision["output_channels"]),
    }
    odd += [f"{key} = {found}" for key, (found, needed) in same.items() if found != needed]
    if not isinstance(vision["image_size"], int) or not isinstance(vision["patch_size"], int):
        odd.append("images that are no squares")
    if odd:
        raise UsageError(f"{name} is no Segment Anything model of Meta's form: {', '.join(odd)}")
    return SamSizes(
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        embed_dim=vision["hidden_size"],
        depth=vision["num_hidden_layers"],
        num_heads=vision["num_attention_heads"],
        mlp_dim=vision["mlp_dim"] or _product(vision["hidden_size"], vision["mlp_ratio"]),
        window_size=vision["window_size"],
        global_attn_indexes=tuple(vision["global_attn_indexes"] or ()),
        prompt_dim=vision["output_channels"],
        decoder_depth=decoder["num_hidden_layers"],
        decoder_heads=decoder["num_attention_heads"],
        decoder_mlp_dim=decoder["mlp_dim"],
        iou_head_depth=decoder["iou_head_depth"],
        iou_head_hidden_dim=decoder["iou_head_hidden_dim"],
        mask_in_chans=prompt["mask_input_channels"],
        num_multimask_outputs=decoder["num_multimask_outputs"],
        decoder_norm_eps=decoder["layer_norm_eps"],
    )


def _product(left: Any, right: Any) -> Any:
    """A width, where both are numbers; `SamSizes` refuses what comes back otherwise."""
    numbers = isinstance(left, int | float) and isinstance(right, int | float)
    return int(left * right) if numbers else None


_LARGEST = 100_000
_VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "output_channels": 256,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 1024,
    "patch_size": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
    "mlp_ratio": 4.0,
    "mlp_dim": None,
    "use_abs_pos": True,
    "use_rel_pos": True,
    "window_size": 14,
    "global_attn_indexes": (2, 5, 8, 11),
}
_PROMPT_DEFAULTS: dict[str, Any] = {"mask_input_channels": 16, "hidden_size": 256, "hidden_act": "gelu"}
_DECODER_DEFAULTS: dict[str, Any] = {
    "hidden_size": 256,
    "hidden_act": "relu",
    "mlp_dim": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "attention_downsample_rate": 2,
    "num_multimask_outputs": 3,
    "iou_head_depth": 3,
    "iou_head_hidden_dim": 256,
    "layer_norm_eps": 1e-6,
}


def meta_sizes(depth: int, embed_dim: int, num_heads: int, global_attn_indexes: tuple[int, ...]) -> SamSizes:
    """The sizes of Meta's three models, which differ in the image encoder alone."""
    return SamSizes(
        image_size=1024,
        patch_size=16,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        mlp_dim=4 * embed_dim,
        window_size=14,
        global_attn_indexes=global_attn_indexes,
        prompt_dim=256,
        decoder_depth=2,
        decoder_heads=8,
        decoder_mlp_dim=2048,
        iou_head_depth=3,
        iou_head_hidden_dim=256,
        mask_in_chans=16,
        num_multimask_outputs=3,
        decoder_norm_eps=1e-5,
    )


META_SIZES = {
    "vit_b": meta_sizes(12, 768, 12, (2, 5, 8, 11)),
    "vit_l": meta_sizes(24, 1024, 16, (5, 11, 17, 23)),
    "vit_h": meta_sizes(32, 1280, 16, (7, 15, 23, 31)),
}


def build_sam(sizes: SamSizes) -> nn.Module:
    """A `segment_anything.modeling.Sam`, in eval mode, with random weights.

    Under `torch.device("meta")` only its pixel statistics hold numbers.
    """
    from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    grid = (sizes.grid, sizes.grid)
    sam = Sam(
        image_encoder=build_image_encoder(sizes),
        prompt_encoder=PromptEncoder(
            embed_dim=sizes.prompt_dim,
            image_embedding_size=grid,
            input_image_size=(sizes.image_size, sizes.image_size),
            mask_in_chans=sizes.mask_in_chans,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=sizes.num_multimask_outputs,
            transformer=TwoWayTransformer(
                depth=sizes.decoder_depth,
                embedding_dim=sizes.prompt_dim,
                mlp_dim=sizes.decoder_mlp_dim,
                num_heads=sizes.decoder_heads,
            ),
            transformer_dim=sizes.prompt_dim,
            iou_head_depth=sizes.iou_head_depth,
            iou_head_hidden_dim=sizes.iou_head_hidden_dim,
        ),
        pixel_mean=list(PIXEL_MEAN),
        pixel_std=list(PIXEL_STD),
    )
    for layer in sam.mask_decoder.transformer.layers:
        for norm in (layer.norm1, layer.norm2, layer.norm3, layer.norm4):
            norm.eps = sizes.decoder_norm_eps
    for name, values in (("pixel_mean", PIXEL_MEAN), ("pixel_std", PIXEL_STD)):
        sam.register_buffer(name, torch.tensor(values, device="cpu").view(-1, 1, 1), persistent=False)
    return sam.eval()


def build_image_encoder(sizes: SamSizes) -> nn.Module:
    """A `segment_anything.modeling.ImageEncoderViT` with random weights."""
    from segment_anything.modeling import ImageEncoderViT

    return ImageEncoderViT(
        depth=sizes.depth,
        embed_dim=sizes.embed_dim,
        img_size=sizes.image_size,
        mlp_ratio=sizes.mlp_dim / sizes.embed_dim,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        num_heads=sizes.num_heads,
        patch_size=sizes.patch_size,
        qkv_bias=True,
        use_rel_pos=True,
        global_attn_indexes=sizes.global_attn_indexes,
        window_size=sizes.window_size,
        out_chans=sizes.prompt_dim,
    ).eval()
