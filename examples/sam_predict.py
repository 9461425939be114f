"""Ask two Segment Anything models, dense and pruned, for the object at a point, and draw both answers side by side.

    python examples/sam_predict.py examples/sam-tiny runs/sam-tiny-s70-lamp/model --out masks.png
    python examples/sam_predict.py facebook/sam-vit-base RUN/model --image photo.jpg --point 320,200 --out masks.png

Any folders or names that transformers' SamModel opens will do, and more than two. Without --image, a drawn scene is
shown, with the mask that was drawn beside the answers.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from drawn_scenes import UNSEEN, draw
from PIL import Image, ImageDraw, ImageFont
from transformers import SamModel, SamProcessor

from stages.metrics.mask_geometry import interior_point, mask_iou

SHOWN = 384  # pixels on the longest side of a panel
TINT = np.array([30, 144, 255])


@dataclass(frozen=True)
class Question:
    image: np.ndarray  # (height, width, 3) uint8
    point: tuple[float, float]  # x, y
    mask: np.ndarray | None  # what was drawn, if that is known


@torch.no_grad()
def answer(folder: str, question: Question) -> np.ndarray:
    """The mask (height, width) bool of the best predicted quality."""
    processor = SamProcessor.from_pretrained(folder)
    model = SamModel.from_pretrained(folder, dtype=torch.float32).eval()  # whatever the weights are stored in
    inputs = processor(question.image, input_points=[[list(question.point)]], return_tensors="pt")
    found = model(**inputs, multimask_output=True)
    sizes = (inputs["original_sizes"], inputs["reshaped_input_sizes"])
    side = processor.image_processor.pad_size
    masks = processor.image_processor.post_process_masks(found.pred_masks, *sizes, pad_size=side)
    best = int(found.iou_scores[0, 0].argmax())
    mask: np.ndarray = masks[0][0, best].numpy()
    return mask


def panel(question: Question, mask: np.ndarray | None, title: str) -> Image.Image:
    """The picture with a mask laid over it, the point, and a line of text above."""
    pixels = question.image.astype(float)
    if mask is not None:
        pixels[mask] = 0.45 * pixels[mask] + 0.55 * TINT
        edge = mask & ~_eroded(mask)
        pixels[edge] = 255
    height, width = question.image.shape[:2]
    scale = SHOWN / max(height, width)
    size = (round(width * scale), round(height * scale))
    picture = Image.fromarray(pixels.astype(np.uint8)).resize(size, Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (size[0], size[1] + 34), "white")
    canvas.paste(picture, (0, 34))
    pen = ImageDraw.Draw(canvas)
    pen.text((4, 6), title, fill="black", font=ImageFont.load_default(18))
    x, y = (question.point[0] + 0.5) * scale, (question.point[1] + 0.5) * scale + 34
    pen.ellipse((x - 6, y - 6, x + 6, y + 6), fill="red", outline="white", width=2)
    return canvas


def _eroded(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    inner: np.ndarray = padded[1:-1, :-2] & padded[1:-1, 2:] & padded[:-2, 1:-1] & padded[2:, 1:-1] & mask
    return inner


def row(folders: list[str], titles: list[str], question: Question) -> Image.Image:
    """The question, what was drawn, and every model's answer, side by side."""
    panels = [panel(question, question.mask, "drawn" if question.mask is not None else "the point")]
    for folder, title in zip(folders, titles, strict=True):
        mask = answer(folder, question)
        score = f", IoU {mask_iou(mask, question.mask):.2f}" if question.mask is not None else ""
        panels.append(panel(question, mask, f"{title}{score}"))
    return _beside(panels, 8)


def _beside(panels: list[Image.Image], gap: int) -> Image.Image:
    width = sum(p.width for p in panels) + gap * (len(panels) - 1)
    whole = Image.new("RGB", (width, max(p.height for p in panels)), "white")
    x = 0
    for one in panels:
        whole.paste(one, (x, 0))
        x += one.width + gap
    return whole


def questions(options: argparse.Namespace) -> list[Question]:
    if options.image is not None:
        if options.point is None:
            raise SystemExit("--image needs --point X,Y")
        x, _, y = options.point.partition(",")
        image = np.asarray(Image.open(options.image).convert("RGB"))
        return [Question(image, (float(x), float(y)), None)]
    asked = []
    for number in range(options.scene, options.scene + options.scenes):
        scene = draw(UNSEEN + number)
        mask = max(scene.masks, key=np.count_nonzero)
        asked.append(Question(scene.image, interior_point(mask), mask))
    return asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders or hub names: the dense model, then pruned ones")
    parser.add_argument("--titles", help="one for each model, between commas")
    parser.add_argument("--image", type=Path)
    parser.add_argument("--point", metavar="X,Y", help="in pixels of the image")
    parser.add_argument("--scene", type=int, default=0, help="which drawn scene comes first")
    parser.add_argument("--scenes", type=int, default=3, help="how many drawn scenes")
    parser.add_argument("--out", type=Path, default=Path("masks.png"))
    options = parser.parse_args()
    names = ["dense", *("pruned" for _ in options.models[1:])]
    titles = options.titles.split(",") if options.titles else names
    if len(titles) != len(options.models):
        raise SystemExit(f"--titles has {len(titles)} names for {len(options.models)} models")
    rows = [row(options.models, titles, question) for question in questions(options)]
    whole = Image.new("RGB", (max(r.width for r in rows), sum(r.height for r in rows)), "white")
    y = 0
    for one in rows:
        whole.paste(one, (0, y))
        y += one.height
    options.out.parent.mkdir(parents=True, exist_ok=True)
    whole.save(options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
