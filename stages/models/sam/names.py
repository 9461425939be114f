"""What the weights of a Segment Anything model are called: in Meta's checkpoints and in `SamModel` folders.

The numbers are the same; only names differ, and the folder holds the positions' frequencies under a second name.
"""

from __future__ import annotations

import re

# In the order in which they are tried on every name.
_RENAMED = (
    (r"^image_encoder\.neck\.0\.", "vision_encoder.neck.conv1."),
    (r"^image_encoder\.neck\.1\.", "vision_encoder.neck.layer_norm1."),
    (r"^image_encoder\.neck\.2\.", "vision_encoder.neck.conv2."),
    (r"^image_encoder\.neck\.3\.", "vision_encoder.neck.layer_norm2."),
    (r"^image_encoder\.patch_embed\.proj\.", "vision_encoder.patch_embed.projection."),
    (r"^image_encoder\.blocks\.", "vision_encoder.layers."),
    (r"^image_encoder\.", "vision_encoder."),
    (r"^mask_decoder\.output_upscaling\.0\.", "mask_decoder.upscale_conv1."),
    (r"^mask_decoder\.output_upscaling\.1\.", "mask_decoder.upscale_layer_norm."),
    (r"^mask_decoder\.output_upscaling\.3\.", "mask_decoder.upscale_conv2."),
    (r"^prompt_encoder\.mask_downscaling\.0\.", "prompt_encoder.mask_embed.conv1."),
    (r"^prompt_encoder\.mask_downscaling\.1\.", "prompt_encoder.mask_embed.layer_norm1."),
    (r"^prompt_encoder\.mask_downscaling\.3\.", "prompt_encoder.mask_embed.conv2."),
    (r"^prompt_encoder\.mask_downscaling\.4\.", "prompt_encoder.mask_embed.layer_norm2."),
    (r"^prompt_encoder\.mask_downscaling\.6\.", "prompt_encoder.mask_embed.conv3."),
    (r"^prompt_encoder\.point_embeddings\.", "prompt_encoder.point_embed."),
    (r"\.norm(\d|_final_attn)\.", r".layer_norm\1."),
)
META_POSITIONS = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
# A folder may hold either or both: transformers ties them.
FOLDER_POSITIONS = (
    "shared_image_embedding.positional_embedding",
    "prompt_encoder.shared_embedding.positional_embedding",
)
_PERCEPTRON = re.compile(
    r"^(mask_decoder\.(?:iou_prediction_head|output_hypernetworks_mlps\.\d+))\.layers\.(\d+)\.(.*)$"
)
BLOCKS = "image_encoder.blocks"


def folder_name(meta_name: str, iou_head_depth: int) -> str:
    """The name in a `SamModel` folder of a weight of Meta's checkpoint."""
    if meta_name == META_POSITIONS:
        return FOLDER_POSITIONS[0]
    perceptron = _PERCEPTRON.match(meta_name)
    if perceptron is not None:
        head, layer, rest = perceptron[1], int(perceptron[2]), perceptron[3]
        last = (iou_head_depth if head.endswith("iou_prediction_head") else 3) - 1
        place = "proj_in" if layer == 0 else "proj_out" if layer == last else f"layers.{layer - 1}"
        return f"{head}.{place}.{rest}"
    for pattern, replacement in _RENAMED:
        meta_name = re.sub(pattern, replacement, meta_name)
    return meta_name
