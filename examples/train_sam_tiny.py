"""Train sam-tiny, the small Segment Anything that lies in examples/sam-tiny, from nothing, on drawn scenes.

    python examples/train_sam_tiny.py                    # hours on one core; writes examples/sam-tiny
    python examples/train_sam_tiny.py --steps 200 --out /tmp/try

It has every part of Meta's: window and global attention with relative positions, the whole prompt encoder and mask
decoder; only sizes differ (128 pixels, patches of 8, 3.4 million weights). Stopped, it goes on at its last checkpoint.

What makes it learn in hours, where SAM's own recipe stands still for thousands of steps:
- an auxiliary loss on the image embedding alone: the patch under the point must resemble the patches of its mask.
  The encoder learns to group at once, while the decoder is still of no use to it; the loss fades away later.
- cross entropy and dice on every mask at first, then only on the best of three, as SAM does.
- ten points an image, since the decoder costs little.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from drawn_scenes import SIZE, UNSEEN, Scene, draw
from scipy.ndimage import distance_transform_edt
from torch import Tensor, nn
from torch.nn import functional

from stages.models.sam.checkpoint import write_folder
from stages.models.sam.modules import SamSizes, build_sam

SIZES = SamSizes(
    image_size=SIZE,
    patch_size=8,
    embed_dim=160,
    depth=8,
    num_heads=5,
    mlp_dim=640,
    window_size=6,
    global_attn_indexes=(1, 3, 5, 7),
    prompt_dim=128,
    decoder_depth=2,
    decoder_heads=8,
    decoder_mlp_dim=256,
    iou_head_depth=3,
    iou_head_hidden_dim=64,
    mask_in_chans=16,
    num_multimask_outputs=3,
    decoder_norm_eps=1e-5,
)
PATCH, GRID, LOW = SIZES.patch_size, SIZES.grid, 4 * SIZES.grid
IMAGES, POINTS = 6, 10  # a step
POOL = 6000  # drawn scenes that are used again, flipped and turned


class Scenes:
    """Training scenes: a few new ones a step, the rest from those drawn before, flipped and turned."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._pool: list[Scene] = []
        self._next = 0

    def batch(self, count: int) -> list[Scene]:
        new = count if len(self._pool) < 200 else count // 4
        for _ in range(new):
            scene = draw(self._next % UNSEEN)
            self._next += 1
            if not len(scene.masks):
                continue
            if len(self._pool) < POOL:
                self._pool.append(scene)
            else:
                self._pool[self._rng.integers(POOL)] = scene
        return [self._turned(self._pool[self._rng.integers(len(self._pool))]) for _ in range(count)]

    def _turned(self, scene: Scene) -> Scene:
        turns, flip = int(self._rng.integers(4)), bool(self._rng.integers(2))
        image, masks = np.rot90(scene.image, turns), np.rot90(scene.masks, turns, axes=(1, 2))
        return Scene(image[:, ::-1], masks[:, :, ::-1]) if flip else Scene(image, masks)

    def points(self, scene: Scene, count: int) -> tuple[np.ndarray, np.ndarray]:
        """A mask (count,) for each point and the points (count, 2) as x, y: anywhere inside."""
        chosen = self._rng.integers(len(scene.masks), size=count)
        points = []
        for number in chosen:
            ys, xs = np.nonzero(scene.masks[number])
            at = self._rng.integers(len(ys))
            points.append((xs[at], ys[at]))
        return chosen, np.array(points, dtype=np.float32)


def normalised(sam: nn.Module, images: list[np.ndarray]) -> Tensor:
    stacked = torch.from_numpy(np.stack(images).copy()).permute(0, 3, 1, 2).float()
    return (stacked - sam.pixel_mean) / sam.pixel_std


def decode(sam: nn.Module, embedding: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Low-resolution logits (points, 4, LOW, LOW) and predicted IoU (points, 4) of one image's embedding."""
    labels = torch.ones(len(points), 1)
    sparse, dense = sam.prompt_encoder(points=(points[:, None], labels), boxes=None, masks=None)
    pe = sam.prompt_encoder.get_dense_pe()
    masks, quality = sam.mask_decoder.predict_masks(embedding[None], pe, sparse, dense)
    return masks, quality


class Affinity(nn.Module):
    """The auxiliary head: how much each patch resembles the one under the point, as a logit."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, embedding: Tensor, points: Tensor) -> Tensor:
        """embedding: (C, GRID, GRID). points: (n, 2) pixels. Logits (n, GRID * GRID)."""
        tokens = embedding.flatten(1).T
        places = (points[:, 1] // PATCH).long() * GRID + (points[:, 0] // PATCH).long()
        return self.query(tokens[places]) @ self.key(tokens).T / math.sqrt(tokens.shape[1]) + self.bias


def mask_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy (focal, gamma 1) plus dice, each (n, k). logits: (n, k, LOW, LOW). target: (n, 1, LOW, LOW)."""
    target = target.expand_as(logits)
    entropy = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    probability = logits.sigmoid()
    focal = (entropy * (probability - target).abs()).mean((-1, -2)) * 4
    overlap = (probability * target).sum((-1, -2))
    dice = 1 - (2 * overlap + 1) / (probability.sum((-1, -2)) + target.sum((-1, -2)) + 1)
    return focal + dice


def iou(logits: Tensor, target: Tensor) -> Tensor:
    found, wanted = logits > 0, target > 0.5
    union = (found | wanted).sum((-1, -2)).clamp(min=1)
    return (found & wanted).sum((-1, -2)) / union


def losses(sam: nn.Module, affinity: nn.Module, scenes: Scenes, share_best: float) -> tuple[Tensor, Tensor, float]:
    """Mask loss, auxiliary loss and mean IoU of one step. share_best: weight of best-of-three over all three."""
    batch = scenes.batch(IMAGES)
    embeddings = sam.image_encoder(normalised(sam, [scene.image for scene in batch]))
    main, auxiliary, quality = [], [], []
    for scene, embedding in zip(batch, embeddings.float(), strict=True):
        chosen, where = scenes.points(scene, POINTS)
        target = torch.from_numpy(scene.masks[chosen].astype(np.float32))[:, None]
        points = torch.from_numpy(where)
        low = functional.avg_pool2d(target, SIZE // LOW)
        coarse = functional.avg_pool2d(target, PATCH).flatten(1)
        auxiliary.append(functional.binary_cross_entropy_with_logits(affinity(embedding, points), coarse))
        masks, predicted = (out.float() for out in decode(sam, embedding, points))
        each = mask_loss(masks, low)
        reached = iou(masks.detach(), low)
        three = each[:, 1:]
        best = share_best * three.min(1).values + (1 - share_best) * three.mean(1)
        main.append((best + 0.5 * each[:, 0] + ((predicted - reached) ** 2).mean(1)).mean())
        quality.append(reached[:, 1:].max(1).values.mean())
    return torch.stack(main).mean(), torch.stack(auxiliary).mean(), float(torch.stack(quality).mean())


@torch.no_grad()
def evaluate(sam: nn.Module, count: int) -> float:
    """Single-point mean IoU over unseen scenes: the interior point, multimask output, the best predicted quality."""
    sam.eval()
    reached = []
    for number in range(UNSEEN, UNSEEN + count):
        scene = draw(number)
        if not len(scene.masks):
            continue
        embedding = sam.image_encoder(normalised(sam, [scene.image]))[0]
        points = []
        for mask in scene.masks:
            depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
            y, x = np.unravel_index(depth.argmax(), depth.shape)
            points.append((x, y))
        masks, quality = decode(sam, embedding, torch.tensor(points, dtype=torch.float32))
        best = quality[:, 1:].argmax(1) + 1
        chosen = masks[torch.arange(len(points)), best][:, None]
        full = functional.interpolate(chosen, (SIZE, SIZE), mode="bilinear", align_corners=False)
        reached += iou(full[:, 0], torch.from_numpy(scene.masks.astype(np.float32))).tolist()
    sam.train()
    return sum(reached) / len(reached)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).parent
    parser.add_argument("--out", type=Path, default=here / "sam-tiny")
    parser.add_argument("--checkpoint", type=Path, default=here / "sam-tiny.training.pt", help="deleted at the end")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--unseen", type=int, default=400, help="scenes that the result is measured on")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("medium")  # on AMD processors the fast path, in fp32
    torch.manual_seed(0)
    sam, affinity = build_sam(SIZES).train(), Affinity(SIZES.prompt_dim)
    weights = [*sam.parameters(), *affinity.parameters()]
    print(f"{sum(p.numel() for p in sam.parameters()) / 1e6:.2f} M weights", flush=True)
    decayed = [p for p in weights if p.ndim > 1]
    plain = [p for p in weights if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.02}, {"params": plain, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=options.rate, betas=(0.9, 0.98))
    done = 0
    if options.checkpoint.exists():
        kept = torch.load(options.checkpoint, weights_only=True)
        sam.load_state_dict(kept["sam"])
        affinity.load_state_dict(kept["affinity"])
        adam.load_state_dict(kept["adam"])
        done = kept["step"]
    scenes = Scenes(seed=done)
    began, recent = time.monotonic(), []
    for step in range(done + 1, options.steps + 1):
        through = step / options.steps
        rate = options.rate * min(step / 200, 1.0) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * through)))
        for group in adam.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            main_loss, auxiliary, reached = losses(sam, affinity, scenes, share_best=min(through * 4, 1.0))
        (main_loss + 2.0 * (1 - through) * auxiliary).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        recent.append((float(main_loss.detach()), float(auxiliary.detach()), reached))
        if step % 50 == 0:
            mean = np.mean(recent, axis=0)
            each = (time.monotonic() - began) / (step - done)
            figures = f"loss {mean[0]:.3f}  auxiliary {mean[1]:.3f}  best of three {mean[2]:.3f}"
            print(f"step {step}  {figures}  {each:.2f} s a step", flush=True)
            recent = []
        if step % 250 == 0:
            print(f"step {step}  IoU on 40 unseen scenes {evaluate(sam, 40):.3f}", flush=True)
            kept = {"sam": sam.state_dict(), "affinity": affinity.state_dict(), "adam": adam.state_dict(), "step": step}
            unfinished = options.checkpoint.with_suffix(".tmp")
            torch.save(kept, unfinished)
            unfinished.replace(options.checkpoint)
    print(f"single-point IoU on {options.unseen} unseen scenes: {evaluate(sam, options.unseen):.4f}", flush=True)
    write_folder({name: tensor.half() for name, tensor in sam.state_dict().items()}, SIZES, options.out)
    options.checkpoint.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
