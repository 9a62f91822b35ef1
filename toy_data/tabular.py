"""A table with a protected attribute, made on the fly: columns of merit, proxies of the attribute, biased labels.

    task = Hiring()                                         # P(label 1) is 0.25 in group 0, 0.65 in group 1
    x, protected, labels, deserved = task.sample(6000)      # (6000, 10) float, three times (6000,) int64 0/1
    coder = Coder(x, task.levels)                           # standardises numbers, one-hot categories
    coder.encode(x), coder.decode(coder.encode(x))          # (6000, coder.width), and x again
    fairness(predicted, protected, labels)                  # accuracy, parity gap, odds gap
    train, test, levels = split(x, protected, labels)       # a table of your own; ValueError if it is not fit

Merit (two independent normal factors) does not depend on the group. A label is 1 where merit plus noise exceeds a bar,
and the bar is higher for group 0: that is the label bias. `deserved` is the label by one bar for all, which nobody who
has only the table can see. Three columns tell merit, three tell the group (proxies), the rest tells neither
or a little of merit. A column with level 0 is a number, one with level k a category coded 0..k-1. Random numbers
come from torch's global stream.
"""
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F


class Table(NamedTuple):
    """Rows as a network sees them: code (N, width) of a Coder; protected, labels, deserved (if known) (N,)."""
    code: torch.Tensor
    protected: torch.Tensor
    labels: torch.Tensor
    deserved: torch.Tensor | None = None

    def pick(self, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Code, protected and labels of n random rows."""
        index = torch.randint(len(self.code), (n,), device=self.code.device)
        return self.code[index], self.protected[index], self.labels[index]


class Hiring:
    """rates: P(label 1) in group 0 and 1; share: P(group 1); proxy: how far apart the groups are in the proxies, in
    standard deviations of their noise (0: not at all); noise: standard deviation of luck in labels (merit's: 1)."""
    columns = ("test", "experience", "projects", "club", "commute", "hours", "district", "education", "degree",
               "region")
    levels = (0, 0, 0, 0, 0, 0, 2, 3, 2, 4)
    proxies = (3, 4, 6)

    def __init__(self, rates: tuple[float, float] = (0.25, 0.65), share: float = 0.5, proxy: float = 1.5,
                 noise: float = 0.5):
        self.rates, self.share, self.proxy, self.noise = rates, share, proxy, noise
        self.key = f"hiring {rates} {share} {proxy} {noise}"

    def bars(self) -> tuple[float, float, float]:
        """What merit plus luck must exceed: in group 0, in group 1, and for all if the bar were one."""
        middle = (1 - self.share) * self.rates[0] + self.share * self.rates[1]
        rates = torch.tensor((*self.rates, middle), dtype=torch.float64)
        return tuple((-(1 + self.noise**2) ** 0.5 * torch.special.ndtri(rates)).tolist())

    def sample(self, n: int, device: torch.device | str = "cpu") -> tuple[torch.Tensor, ...]:
        """n rows: x (n, 10) float, protected, labels and deserved labels (n,) int64."""
        def randn(*shape):
            return torch.randn(*shape, device=device)

        protected = (torch.rand(n, device=device) < self.share).long()
        side = protected - 0.5
        skill, practice = randn(2, n)
        merit = (skill + practice) / 2**0.5
        luck = merit + self.noise * randn(n)
        bars = torch.tensor(self.bars(), device=device)
        e = randn(9, n)
        x = torch.stack([skill + 0.6 * e[0], practice + 0.6 * e[1], merit + 0.6 * e[2],
                         self.proxy * side + 0.3 * practice + e[3], self.proxy * side + e[4], e[5],
                         self.proxy * side + e[6] > 0, (skill + e[7] > -0.7) * 1.0 + (skill + e[7] > 0.7),
                         practice + e[8] > 0.5, torch.randint(4, (n,), device=device)], 1)
        return x.float(), protected, (luck > bars[protected]).long(), (luck > bars[2]).long()


class Coder:
    """Between a table x (N, D) and what a network sees (N, width): numbers standardised by the mean and deviation of
    the x given here, categories one-hot. levels (D,): 0 for a number, k for a category coded 0..k-1.

    numbers: how many columns of the code, its first ones, are numbers; sizes: the levels of the categories behind.
    """

    def __init__(self, x: torch.Tensor, levels: tuple[int, ...]):
        if len(levels) != x.shape[1]:
            raise ValueError(f"{len(levels)} levels for {x.shape[1]} columns")
        self.where = [i for i, k in enumerate(levels) if not k] + [i for i, k in enumerate(levels) if k]
        self.sizes = [k for k in levels if k]
        self.numbers = len(levels) - len(self.sizes)
        self.width = self.numbers + sum(self.sizes)
        numbers = x[:, self.where[:self.numbers]]
        self.mean, self.std = numbers.mean(0), numbers.std(0).clamp_min(1e-6)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """(N, D) to (N, width)."""
        x = x[:, self.where]
        parts = [(x[:, :self.numbers] - self.mean) / self.std]
        parts += [F.one_hot(c.long(), k) for c, k in zip(x[:, self.numbers:].unbind(1), self.sizes)]
        return torch.cat(parts, 1).to(x.dtype)

    def decode(self, code: torch.Tensor) -> torch.Tensor:
        """(N, width) to (N, D); a category is its largest entry."""
        numbers, *blocks = code.split([self.numbers, *self.sizes], 1)
        columns = torch.cat([numbers * self.std + self.mean, *(b.argmax(1, keepdim=True) for b in blocks)], 1)
        return columns[:, torch.tensor(self.where, device=code.device).argsort()]

    def sample(self, output: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
        """A random code from a network's output (N, width): means of the numbers, to which noise of standard deviation
        spread (numbers,) is added, and logits of the categories."""
        mean, *logits = output.split([self.numbers, *self.sizes], 1)
        blocks = [F.one_hot(b.softmax(1).multinomial(1)[:, 0], b.shape[1]) for b in logits]
        return torch.cat([mean + spread * torch.randn_like(mean), *blocks], 1)


def checked(x: torch.Tensor, protected: torch.Tensor, labels: torch.Tensor, levels: list[int] | None = None) -> tuple:
    """A table of one's own as x (N, D) float, protected and labels (N,) int64, levels (D,). Without levels columns of
    just 0 and 1 are categories, all others numbers. ValueError says what is not fit: flags other than 0 and 1, wrong
    counts, levels that do not suit x, a group without one of the labels."""
    for name, flag in (("protected", protected), ("labels", labels)):
        if len(flag) != len(x):
            raise ValueError(f"'{name}' has {len(flag)} values for the {len(x)} rows of x")
        if not ((flag == 0) | (flag == 1)).all():
            raise ValueError(f"'{name}' must be 0 or 1, found {float(flag.min()):g}..{float(flag.max()):g}")
    x, protected, labels = x.float(), protected.long(), labels.long()
    if levels is None:
        levels = [2 if set(column.unique().tolist()) == {0, 1} else 0 for column in x.unbind(1)]
    if len(levels) != x.shape[1] or any(k < 0 or k == 1 or k != int(k) for k in levels):
        raise ValueError(f"'levels' must be 0 (a number) or an integer >= 2 for each of the {x.shape[1]} columns of "
                         f"x, got {levels}")
    for i, k in enumerate(levels):
        if k and not torch.isin(x[:, i], torch.arange(int(k)).to(x)).all():
            raise ValueError(f"column {i} of x has level {k:g}, so it must hold the codes 0..{int(k) - 1}")
    if len((2 * protected + labels).unique()) < 4:
        raise ValueError("each group of 'protected' needs rows of both labels, also in any part that is split off")
    return x, protected, labels, tuple(int(k) for k in levels)


def split(x: torch.Tensor, protected: torch.Tensor, labels: torch.Tensor, levels: list[int] | None = None,
          test: float = 0.25):
    """A table of one's own as two tuples (x, protected, labels), training and test by torch's random stream, and its
    levels. ValueError as by checked(), for either part as well."""
    x, protected, labels, levels = checked(x, protected, labels, levels)
    parts = torch.randperm(len(x)).to(x.device).tensor_split([len(x) - round(test * len(x))])
    return *(checked(x[rows], protected[rows], labels[rows], list(levels))[:3] for rows in parts), levels


def fairness(predicted: torch.Tensor, protected: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """acc; parity_gap, |P(1 | group 0) - P(1 | group 1)| of the predictions; odds_gap, the larger of the same gap
    among the rows of label 0 and among those of label 1. All (N,) 0/1."""
    def gap(rows):
        rates = [predicted[rows & (protected == k)].float().mean() for k in (0, 1)]
        return (rates[0] - rates[1]).abs().item()
    return dict(acc=(predicted == labels).float().mean().item(), parity_gap=gap(labels >= 0),
                odds_gap=max(gap(labels == y) for y in (0, 1)))


def auc(score: torch.Tensor, positive: torch.Tensor) -> float:
    """Area under the ROC curve of score (N,) for positive (N,) 0/1; ties go by position."""
    rank = score.double().argsort().argsort() + 1.0
    n = positive.sum()
    return ((rank[positive == 1].sum() - n * (n + 1) / 2) / (n * (len(score) - n))).item()


def scores(inputs: torch.Tensor, targets: torch.Tensor, tests: torch.Tensor, steps: int = 300, width: int = 32,
           lr: float = 1e-2, batch: int = 256) -> torch.Tensor:
    """Logits (M,) for tests (M, K) of a small classifier that is trained here on inputs (N, K) and targets (N,) 0/1:
    the judge of a synthetic table, or the probe for what a latent tells."""
    device = inputs.device
    net = nn.Sequential(nn.Linear(inputs.shape[1], width), nn.ReLU(), nn.Linear(width, 1)).to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        index = torch.randint(len(inputs), (batch,), device=device)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(net(inputs[index])[:, 0], targets[index].float()).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return net(tests)[:, 0]
