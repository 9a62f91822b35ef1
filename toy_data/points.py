"""2-D points, sampled without end. Gaussian mixtures come with their exact flow: velocity, denoiser, score."""
import math

import torch


def _ring(weights=(1,) * 8, std=0.15):
    angle = torch.arange(8) * math.pi / 4
    return 2 * torch.stack([angle.cos(), angle.sin()], 1), torch.tensor(weights, dtype=torch.float), std


MIXTURES = {    # name: (means, weights, standard deviation) before scaling to unit variance; a component is a class
    "eight_gaussians": _ring(),
    "unequal_ring": _ring((6, 1, 3, 2, 4, 1, 2, 1)),
    "grid25": (torch.cartesian_prod(torch.arange(-2.0, 3), torch.arange(-2.0, 3)), torch.ones(25), 0.1),
}


def _checkerboard(n):
    column, row = torch.randint(4, (n,)), torch.randint(2, (n,))
    corner = torch.stack([column, 2 * row + column % 2], 1) - 2.0
    return corner + torch.rand(n, 2), column


def _pinwheel(n):
    arm = torch.randint(5, (n,))
    radius, side = 1 + 0.3 * torch.randn(n), 0.1 * torch.randn(n)
    angle = arm * 2 * math.pi / 5 + 0.25 * torch.exp(radius)
    c, s = angle.cos(), angle.sin()
    return 2 * torch.stack([radius * c - side * s, radius * s + side * c], 1), arm


def _spirals(n):
    arm = torch.randint(2, (n,))
    angle = 3 * math.pi * torch.rand(n).sqrt()
    x = torch.stack([-angle.cos(), angle.sin()], 1) * angle[:, None] * (1 - 2.0 * arm)[:, None]
    return x / 3 + 0.1 * torch.randn(n, 2), arm


def _moons(n):
    arm = torch.randint(2, (n,))
    angle, sign = math.pi * torch.rand(n), 1 - 2.0 * arm
    x = torch.stack([sign * angle.cos() + arm - 0.5, sign * angle.sin() + 0.5 * arm - 0.25], 1)
    return x + 0.08 * torch.randn(n, 2), arm


OTHERS = {"checkerboard": (_checkerboard, 4, 1.1547), "pinwheel": (_pinwheel, 5, 1.4799),    # sampler, classes and
          "spirals": (_spirals, 2, 1.5763), "moons": (_moons, 2, 0.7113)}                      # standard deviation
NAMES = (*MIXTURES, *OTHERS)


class Points:
    """An endless set of 2-D points of zero mean and unit variance, on a device.

    name: one of NAMES. conditional: hand out labels (the mixture component or the arm); else they are None.
    Attributes: shape (2,), classes (0 if unconditional), sigma_data 1, key (what a teacher's cache depends on); for a
    mixture means (K, 2), weights (K,) and std, its components' standard deviation, else means is None.
    """
    sigma_data = 1.0
    shape = (2,)

    def __init__(self, name: str, device: torch.device | str = "cpu", conditional: bool = False):
        self.name = self.key = name
        self.device, self.means = torch.device(device), None
        if name in MIXTURES:
            means, weights, std = MIXTURES[name]
            weights = weights / weights.sum()
            means = means - weights @ means
            scale = (weights @ means.square().mean(1) + std**2).sqrt()
            self.means, self.weights, self.std = (means / scale).to(device), weights.to(device), float(std / scale)
            self.classes = len(means) if conditional else 0
        else:
            self.draw, classes, self.scale = OTHERS[name]
            self.classes = classes if conditional else 0

    def sample(self, n: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """n points (n, 2) and labels (n,) int64, or None when unconditional, from torch's random stream."""
        if self.means is None:
            x, y = self.draw(n)
            x, y = (x / self.scale).to(self.device), y.to(self.device)
        else:
            y = torch.multinomial(self.weights, n, replacement=True)
            x = self.means[y] + self.std * torch.randn(n, 2, device=self.device)
        return x, (y if self.classes else None)

    def labels(self, n: int) -> torch.Tensor | None:
        """n labels (n,) with the frequencies of the data, None when unconditional."""
        return self.sample(n)[1]

    def velocity(self, x, t, y=None, s=None):
        """Exact v(x_t, t) = E[noise - x | x_t, y] of a mixture, differentiable: x (B, 2), t (B,) in [0, 1], y (B,) or
        None; the label K means no label. It has the signature of a network, so it can take a teacher's place."""
        t = t.view(-1, 1, 1).to(x.dtype)
        means, variance = self.means.to(x.dtype), (1 - t).square() * self.std**2 + t.square()    # (K, 2), (B, 1, 1)
        offset = x[:, None] - (1 - t) * means                                                       # (B, K, 2)
        logits = self.weights.to(x.dtype).log() - 0.5 * offset.square().sum(-1) / variance[..., 0]
        if y is not None:
            component = torch.arange(len(means), device=x.device)
            logits = logits.masked_fill((y[:, None] != component) & (y[:, None] != len(means)), -math.inf)
        posterior = logits.softmax(1)[..., None]
        return (posterior * ((t - (1 - t) * self.std**2) / variance * offset - means)).sum(1)

    def denoise(self, x, sigma, y=None):
        """Exact E[x_0 | x_0 + sigma noise = x], x (B, 2), sigma (B,)."""
        t = sigma / (1 + sigma)
        x_t = x / (1 + sigma[:, None])
        return x_t - t[:, None] * self.velocity(x_t, t, y)

    def score(self, x, sigma, y=None):
        """Exact gradient of log p_sigma(x), the density of x_0 + sigma noise; sigma > 0."""
        return (self.denoise(x, sigma, y) - x) / sigma[:, None].square()
