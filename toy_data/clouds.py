"""LiDAR-like scans of a small ground with objects on it, made on the fly, their pillar grid, and average precision.

    scans = Scans()
    points, valid, boxes, labels = scans.sample(8)      # (8, P, 4) x, y, z, intensity; (8, P) bool;
                                                        # (8, K, 4) centre x, y, length, width; (8, K) int64 0..2
    pillars = pillarise(points, valid, scans.grid)      # the non-empty columns of the grid, M in all 8 scans
    kind, target = pillar_targets(pillars, boxes, labels)       # (M,) 0 or 1 + label; (M, 4) offset and log size
    found = detections(kind_probabilities, boxes_per_pillar, pillars, scans=8)
    average_precision(found, boxes, labels)             # one number a class

The ground is grid x grid unit squares seen by a sensor at its lower edge. Objects are cars (boxes), posts
(cylinders) and cones; only their surfaces towards the sensor and their tops return points, the fewer the farther
away. Most other squares hold no, one or two points of ground, or of plants that rise above it; bushes are dense and
no object. Random numbers come from torch's global stream.
"""
import math
from typing import NamedTuple

import torch

CLASSES = ("car", "post", "cone")
SIZES = ((1.9, 1.0, 0.8), (0.7, 0.7, 1.3), (1.1, 1.1, 0.9))      # length (along y), width, height
SHINE = (0.5, 0.35, 0.65)                                       # mean intensity; plants and ground: 0.4


class Scans:
    """grid: squares a side; objects: how many in each scan; bushes: dense clutter; density: points an object returns
    at distance 0 (half of them at half the grid's length); clutter: ground points of a square, half of them seen."""

    def __init__(self, grid: int = 12, objects: int = 4, bushes: int = 2, density: int = 40, clutter: int = 2):
        self.grid, self.objects, self.bushes, self.density, self.clutter = grid, objects, bushes, density, clutter
        self.key = f"scans {grid} {objects} {bushes} {density} {clutter}"

    def centres(self, n: int, device: torch.device | str) -> torch.Tensor:
        """(n, objects + bushes, 2): one in each of as many 3x3 blocks, jittered, so that things do not touch."""
        side, count = self.grid // 3, self.objects + self.bushes
        if count > side**2:
            raise ValueError(f"{count} things need more than the {side**2} blocks of a {self.grid} x {self.grid} grid")
        block = torch.rand(n, side**2, device=device).argsort(1)[:, :count]
        corner = 3 * torch.stack([block % side, block // side], 2)
        return corner + 1.5 + 1.2 * (torch.rand(n, count, 2, device=device) - 0.5)

    def sample(self, n: int, device: torch.device | str = "cpu") -> tuple[torch.Tensor, ...]:
        """n scans: points (n, P, 4), valid (n, P) False for padding, boxes (n, K, 4), labels (n, K)."""
        def rand(*shape):
            return torch.rand(*shape, device=device)

        centre = self.centres(n, device)
        things, label = centre.shape[1], torch.randint(3, (n, self.objects), device=device)
        kind = torch.cat([label, torch.full((n, self.bushes), 3, device=device)], 1)        # 3: a bush
        size = torch.tensor((*SIZES, (1.2, 1.2, 0.8)), device=device)[kind]                   # (n, things, 3)
        size = size * (0.8 + 0.4 * rand(n, things, 1))
        turned = (rand(n, things, 1) < 0.5) & (kind[..., None] == 0)        # cars stand along or across
        length, width = torch.where(turned, size[..., [1, 0]], size[..., [0, 1]]).unbind(2)
        height = size[..., 2]

        p = self.density
        side, u, v = rand(n, things, p), rand(n, things, p), rand(n, things, p)
        across, up = u - 0.5, v
        # a box: its front (towards y = 0), the flank that faces the sensor's column, its top
        towards = torch.sign(self.grid / 2 - centre[..., 0])[..., None]
        front, flank = side < 0.45, (side >= 0.45) & (side < 0.75)
        box = torch.stack([torch.where(flank, 0.5 * towards, across),
                           torch.where(front, -0.5, torch.where(flank, across, v - 0.5)),
                           torch.where(front | flank, up, 1.0)], 3)
        # round things: the half of the mantle that faces the sensor; a cone narrows towards its tip
        angle = math.pi * (1 + u)
        radius = 0.5 * torch.where(kind[..., None] == 2, 1 - 0.9 * up, 1.0)
        mantle = torch.stack([radius * angle.cos(), radius * angle.sin(), up], 3)
        ball = torch.stack([across, side - 0.5, up], 3)
        shape = torch.where((kind == 0)[..., None, None], box, torch.where((kind == 3)[..., None, None], ball, mantle))
        xyz = shape * torch.stack([width, length, height], 2)[:, :, None]
        xyz[..., :2] += centre[:, :, None]
        shine = torch.tensor((*SHINE, 0.4), device=device)[kind][..., None]
        shine = shine + 0.15 * torch.randn(n, things, p, device=device)
        distance = (centre - torch.tensor([self.grid / 2, 0.0], device=device)).norm(dim=2)
        hit = rand(n, things, p) < 1 / (1 + 2 * distance / self.grid)[..., None]

        squares = self.grid**2 * self.clutter
        ground = self.grid * rand(n, squares, 3)
        tall = (rand(n, squares) < 0.25) * rand(n, squares)     # plants
        ground[..., 2] = tall
        light = 0.4 + 0.15 * torch.randn(n, squares, device=device)
        seen = rand(n, squares) < 0.5
        points = torch.cat([torch.cat([xyz, shine[..., None]], 3).flatten(1, 2),
                            torch.cat([ground, light[..., None]], 2)], 1)
        valid = torch.cat([hit.flatten(1), seen], 1)
        points[..., :3] += 0.03 * torch.randn_like(points[..., :3])
        valid &= ((points[..., :2] > 0) & (points[..., :2] < self.grid)).all(2)
        boxes = torch.cat([centre, length[..., None], width[..., None]], 2)[:, :self.objects]
        return points, valid, boxes, label


class Pillars(NamedTuple):
    """The M non-empty squares of some scans. features (M, cap, 8): of each point x, y, z, intensity (x, y relative to
    the square's centre), its offset from the mean of the square's points in x, y, z, and 1; zeros where there is no
    point; counts (M,), at most cap; scan, row (y), column (x): (M,) int64; grid."""
    features: torch.Tensor
    counts: torch.Tensor
    scan: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    grid: int

    def centres(self) -> torch.Tensor:
        """(M, 2) x, y of the squares' centres."""
        return torch.stack([self.column, self.row], 1) + 0.5

    def canvas(self, values: torch.Tensor, scans: int) -> torch.Tensor:
        """values (M, C) laid out as (scans, C, grid, grid), 0 in empty squares; carries gradient."""
        place = (self.scan * self.grid + self.row) * self.grid + self.column
        flat = values.new_zeros(scans * self.grid**2, values.shape[1]).index_copy(0, place, values)
        return flat.view(scans, self.grid, self.grid, -1).permute(0, 3, 1, 2)

    def gather(self, canvas: torch.Tensor) -> torch.Tensor:
        """The converse: (scans, C, grid, grid) to (M, C)."""
        return canvas[self.scan, :, self.row, self.column]


def pillarise(points: torch.Tensor, valid: torch.Tensor, grid: int, cap: int = 8) -> Pillars:
    """Sort points (n, P, 4) into the squares of the grid. Of a square's points the first `cap` in the order given are
    kept; points that are not valid or off the grid are dropped."""
    inside = valid & ((points[..., :2] >= 0) & (points[..., :2] < grid)).all(2)
    scan = torch.arange(len(points), device=points.device)[:, None].expand_as(inside)[inside]
    p = points[inside]
    column, row = p[:, 0].long().clamp(0, grid - 1), p[:, 1].long().clamp(0, grid - 1)
    place, order = ((scan * grid + row) * grid + column).sort(stable=True)
    squares, index, counts = place.unique_consecutive(return_inverse=True, return_counts=True)
    rank = torch.arange(len(place), device=p.device) - (counts.cumsum(0) - counts)[index]
    keep = rank < cap
    p, index, rank, counts = p[order][keep], index[keep], rank[keep], counts.clamp_max(cap)
    row, column = squares // grid % grid, squares % grid
    mean = p.new_zeros(len(squares), 3).index_add_(0, index, p[:, :3]) / counts[:, None]
    local = p[:, :2] - torch.stack([column, row], 1)[index] - 0.5
    features = p.new_zeros(len(squares), cap, 8)
    features[index, rank] = torch.cat([local, p[:, 2:], p[:, :3] - mean[index], torch.ones_like(p[:, :1])], 1)
    return Pillars(features, counts, squares // grid**2, row, column, grid)


def pillar_targets(pillars: Pillars, boxes: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a detector is to say of each pillar: kind (M,), 0 for background or 1 + label where the nearest box reaches
    0.1 or more into the square; (M, 4) of that box: its centre's offset from the square's, log length and width."""
    offset = boxes[pillars.scan][..., :2] - pillars.centres()[:, None]      # (M, K, 2)
    half = boxes[pillars.scan][..., [3, 2]] / 2 + 0.4
    nearest = offset.norm(dim=2).argmin(1)
    rows = torch.arange(len(offset), device=offset.device)
    inside = (offset[rows, nearest].abs() < half[rows, nearest]).all(1)
    kind = torch.where(inside, 1 + labels[pillars.scan, nearest], 0)
    return kind, torch.cat([offset[rows, nearest], boxes[pillars.scan, nearest, 2:].log()], 1)


def detections(probabilities: torch.Tensor, offsets: torch.Tensor, pillars: Pillars, scans: int, radius: float = 1.0,
               most: int = 12) -> tuple[torch.Tensor, ...]:
    """Boxes from what a detector says: for each scan and class the `most` best pillars after those within `radius` of
    a better one of that class are struck out.

    probabilities (M, 4) of background and the classes, offsets (M, >= 2) from the square's centre to the object's.
    Returns centres (scans, 3, most, 2) and scores (scans, 3, most), 0 where there is none.
    """
    centre = pillars.centres() + offsets[:, :2]
    ranked, where = pillars.canvas(probabilities[:, 1:], scans).flatten(2).topk(min(3 * most, pillars.grid**2), 2)
    place = pillars.canvas(centre, scans).flatten(2).transpose(1, 2)                # (scans, squares, 2)
    place = place[torch.arange(scans, device=place.device)[:, None, None], where]   # (scans, 3, top, 2)
    near = torch.cdist(place, place) < radius
    alive = ranked > 0
    for i in range(ranked.shape[2] - 1):        # greedy, all scans and classes at once
        alive[..., i + 1:] &= ~(alive[..., i, None] & near[..., i, i + 1:])
    scores, best = (ranked * alive).topk(min(most, ranked.shape[2]), 2)
    return place.gather(2, best[..., None].expand(*best.shape, 2)), scores


def average_precision(found: tuple[torch.Tensor, torch.Tensor], boxes: torch.Tensor, labels: torch.Tensor,
                      distance: float = 0.5) -> list[float]:
    """Average precision of each class at a centre distance, as in nuScenes: detections in the order of their scores,
    each taking the nearest object of its class within the distance if no better one took it. found: detections()."""
    centres, scores = found
    values = []
    for c in range(len(CLASSES)):
        mine = labels == c                                                          # (n, K)
        gap = torch.cdist(centres[:, c], boxes[..., :2]).masked_fill(~mine[:, None], math.inf)   # (n, most, K)
        hit, free = torch.zeros_like(scores[:, c], dtype=torch.bool), mine.clone()
        rows = torch.arange(len(gap), device=gap.device)
        for i in range(scores.shape[2]):        # within a scan the detections are in the order of their scores
            near, which = gap[:, i].masked_fill(~free, math.inf).min(1)
            hit[:, i] = (near < distance) & (scores[:, c, i] > 0)
            free[rows[hit[:, i]], which[hit[:, i]]] = False
        score, order = scores[:, c].flatten().sort(descending=True)
        true = hit.flatten()[order][score > 0].double()
        precision = true.cumsum(0) / torch.arange(1, len(true) + 1, device=true.device)
        if len(true):
            precision = precision.flip(0).cummax(0)[0].flip(0)      # the usual envelope
        values.append(((precision * true).sum() / mine.sum().clamp_min(1)).item())
    return values
