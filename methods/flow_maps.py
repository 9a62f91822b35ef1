"""Flow maps - How to build a consistency model: Learning flow maps via self-distillation
Paper: Boffi et al., NeurIPS 2025, arXiv:2505.18825
Code: nmboffi/flow-maps (py/common/losses.py, flow_map.py, loss_args.py, read as kept in harrya32/flow-maps)
Family: flow map. Distils: a flow into its own jumps, one network being teacher and student.

The flow map X_{s,t}(x) carries a point of the ODE dx/dt = b_t(x) from time s to time t. Written as a step with the
mean slope v, it is the identity at s = t, where the slope is the velocity: one network with two times holds both,

    X_{s,t}(x) = x + (t - s) v_{s,t}(x),        v_{t,t}(x) = b_t(x).

Flow matching trains the diagonal s = t. Off it, each of three identities that characterise the flow map becomes a loss
with the network's own diagonal, or its own shorter steps, as the teacher (self-distillation):

    Lagrangian   d/dt X_{s,t}(x) = b_t(X_{s,t}(x))                      LSD    a derivative in one time
    Eulerian     d/ds X_{s,t}(x) + grad X_{s,t}(x) b_s(x) = 0           ESD    also the Jacobian in x
    semigroup    X_{u,t}(X_{s,u}(x)) = X_{s,t}(x)                       PSD    no derivative, but a bootstrap

ESD to a fixed end t is continuous-time consistency training (and MeanFlow in another form), PSD with the midpoint and
discrete steps is a shortcut model. Given a frozen velocity b in place of the network's diagonal, LSD becomes LMD, the
distillation of flow map matching (Boffi et al. 2024).

In the miniature the data are the paper's checkerboard, judged by a KL divergence between histograms, which sees
the sharp edges that the sliced Wasserstein distance misses. All arms start from one network whose diagonal was
trained before: from scratch, so few steps leave no board to see (the paper needs no pre-training). The losses are
unweighted; --learned-weight adds the paper's weights exp(-w_{s,t}), made for images. Time runs as everywhere in this
library, noise at 1 and data at 0 (paper: the converse), so s >= t; all formulas stay as they are. Where the paper
leaves a choice the code is followed: all of ESD's Jacobian term under the stop-gradient ("full"), and PSD in slopes,
free of the factor (t - s)^2.

    python methods/flow_maps.py                       # 50 s on 2 CPU cores
    python methods/flow_maps.py --data cifar10        # one GPU; about 6 h, estimated (no --amp: forward mode)
    python methods/flow_maps.py --data my.npz         # own points or images
"""
import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common


@dataclass
class Config(common.Config):
    PRESETS: ClassVar[dict] = {
        "images": dict(width=32, depth=1, batch=64, teacher_steps=1000, teacher_lr=1e-3, steps=300, lr=1e-3,
                       eval_samples=2000),
        "cifar": dict(width=96, depth=2, batch=128, teacher_steps=50_000, steps=20_000, eval_samples=10_000,
                      teacher_lr=3e-4, lr=3e-4, ema=0.999, learned_weight=True),
        "smoke": dict(learned_weight=True)}

    data: Annotated[str, common.DATA_HELP] = "checkerboard"
    teacher_steps: Annotated[int, "flow-matching steps of the network from which all arms start"] = 4000
    teacher_lr: Annotated[float, "its learning rate, falling to 0 as a cosine"] = 1e-2
    steps: Annotated[int, "updates of every arm (paper: 400,000 on CIFAR-10)"] = 800
    lr: Annotated[float, "learning rate of Adam in all arms, falling to 0 as a cosine (paper: 1e-3)"] = 5e-3
    batch: Annotated[int, "samples an update (paper: 512 on CIFAR-10)", common.between(2)] = 256
    eta: Annotated[float, "share of the batch for the diagonal (paper: 0.75)", common.between(0.01, 0.99)] = 0.75
    ema: Annotated[float, "decay of the weights sampled from (paper: 0.999 to 0.9999)", common.between(0, 1)] = 0.99
    width: Annotated[int, "hidden width of the network"] = 128
    depth: Annotated[int, "hidden layers of the network (images: blocks a resolution)"] = 3
    stop_gradient: Annotated[bool, "LSD: of the velocity and its place; ESD: of the Jacobian term (paper: yes)"] = True
    psd: Annotated[Literal["midpoint", "uniform"], "where PSD splits a jump (paper: both)"] = "midpoint"
    learned_weight: Annotated[bool, "weigh each loss by exp(-w(s, t)), w learned (paper: on images)"] = False
    nfe_teacher: Annotated[int, "Euler steps along the diagonal for the reference samples", common.between(5)] = 50
    eval_samples: Annotated[int, "samples of each arm for the metrics"] = 20000


# ------------------------------------------------------------------------------------------- the objective
# v(x (B, ...), s (B,), t (B,)) -> (B, ...) is the slope of the flow map, b(x, t) a velocity: v's own diagonal
# (self-distillation) or a given one. All losses have one value a sample, (B,), a mean over its coordinates.

def flow_map(v, x, s, t):
    """X_{s,t}(x) = x + (t - s) v_{s,t}(x): the points x (B, ...) carried from times s (B,) to t (B,)."""
    return x + common.expand(t - s, x) * v(x, s, t)


def derivative(f, x, tangent):
    """f(x) and its directional derivative at x along tangent, by forward mode; gradients flow through both.

    Fused attention has no forward mode on GPUs, hence the plain kernel; nor do autocast's casts carry tangents."""
    with sdpa_kernel(SDPBackend.MATH), torch.autocast(x.device.type, enabled=False):
        return torch.func.jvp(f, (x,), (tangent.to(x.dtype),))


def squared(error):
    """Mean square of each sample's error: (B, ...) -> (B,)."""
    error = error.to(torch.promote_types(error.dtype, torch.float32))
    return error.square().flatten(1).mean(1)


def diagonal_loss(v, x_t, t, velocity):
    """Flow matching of v_{t,t}: x_t (B, ...) the interpolant at t (B,), velocity (B, ...) its time derivative."""
    return squared(v(x_t, t, t) - velocity)


def lagrangian_loss(v, b, x, s, t, stop_gradient=True):
    """LSD, or LMD for a frozen b: |d/dt X_{s,t}(x) - b_t(X_{s,t}(x))|^2, x (B, ...) the interpolant at s.

    Gradient flows through d/dt X = v + (t - s) dv/dt alone; b and the point where it is taken are under the stop-
    gradient. stop_gradient=False lets it through both, so also through the Jacobian of b.
    """
    end, slope = derivative(lambda t: flow_map(v, x, s, t), t, torch.ones_like(t))
    if not stop_gradient:
        return squared(slope - b(end, t))
    with torch.no_grad():
        velocity = b(end, t)
    return squared(slope - velocity)


def eulerian_loss(v, b, x, s, t, stop_jacobian=True):
    """ESD, or EMD for a frozen b: |d/ds X_{s,t}(x) + grad X_{s,t}(x) b_s(x)|^2, x (B, ...) the interpolant at s.

    Gradient flows through d/ds X = -v + (t - s) dv/ds; b_s(x) is always under the stop-gradient, and so is the whole
    second term ("full" in the official code) unless stop_jacobian=False ("convex").
    """
    with torch.no_grad():
        velocity = b(x, s)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not stop_jacobian):
        transport = derivative(lambda x: flow_map(v, x, s, t), x, velocity)[1]
    return squared(derivative(lambda s: flow_map(v, x, s, t), s, torch.ones_like(s))[1] + transport)


def progressive_loss(v, teacher, x, s, t, gamma):
    """PSD: the slope of one step against the mean slope of two, by way of u = gamma s + (1 - gamma) t.

    | v_{s,t}(x) - sg[ (1 - gamma) v_{s,u}(x) + gamma v_{u,t}(X_{s,u}(x)) ] |^2 with gamma (B,) in [0, 1], x (B, ...)
    the interpolant at s, and `teacher` v itself or an average of it: it gets no gradient.
    """
    u = gamma * s + (1 - gamma) * t
    with torch.no_grad():
        first = teacher(x, s, u)
        second = teacher(x + common.expand(u - s, x) * first, u, t)
        share = common.expand(gamma, x)
        target = (1 - share) * first + share * second
    return squared(v(x, s, t) - target)


@torch.no_grad()
def jump(v, noise, steps):
    """Sample by `steps` jumps of the flow map over even intervals from t = 1 to 0: noise (B, ...) -> (B, ...)."""
    times = torch.linspace(1, 0, steps + 1, device=noise.device)[:, None].expand(-1, len(noise))
    x = noise
    for s, t in zip(times[:-1], times[1:]):
        x = flow_map(v, x, s, t)
    return x


# ------------------------------------------------------------------------------------------- training

def slope(net, y=None):
    """v(x, s, t) of a two-time network for fixed labels."""
    return lambda x, s, t: net(x, s, y, t)


def velocity(net, y=None):
    """b(x, t) of a network for fixed labels: with two times its diagonal, where the second is the first."""
    return lambda x, t: net(x, t, y)


def off_diagonal_loss(cfg, method, v, b, x, s, t):
    """The loss of one of the methods, by name."""
    if method == "ESD":
        return eulerian_loss(v, b, x, s, t, cfg.stop_gradient)
    if method == "PSD":
        gamma = torch.full_like(s, 0.5) if cfg.psd == "midpoint" else torch.rand_like(s)
        return progressive_loss(v, v, x, s, t, gamma)
    return lagrangian_loss(v, b, x, s, t, cfg.stop_gradient)        # LSD or, with another b, LMD


def train(cfg, name, data, start, method=None, teacher=None, steps=None, lr=None):
    """Train a copy of `start`: by flow matching without a method; with one, by self-distillation; with a network as
    teacher by distillation of its velocity, which needs no diagonal loss. Returns the averaged network and the norm of
    the off-diagonal loss's gradient at every step."""
    net, average = copy.deepcopy(start).requires_grad_(True).train(), common.frozen(start)
    weight = cfg.place(common.MLP(1, 32, 1, times=2, out=1))
    torch.nn.init.zeros_(weight.head.weight)
    steps = steps or cfg.steps
    optimizer = torch.optim.Adam([*net.parameters(), *weight.parameters()], lr or cfg.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    norms = torch.zeros(steps, device=cfg.dev)
    n = cfg.batch if method is None else 0 if teacher else min(max(1, round(cfg.eta * cfg.batch)), cfg.batch - 1)
    parts = {"off-diagonal": slice(n, cfg.batch), "diagonal": slice(n)}
    parts = {term: part for term, part in parts.items() if part.stop > (part.start or 0)}
    progress = common.loop(cfg, name, steps, net=net, average=average, weight=weight, optimizer=optimizer,
                           schedule=schedule, norms=norms, preview=lambda: jump(
                               slope(average, data.labels(64)), torch.randn(64, *data.shape, device=cfg.dev), 1))
    for step in progress:
        x, y = data.sample(cfg.batch)
        noise, (s, t) = torch.randn_like(x), torch.rand(2, cfg.batch, device=cfg.dev)
        s, t = torch.maximum(s, t), torch.minimum(s, t)         # uniform on the triangle: off the diagonal ...
        s[:n] = t[:n] = torch.rand(n, device=cfg.dev)           # ... and uniform on it for the first n samples
        x_s, losses = common.interpolate(x, noise, s), {}
        optimizer.zero_grad(set_to_none=True)
        for term, part in parts.items():
            labels = None if y is None else y[part]
            v, b, at = slope(net, labels), velocity(teacher or net, labels), (x_s[part], s[part], t[part])
            with cfg.autocast():
                loss = off_diagonal_loss(cfg, method, v, b, *at) if term == "off-diagonal" else \
                    diagonal_loss(v, x_s[part], s[part], (noise - x)[part])
            losses[term] = loss.mean()
            if cfg.learned_weight:
                w = weight(s[part, None], s[part], None, t[part])[:, 0]
                loss = (-w).exp() * loss + w
            (loss.sum() / cfg.batch).backward()
            if term == "off-diagonal":      # its gradient alone, before the diagonal's is added
                norms[step] = torch.nn.utils.get_total_norm([p.grad for p in net.parameters()])
        optimizer.step()
        schedule.step()
        common.ema_update(average, net, min(cfg.ema, (step + 1) / (step + 10)))
        progress.losses(**losses)
    return average, norms


def pretrained(cfg, data):
    """The network from which every arm starts: two times, trained on the diagonal alone. Cached and frozen."""
    net = common.make_network(cfg, data, cfg.width, cfg.depth, times=2)

    def flow_matching():
        net.load_state_dict(train(cfg, "start", data, net, steps=cfg.teacher_steps, lr=cfg.teacher_lr)[0].state_dict())
    return common.trained(cfg, "flow-map-start", net, flow_matching, data=data.key, classes=data.classes,
                          batch=cfg.batch, steps=cfg.teacher_steps, lr=cfg.teacher_lr, ema=cfg.ema,
                          weight=cfg.learned_weight)


# ------------------------------------------------------------------------------------------- the experiment

@torch.no_grad()
def histogram_kl(real, samples, bins=32):
    """KL(data || samples) of 2-D points (N, 2), (M, 2) in nats, from histograms over the range of `real`, with half a
    count added to each of the bins^2 cells. Samples out of range count as mass that is elsewhere."""
    low, high = real.min(0)[0], real.max(0)[0]

    def density(x, extra):
        cell = ((x - low) / (high - low) * bins).floor().clamp(-1, bins).long()
        cell = torch.where(x == high, bins - 1, cell)
        cell = cell[((cell >= 0) & (cell < bins)).all(1)]
        counts = torch.bincount(cell[:, 0] * bins + cell[:, 1], minlength=bins**2) + extra
        return counts / (len(x) + extra * bins**2)
    p, q = density(real, 0.0), density(samples, 0.5)
    return torch.xlogy(p, p / q).sum().item()


def run(cfg, log):
    data = common.load_data(cfg)
    start = pretrained(cfg, data)
    n = cfg.eval_samples
    z, y = torch.randn(n, *data.shape, device=cfg.dev), data.labels(n)
    real, reference = data.sample(n)[0], data.sample(n)[0]
    panels, curves = [("data", real)], {}

    def record(arm, samples, nfe, show=False, **metrics):
        if data.shape == (2,):
            metrics["kl"] = histogram_kl(reference, samples)
        log(arm, **metrics, **common.quality(cfg, data, samples), nfe=nfe)
        if show:
            panels.append((arm, samples))

    record("data (floor)", real, 0)
    flow, _ = train(cfg, "flow matching, 1 step", data, start)
    for steps in (1, 2, 4, cfg.nfe_teacher):
        arm = f"flow matching, {steps} step{'s' * (steps > 1)}" if steps <= 4 else "flow matching, many steps"
        record(arm, common.sample_flow(flow, z, steps, y), steps, show=steps != 2)
    for method, teacher in {"ESD": None, "PSD": None, "LSD": None, "LMD": start}.items():
        net, norms = train(cfg, f"{method}, 1 step", data, start, method, teacher)
        blocks = norms[:cfg.steps // 20 * 20].view(20, -1) if cfg.steps >= 20 else norms[:, None]
        curves[method] = torch.linspace(0, cfg.steps, len(blocks)), blocks.mean(1)
        last = norms[cfg.steps // 2:]
        for steps in (1, 2, 4):
            record(f"{method}, {steps} step{'s' * (steps > 1)}", jump(slope(net, y), z, steps), steps,
                   show=steps == 1 or method == "LSD" and steps == 4, grad_cv=(last.std() / last.mean()).item())
        if method == "LSD":     # the same network as an ordinary velocity
            record("LSD, its diagonal, many steps", common.sample_flow(net, z, cfg.nfe_teacher, y), cfg.nfe_teacher)
    panels.append(("gradient norm off the diagonal", {"curves": curves, "x": "step", "logy": True}))
    log.picture(panels, columns=5, title=f"Flow maps on {cfg.data}: from noise to data in one jump")


CLAIMS = [
    common.Claim("LSD, 1 step", "<", "ESD, 1 step", metric="kl", margin=0.9,
                 says="in one jump the Lagrangian loss is closer to the data than the Eulerian one"),
    common.Claim("LSD, 1 step", "<", "PSD, 1 step", metric="kl", margin=0.75,
                 says="in one jump the Lagrangian loss is closer to the data than the progressive one"),
    common.Claim("LSD, 1 step", "<", "flow matching, 4 steps", metric="kl", margin=0.8,
                 says="one jump of the Lagrangian flow map is closer to the data than four steps of the flow"),
    common.Claim("ESD, 1 step", "<", "flow matching, 1 step", metric="sw2", margin=0.15,
                 says="one jump learned by the Eulerian loss is far better than one step of the flow"),
    common.Claim("PSD, 1 step", "<", "flow matching, 1 step", metric="sw2", margin=0.15,
                 says="one jump learned by the progressive loss is far better than one step of the flow"),
    common.Claim("LSD, 1 step", "<", "ESD, 1 step", metric="grad_cv",
                 says="the Lagrangian loss's gradient varies less in norm from step to step than the Eulerian one's"),
]
NOTES = """One LSD jump is closer to the board than one ESD jump on seeds 0-4 (the bound of the ratio is below 1), but
not clearly by the tenth that was claimed after 0.79 on the tuning seeds: undecided; the setting was not tuned again.
In sw2 LSD and ESD do not differ here; KL was chosen in tuning, after sw2 had not told them apart. Trained from
scratch for 1000 updates no method shows the board (nearly half of the samples lie off it): there LSD was ahead of ESD
in sw2 at a low constant learning rate (2e-3, ratio 0.72, two seeds) and no longer at a better one (1e-2, cosine).
Hence the trained start. 2e-3, 5e-3 and 1e-2 were tried alike for ESD, PSD and LSD, on one seed with 600 updates: the
order in KL stays. grad_cv is the deviation over the mean of the off-diagonal loss's gradient norm in the last half of
training, its slow fall included; it is noisy (in that trial LSD was above ESD at two of the three rates), so read the
claim as a tendency. Nothing diverged: the instability of ESD that the authors report on images is not visible here.
LMD is not on equal terms: all of its batch is off the diagonal and its teacher is frozen."""

if __name__ == "__main__":
    common.main(run, Config, CLAIMS)
