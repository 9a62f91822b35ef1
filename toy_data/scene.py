"""Small 3-D scenes as voxel grids and a differentiable renderer: volume rendering along parallel rays.

A scene is a tensor (4, SIZE, SIZE, SIZE): raw density and raw red, green, blue, over height, depth and width.
Density is softplus of its raw value, a colour tanh of its own; the background is 0, mid-grey. A true scene is one
of four solids (the category, as in a prompt), its front half in one random colour and its back half in another.
Both colours are normal around one that the category prefers, and for a given density a view is linear in the
colours, so that the views of a category from one side have a normal law of rank 6.
"""
import math

import torch
import torch.nn.functional as F

SIZE, AZIMUTHS = 8, 8
CATEGORIES = ("ball", "tower", "table", "cross")
COLOURS = 0.15 * torch.tensor([[1, -1, -1], [1, 1, -1], [-1, 1, -1], [-1, -1, 1.0]])    # mean of a category
SPREAD = 0.3        # standard deviation of the colours


def _samplers() -> torch.Tensor:
    """(AZIMUTHS, rays * depth, SIZE^2): bilinear weights of the points of each ray in a slice, nearest first."""
    centre = (SIZE - 1) / 2
    ray, depth = torch.meshgrid(torch.arange(SIZE) - centre, torch.arange(SIZE) - centre, indexing="ij")
    weights = []
    for azimuth in torch.arange(AZIMUTHS) * 2 * math.pi / AZIMUTHS:
        c, s = azimuth.cos(), azimuth.sin()
        column, row = c * ray - s * depth + centre, s * ray + c * depth + centre
        near = [(1 - (position.reshape(-1, 1) - torch.arange(SIZE)).abs()).clamp_min(0) for position in (row, column)]
        weights.append((near[0][:, :, None] * near[1][:, None, :]).flatten(1))
    return torch.stack(weights)


SAMPLERS = _samplers()


def render(scenes: torch.Tensor, azimuth: torch.Tensor) -> torch.Tensor:
    """Views (N, 3, SIZE, SIZE) in (-1, 1) of scenes (N, 4, SIZE, SIZE, SIZE) from azimuth (N,) int64; differentiable.
    Along a ray the colour is sum_i T_i (1 - exp(-density_i)) colour_i, T_i = exp(-sum of the densities before i)."""
    return composite(F.softplus(scenes[:, :1]), scenes[:, 1:].tanh(), azimuth)


def composite(density: torch.Tensor, colour: torch.Tensor, azimuth: torch.Tensor) -> torch.Tensor:
    """render() of density (N, 1, ...) >= 0 and colour (N, C, ...) as they are; linear in the colour times density."""
    voxels = torch.cat([density, colour * density], 1).flatten(3)
    along = torch.einsum("nqp,nchp->nchq", SAMPLERS.to(voxels)[azimuth], voxels).unflatten(-1, (SIZE, SIZE))
    thickness = along[:, :1]                                    # (N, 1, height, ray, depth)
    passed = thickness.cumsum(-1)
    share = torch.exp(thickness - passed) * -torch.expm1(-thickness) / thickness.clamp_min(1e-6)
    return (share * along[:, 1:]).sum(-1)


def solids() -> tuple[torch.Tensor, torch.Tensor]:
    """Raw densities (4, 1, SIZE, SIZE, SIZE) of the categories and masks (2, 1, ...) of the front and back halves."""
    h, d, w = torch.meshgrid(*[torch.arange(SIZE) - (SIZE - 1) / 2] * 3, indexing="ij")     # height 0 is the top
    inner, outer = (d.abs() < 1.1) & (w.abs() < 1.1), (d.abs() < 3) & (w.abs() < 3)
    legs = (h > 0) & (d.abs() > 1) & (w.abs() > 1) & outer
    ball, tower = h.square() + d.square() + w.square() < 3.2**2, inner | (h > 2) & outer
    table, cross = legs | (h.abs() < 1.1) & (h < 0) & outer, inner | (h.abs() < 1.1) & (d.abs() < 1.1)
    shapes = [ball, tower, table, cross]
    density = torch.stack([torch.where(shape, 3.0, -6.0) for shape in shapes])
    return density[:, None], torch.stack([d < 0, d > 0])[:, None].float()


def sample(n: int) -> torch.Tensor:
    """n true scenes (n, 4, SIZE, SIZE, SIZE) from torch's random stream; scene i is of category i modulo 4."""
    density, halves = solids()
    category = torch.arange(n) % len(density)
    colours = (COLOURS[category][:, None] + SPREAD * torch.randn(n, 2, 3)).clamp(-0.98, 0.98).atanh()
    return torch.cat([density[category], torch.einsum("npc,pxhdw->nchdw", colours, halves)], 1)


def view_law() -> tuple[torch.Tensor, torch.Tensor]:
    """Means (4, AZIMUTHS, D) and factors (4, AZIMUTHS, D, 6) of the normal laws N(mean, factor factor^T) of the flat
    views of a category from an azimuth, D = 3 SIZE^2."""
    density, halves = solids()
    azimuth = torch.arange(AZIMUTHS).repeat_interleave(len(density))
    halves = halves[:, 0].expand(len(azimuth), -1, -1, -1, -1)
    shade = composite(F.softplus(density).repeat(AZIMUTHS, 1, 1, 1, 1), halves, azimuth)
    shade = shade.unflatten(0, (AZIMUTHS, -1)).transpose(0, 1)                              # (4, A, half, height, ray)
    means = torch.einsum("kaphw,kc->kachw", shade, COLOURS)
    factors = SPREAD * torch.einsum("kaphw,cd->kachwpd", shade, torch.eye(3))
    return means.flatten(2), factors.flatten(5).flatten(2, 4)


def all_views(scenes: torch.Tensor) -> torch.Tensor:
    """Every scene from every azimuth: (N, AZIMUTHS, 3, SIZE, SIZE)."""
    n = len(scenes)
    azimuth = torch.arange(AZIMUTHS, device=scenes.device).repeat(n)
    return render(scenes.repeat_interleave(AZIMUTHS, 0), azimuth).unflatten(0, (n, AZIMUTHS))


class MixturePrior(torch.nn.Module):
    """Exact velocity v(x_t, t, y) = E[noise - x | x_t, y], t > 0, of a mixture of N(means, factors factors^T + std^2).

    means (K, D), factors (K, D, R) with R >= 0, weights (K,). A label y stands for the components in allowed[y], bool
    (labels, K); y = None or the number of labels stands for all of them.
    """

    def __init__(self, means, factors, std, weights, allowed):
        super().__init__()
        axes, length, _ = torch.linalg.svd(factors, full_matrices=False)
        self.std = std
        self.register_buffer("means", means)
        self.register_buffer("axes", axes)                      # (K, D, R), orthonormal
        self.register_buffer("spread", length.square())         # (K, R), variance along them beyond std^2
        allowed = torch.cat([allowed, torch.ones_like(allowed[:1])])
        self.register_buffer("log_weights", weights.log().masked_fill(~allowed, -math.inf))

    def forward(self, x_t, t, y=None):
        x, t, a = x_t.flatten(1), t[:, None], 1 - t[:, None]
        rest = a.square() * self.std**2 + t.square()                                        # variance of x_t, (B, 1)
        along = rest[..., None] + a[..., None].square() * self.spread                       # along the axes, (B, K, R)
        flat = self.axes.transpose(0, 1).flatten(1)
        z = (x @ flat).view_as(along) - a[..., None] * torch.einsum("kd,kdr->kr", self.means, self.axes)
        square = x.square().sum(1, True) - 2 * a * (x @ self.means.T) + a.square() * self.means.square().sum(1)
        fit = (square - z.square().sum(-1)) / rest + (z.square() / along + along.log() - rest[..., None].log()).sum(-1)
        posterior = (self.log_weights[-1 if y is None else y] - 0.5 * fit).softmax(1)
        gain = a * self.std**2 / rest
        gain_along = a[..., None] * (self.std**2 + self.spread) / along
        clean = gain * x + (1 - gain * a) * (posterior @ self.means)                        # becomes E[x | x_t, y]
        clean = clean + (posterior[..., None] * (gain_along - gain[..., None]) * z).flatten(1) @ flat.T
        return ((x - clean) / t).view_as(x_t)
