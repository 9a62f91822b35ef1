"""Scenes to be segmented, made on the fly: several textured shapes, large and small, over a cluttered background.

    scenes = Scenes(size=16, objects=3)
    images, masks, small = scenes.sample(400)
    # (400, 3, 16, 16) in [-1, 1]; (400, 16, 16) int64, 0 background, 1..4 disc, square, cross, ring; the same, bool
    confusion = count(predictions, masks, scenes.classes)       # predictions (400, 16, 16) int64 -> (5, 5)
    iou(confusion)                                              # (5,): intersection over union of every class
    images, masks, _ = Drawn("test").sample(320)                # shapes16.npz in the same form: one shape of eight

The class of an object is that of its form, and each class prefers a colour, which alone tells it only in part; small
objects, `small`, show little of their form. Later objects cover earlier ones. The background is a smooth texture with
strokes in the objects' colours, which belong to no class. Random numbers come from torch's global stream.
"""
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

NAMES = ("background", "disc", "square", "cross", "ring")
COLOURS = ((0.8, 0.1, 0.0), (0.0, 0.7, 0.1), (0.1, 0.2, 0.9), (0.7, 0.6, 0.0))      # of disc, square, cross, ring


class Scenes:
    """size: pixels a side; objects: number in every scene; small: share of small ones; cue: probability that an object
    has the colour of its class and not a random one of the four; clutter: strokes in the background; noise: standard
    deviation of the pixels' noise."""
    classes = len(NAMES)            # with the background

    def __init__(self, size: int = 16, objects: int = 3, small: float = 0.5, cue: float = 0.7, clutter: int = 3,
                 noise: float = 0.1):
        self.size, self.objects, self.small, self.cue, self.clutter, self.noise = (
            size, objects, small, cue, clutter, noise)
        self.shape = (3, size, size)
        self.key = f"segments {sorted(vars(self).items())}"     # a part of the key of cached teachers

    def form(self, label: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Where points lie in their form: label (n, 1, 1) in 1..4, x and y (n, H, W) in units of the half width."""
        ax, ay, r = x.abs(), y.abs(), (x.square() + y.square()).sqrt()
        inside = [r < 1.05, torch.maximum(ax, ay) < 0.9,
                  (torch.minimum(ax, ay) < 0.38) & (torch.maximum(ax, ay) < 1.1), (r < 1.15) & (r > 0.55)]
        return (torch.stack(inside, 1) & (label[:, None] == torch.arange(1, 5, device=x.device)[:, None, None])).any(1)

    def grid(self, device) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixel centres x (1, 1, W) and y (1, H, 1) in [0, size]."""
        line = torch.arange(self.size, device=device) + 0.5
        return line[None, None, :], line[None, :, None]

    def background(self, n: int, device) -> torch.Tensor:
        """Smooth textures with strokes: (n, 3, H, W)."""
        coarse = torch.randn(n, 3, max(2, self.size // 4), max(2, self.size // 4), device=device)
        image = 0.25 + 0.18 * F.interpolate(coarse, (self.size, self.size), mode="bilinear", align_corners=True)
        x, y = self.grid(device)
        for _ in range(self.clutter):
            angle, place = (math.pi * torch.rand(n, 1, 1, device=device),
                            self.size * torch.rand(2, n, 1, 1, device=device))
            along = (x - place[0]) * angle.cos() + (y - place[1]) * angle.sin()
            across = (y - place[1]) * angle.cos() - (x - place[0]) * angle.sin()
            stroke = (across.abs() < 0.6) & (along.abs() < 0.2 * self.size)
            image = torch.where(stroke[:, None], self.colour(torch.randint(4, (n,), device=device)), image)
        return image

    def colour(self, which: torch.Tensor) -> torch.Tensor:
        """Colours (n, 3, 1, 1) near the preferred one of classes (n,), from 0."""
        tone = torch.tensor(COLOURS, device=which.device)[which]
        return (tone + 0.15 * torch.randn_like(tone))[:, :, None, None]

    def sample(self, n: int, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """n scenes: images (n, 3, H, W), masks (n, H, W) int64, and where small objects are (n, H, W) bool."""
        image = self.background(n, device)
        mask = torch.zeros(n, self.size, self.size, dtype=torch.long, device=device)
        small = torch.zeros_like(mask, dtype=torch.bool)
        x, y = self.grid(device)
        for _ in range(self.objects):
            label = torch.randint(1, 5, (n, 1, 1), device=device)
            tiny = torch.rand(n, 1, 1, device=device) < self.small
            width = torch.where(tiny, 1.4 + 0.6 * torch.rand(n, 1, 1, device=device),
                                self.size * (0.17 + 0.08 * torch.rand(n, 1, 1, device=device)))      # half of it
            place = width + (self.size - 2 * width) * torch.rand(2, n, 1, 1, device=device)
            inside = self.form(label, (x - place[0]) / width, (y - place[1]) / width)
            other = torch.randint(4, (n,), device=device)
            told = torch.rand(n, device=device) < self.cue
            colour = self.colour(torch.where(told, label[:, 0, 0] - 1, other))
            image = torch.where(inside[:, None], colour, image)
            mask, small = torch.where(inside, label, mask), torch.where(inside, tiny, small)
        image = image + self.noise * torch.randn_like(image)
        return (2 * image - 0.6).clamp(-1, 1), mask, small


class Drawn:
    """shapes16.npz (toy_data/make.py) as scenes: the mask of an image carries its label + 1, none counts as small.
    part: "train", drawn with replacement, or "test", whose first n images sample(n) gives."""
    classes, shape, key = 9, (3, 16, 16), "segments of shapes16"

    def __init__(self, part: str):
        with np.load(Path(__file__).with_name("shapes16.npz")) as found:
            images, masks, labels = (torch.from_numpy(found[f"{part}_{k}"]) for k in ("images", "masks", "labels"))
        self.part, self.images = part, images.permute(0, 3, 1, 2).float() / 127.5 - 1
        self.masks = masks.long() * (labels + 1)[:, None, None]

    def sample(self, n: int, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """images (n, 3, 16, 16), masks (n, 16, 16) int64, and a mask of nothing."""
        pick = (torch.randint(len(self.images), (n,)) if self.part == "train"
                else torch.arange(min(n, len(self.images))))
        return (self.images[pick].to(device), self.masks[pick].to(device),
                torch.zeros_like(self.masks[pick], dtype=torch.bool).to(device))


def count(predictions: torch.Tensor, masks: torch.Tensor, classes: int,
          where: torch.Tensor | None = None) -> torch.Tensor:
    """Confusion matrix (classes, classes) int64, rows the truth, of predictions and masks (...) int64; only the pixels
    where `where` (...) is True."""
    index = masks * classes + predictions
    index = index.flatten() if where is None else index[where]
    return torch.bincount(index, minlength=classes**2).view(classes, classes)


def iou(confusion: torch.Tensor) -> torch.Tensor:
    """Intersection over union (classes,) of a confusion matrix; nan for a class neither there nor predicted."""
    right = confusion.diag().double()
    return right / (confusion.sum(0) + confusion.sum(1) - right)
