"""Measures of samples, features and predictions; all can be reached as common.<name>."""
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = ["classification", "frechet", "inception", "mmd", "mode_stats", "moments", "precision_recall", "sliced_wasserstein"]


@torch.no_grad()
def sliced_wasserstein(x: torch.Tensor, y: torch.Tensor, projections: int = 128) -> float:
    """Sliced Wasserstein-2 distance of two samples (N, ...), (M, ...): root of the mean squared W2 over fixed random
    directions of the flattened space. With N != M the larger one is thinned to the quantiles of the smaller."""
    x, y = x.flatten(1).float(), y.flatten(1).float()
    directions = torch.randn(x.shape[1], projections, generator=torch.Generator().manual_seed(0))
    directions = F.normalize(directions, dim=0).to(x.device)
    a, b = (x @ directions).sort(0)[0], (y @ directions).sort(0)[0]
    if len(a) != len(b):
        n = min(len(a), len(b))
        a, b = (z[((torch.arange(n) + 0.5) / n * len(z)).long()] for z in (a, b))
    return (a - b).square().mean().sqrt().item()


@torch.no_grad()
def mode_stats(x: torch.Tensor, means: torch.Tensor, weights: torch.Tensor, std: float) -> dict[str, float]:
    """Samples (N, D) against a mixture. coverage: share of components that get at least 20 % of their weight within 3
    std; mass_tv: total variation between the weights and the shares of the nearest component, in [0, 1]; off_support:
    share of samples more than 3 std from every mean."""
    distance, nearest = torch.cdist(x.float(), means).min(1)
    near = torch.bincount(nearest[distance < 3 * std], minlength=len(means)) / len(x)
    share = torch.bincount(nearest, minlength=len(means)) / len(x)
    return dict(coverage=(near >= 0.2 * weights).float().mean().item(),
                mass_tv=0.5 * (share - weights).abs().sum().item(), off_support=1 - near.sum().item())


@torch.no_grad()
def mmd(x: torch.Tensor, y: torch.Tensor) -> float:
    """Unbiased squared maximum mean discrepancy of (N, D) and (M, D), Gaussian kernels at 1/2, 1, 2 x the median distance."""
    xx, yy, xy = torch.cdist(x, x).square(), torch.cdist(y, y).square(), torch.cdist(x, y).square()
    total, n, m = 0.0, len(x), len(y)
    for factor in (0.25, 1.0, 4.0):
        kxx, kyy, kxy = (torch.exp(-d / (2 * factor * xy.median())) for d in (xx, yy, xy))
        total += ((kxx.sum() - n) / (n * (n - 1)) + (kyy.sum() - m) / (m * (m - 1)) - 2 * kxy.mean()).item()
    return total


@torch.no_grad()
def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (D,) and covariance (D, D) of features (N, D), in double precision on the CPU."""
    x = x.double().cpu()
    return x.mean(0), torch.cov(x.T)


@torch.no_grad()
def frechet(x, y) -> float:
    """Frechet distance |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of Gaussians fitted to features (N, D), (M, D); instead
    of features also their moments()."""
    (m1, c1), (m2, c2) = (moments(z) if torch.is_tensor(z) else z for z in (x, y))
    values, vectors = torch.linalg.eigh(c1)
    root = vectors @ (values.clamp_min(0).sqrt()[:, None] * vectors.T)
    cross = torch.linalg.eigvalsh(root @ c2 @ root).clamp_min(0).sqrt().sum()
    return max(((m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * cross).item(), 0.0)


@torch.no_grad()
def precision_recall(real: torch.Tensor, fake: torch.Tensor, k: int = 3) -> tuple[float, float]:
    """Share of fakes (M, D) inside the k-nearest-neighbour balls of the reals (N, D), and the converse
    (Kynkaanniemi et al. 2019). Distances are taken in blocks of 2,000 rows."""
    def inside(points, centres):
        radius = torch.cat([torch.cdist(part, centres).kthvalue(k + 1, 1)[0] for part in centres.split(2000)])
        hits = [(torch.cdist(part, centres) <= radius).any(1) for part in points.split(2000)]
        return torch.cat(hits).float().mean().item()
    return inside(fake, real), inside(real, fake)


@torch.no_grad()
def classification(logits: torch.Tensor, labels: torch.Tensor, bins: int = 15) -> dict[str, float]:
    """acc; nll in nats; ece, the expected calibration error over equal bins of confidence. logits (N, C), labels (N,)."""
    confidence, predicted = logits.softmax(1).max(1)
    right = (predicted == labels).float()
    which = (confidence * bins).long().clamp_max(bins - 1)
    gap = torch.zeros(bins, device=logits.device).index_add_(0, which, right - confidence)
    return dict(acc=right.mean().item(), nll=F.cross_entropy(logits, labels).item(),
                ece=(gap.abs().sum() / len(labels)).item())


def inception(models) -> Callable:
    """Features of torchvision's Inception-v3 with its ImageNet weights, downloaded on first use: images (B, 1 or 3, H, W)
    in [-1, 1] to (B, 2048). Not the network of the published FIDs: numbers made with it are comparable with each other
    only. models: the module torchvision.models."""
    net = models.inception_v3(weights=models.Inception_V3_Weights.IMAGENET1K_V1).eval().requires_grad_(False)
    net.fc = nn.Identity()
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]

    @torch.no_grad()
    def features(x):
        net.to(x.device)
        x = F.interpolate(x.expand(-1, 3, -1, -1), size=(299, 299), mode="bilinear", antialias=True, align_corners=False)
        return net((x / 2 + 0.5 - mean.to(x.device)) / std.to(x.device))
    return features
