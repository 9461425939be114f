"""Single-point IoU: how well the mask that one point asks for covers the annotated one.

Source: Kirillov et al. 2023 (single-point evaluation); LAMP section 4. Sizes of objects are COCO's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Of an object's area in pixels of the image: below the first small, below the second medium.
_SMALL, _MEDIUM = 32**2, 96**2
_RESAMPLES = 2000


def mask_iou(found: np.ndarray, annotated: np.ndarray) -> float:
    """Intersection over union of two masks (H, W) bool; 1 for two empty ones."""
    union = int(np.count_nonzero(found | annotated))
    return int(np.count_nonzero(found & annotated)) / union if union else 1.0


def interior_point(mask: np.ndarray) -> tuple[float, float]:
    """x and y of the pixel inside `mask` (H, W) that lies farthest from its edge; the image's border is an edge.

    Raises ValueError for an empty mask.
    """
    from scipy.ndimage import distance_transform_edt

    if not mask.any():
        raise ValueError("an empty mask has no point inside")
    depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(int(depth.argmax()), depth.shape)
    return float(x), float(y)


def random_point(mask: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """x and y of a pixel of `mask`, each as likely as another."""
    ys, xs = np.nonzero(mask)
    if not len(ys):
        raise ValueError("an empty mask has no point inside")
    place = int(rng.integers(len(ys)))
    return float(xs[place]), float(ys[place])


def box_center(mask: np.ndarray) -> tuple[float, float]:
    """x and y of the middle of the mask's bounding box, which may lie outside of the mask."""
    ys, xs = np.nonzero(mask)
    if not len(ys):
        raise ValueError("an empty mask has no point inside")
    return (float(xs.min()) + float(xs.max())) / 2, (float(ys.min()) + float(ys.max())) / 2


def size_of(area: int) -> str:
    """ "small", "medium" or "large", as COCO has it."""
    return "small" if area < _SMALL else "medium" if area < _MEDIUM else "large"


def bootstrap_interval(values: Sequence[float], groups: Sequence[int], seed: int = 0) -> tuple[float, float]:
    """The 95% interval of the mean: images, not masks, are drawn anew, since the masks of one are alike.

    groups: the image that each value belongs to.
    """
    _, number = np.unique(np.asarray(groups), return_inverse=True)
    sums, counts = np.bincount(number, weights=np.asarray(values)), np.bincount(number)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(sums), size=(_RESAMPLES, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
