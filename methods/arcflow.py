"""ArcFlow - Unleashing 2-Step Text-to-Image Generation via High-Precision Non-Linear Flow Distillation
Paper: Yang et al., arXiv 2026, arXiv:2602.09014
Code: pnotp/ArcFlow (lakonlab/models/diffusions/arcflow.py, policies/arcflow.py, architecture/arcflow/arcflux.py)
Family: flow map. Distils: a many-step flow sampler into two network calls that each follow a curve.

A sampler of a few steps goes straight inside each of them while the teacher's tangent keeps turning. ArcFlow lets one
network call at the start t_src of a step return a whole curve of velocities, a mixture of K "momentum" modes,

    v(t) = sum_k pi_k m_k gamma_k^(t_src - t),      gamma_0 = 1 (the straight shortcut),      t <= t_src,

m_k velocities, pi_k softmax weights, gamma_k > 0 a growth a unit of time. With g = log gamma, phi(y) = (e^y - 1) / y,

    x(t_b) = x(t_a) - (t_a - t_b) sum_k pi_k m_k exp(g_k (t_src - t_a)) phi(g_k (t_a - t_b))

is exact, without discretisation error. Training imitates the teacher's velocity at states of the student's own curve.

In the miniature all weights of the student are trained (paper: LoRA, < 5 % of them) and time is not warped (FLUX:
--shift 3.2). "linear" is the same training with K = 1, gamma = 1, "constant mixture" ArcFlow's network with gamma = 1;
"chord regression" learns the way to where the teacher arrives, from twice the calls. The official code is followed (of
the paper only the abstract was read), but for its window of 3/128, which imitates a 43-step Euler sampler.

    python methods/arcflow.py                       # 45 s on 2 CPU cores
    python methods/arcflow.py --data cifar10 --amp  # one GPU; about 5 h, estimated. Also shapes, my.npz
"""
import copy
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
from common import expand


@dataclass
class Config(common.Config):
    PRESETS: ClassVar[dict] = {
        "images": dict(width=32, depth=1, batch=32, teacher_steps=1000, steps=300, lr=3e-4, eval_samples=512),
        "cifar": dict(width=96, depth=2, batch=128, teacher_steps=50_000, steps=20_000, eval_samples=10_000, lr=1e-4,
                      inside=4),
        "smoke": dict(inside=4, substeps=1, chord_steps=1)}

    data: Annotated[str, common.DATA_HELP] = "pinwheel"
    steps: Annotated[int, "optimiser steps of every student (paper: 10,000)"] = 1000
    batch: Annotated[int, "noises a step"] = 256
    width: Annotated[int, "hidden width of teacher and student"] = 64
    depth: Annotated[int, "hidden layers (images: blocks a resolution)"] = 3
    teacher_steps: Annotated[int, "flow-matching steps of the teacher"] = 2000
    nfe: Annotated[int, "network calls of a student, in training and sampling (paper: 2)"] = 2
    modes: Annotated[int, "K, momentum modes of ArcFlow (paper: 16)", common.between(2)] = 8
    shift: Annotated[float, "s of t = s tau / (1 + (s - 1) tau) (paper: 3.2 on FLUX)", common.between(0.01)] = 1.0
    states: Annotated[int, "n, states of a segment where the teacher is asked (paper: 4)"] = 4
    window: Annotated[float, "time of which predictions are means (paper: 3/128)", common.between(0, 1)] = 0.0
    dropout: Annotated[float, "share of modes dropped for the states (paper: 0.1)", common.between(0, 0.99)] = 0.1
    decay: Annotated[float, "part of training with teacher moves (paper: 0.2)", common.between(0, 1)] = 0.2
    init_noise: Annotated[float, "noise on the biases of the K copies of the teacher's head (paper: 0.05)"] = 0.05
    lr: Annotated[float, "learning rate (paper: 1e-4, LoRA)"] = 5e-3
    gamma_lr: Annotated[float, "learning rate of the gamma head, relative to lr (paper: 0.1)"] = 1.0
    warmup: Annotated[int, "steps of linear warm-up (paper: 100)"] = 100
    ema_gamma: Annotated[float, "exponent of the power-function average of the weights (paper: 7)"] = 7.0
    chord_steps: Annotated[int, "Heun steps of the teacher along each chord; twice as many calls"] = 4
    inside: Annotated[int, "parts of a step at whose borders paths are compared", common.between(2)] = 16
    substeps: Annotated[int, "Heun steps of the reference path in each such part"] = 3
    eval_samples: Annotated[int, "noises from which every arm is judged"] = 4096


# ------------------------------------------------------------------------------------------- the objective

def phi(y):
    """(e^y - 1) / y, with its limit 1 and its derivative 1/2 at y = 0 (the official code has max(|y|, 1e-4))."""
    small = y.abs() < 1e-4
    safe = torch.where(small, torch.ones_like(y), y)       # no 0/0 in the branch not taken, nor in its gradient
    return torch.where(small, 1 + y / 2, torch.expm1(safe) / safe)


def mean_velocity(policy, since, duration):
    """Mean velocity of a momentum mixture from the time t_src - since on, over `duration`; at duration 0 it is v(t).

    policy: m (B, K, ...), logits of pi and log gamma g (B, K, 1, ...), shared by all channels; g[:, 0] = 0.
    since = t_src - t_a and duration = t_a - t_b: (B,), >= 0, in the warped time. Returns (B, ...), with gradient to
    all three. Official momentum_integration and, for duration 0, ArcFlowPolicy.velocity.
    """
    m, logits, g = policy
    growth = torch.exp(g * expand(since, g)) * phi(g * expand(duration, g))
    return (logits.softmax(1) * growth * m).sum(1)


def move(policy, x, t_src, t_a, t_b):
    """From x (B, ...) at t_a to t_b <= t_a along the curve that starts at t_src >= t_a, exactly; times (B,)."""
    return x - expand(t_a - t_b, x) * mean_velocity(policy, t_src - t_a, t_a - t_b)


def drop_modes(logits, p):
    """Mixture logits (B, K, ...) with each mode of each sample at -inf with probability p, never all of them."""
    drop = torch.rand(logits.shape[:2], device=logits.device) < p
    drop &= ~drop.all(1, keepdim=True)
    return logits.masked_fill(drop.view(*drop.shape, *[1] * (logits.dim() - 2)), -math.inf)


def imitation_loss(teacher, policy, x_src, tau_src, size, ratio, states, window, dropout, warp):
    """Mixed trajectory imitation over one segment: the student's mean velocity against the teacher's velocity at
    `states` states on the way from tau_src (B,) to tau_src - size (piid_segment_momentum of the official code).

    teacher(x, t) -> velocity. policy: the network's output at (x_src, warp(tau_src)). Between two states the student's
    curve goes on for a random time, then the teacher takes an Euler step; of the segment, less `window`, the teacher
    covers the share `ratio` in [0, 1]. Gradient flows through the predicted velocities into the policy, not through
    the states, which come from a copy with some modes dropped. Returns the loss, a mean over states and elements
    (official: times 15 and the segment's length), and the state at the segment's end, detached.
    """
    B, window = len(x_src), min(window, size)
    m, logits, g = (part.detach() for part in policy)
    rollout = (m, drop_modes(logits, dropout), g)
    cuts = F.pad(torch.rand(B, states, device=x_src.device).sort(1)[0], (1, 0))
    student_times = (1 - ratio) * (size - window) * cuts.diff(dim=1)
    cuts = F.pad(torch.rand(B, states - 1, device=x_src.device).sort(1)[0], (1, 0))
    teacher_times = ratio * (size - window) * F.pad(cuts, (0, 1), value=1.0).diff(dim=1)
    x, tau, t_src, loss = x_src.detach(), tau_src, warp(tau_src), 0.0
    for i in range(states):
        tau_a = tau - student_times[:, i]
        tau_b = tau_a - teacher_times[:, i]
        t_a, t_b, t_end = warp(tau_a), warp(tau_b), warp(tau_b - window)
        with torch.no_grad():
            x_a = move(rollout, x, t_src, warp(tau), t_a)
            target = teacher(x_a, t_a)
            x, tau = x_a + expand(t_b - t_a, x) * target, tau_b
        loss = loss + F.mse_loss(mean_velocity(policy, t_src - t_a, t_a - t_end), target)
    return loss / states, move(rollout, x, t_src, warp(tau), warp(tau_src - size))


def chord_loss(teacher, policy, x_src, times):
    """The baseline: the mean velocity from times[0] to times[-1] against the chord of the teacher's own path between
    them, from x_src by Heun steps along `times` (N+1,), two calls each. Returns what imitation_loss does."""
    t_src, t_dst = full(x_src, times[0].item()), full(x_src, times[-1].item())
    with torch.no_grad():
        chord = (x_src - common.solve(teacher, x_src, times, "heun")) / expand(t_src - t_dst, x_src)
        x_dst = move(policy, x_src, t_src, t_src, t_dst)
    return F.mse_loss(mean_velocity(policy, torch.zeros_like(t_src), t_src - t_dst), chord), x_dst


def full(x, value):
    """(B,) filled with one value, for x (B, ...)."""
    return x.new_full((len(x),), value)


def warped(tau, shift):
    """Raw time in [0, 1] to flow time; shift > 1 spends more of the steps near the noise."""
    return shift * tau / (1 + (shift - 1) * tau)


# ------------------------------------------------------------------------------------------- the student

class MomentumNetwork(nn.Module):
    """The teacher with heads for a momentum mixture: net(x, t, y) -> m (B, K, ...), logits and g (B, K, 1, ...). It
    needs hidden() and a Linear or Conv2d `head`; every m_k starts as its velocity. momentum=False freezes gamma = 1."""

    def __init__(self, teacher: nn.Module, modes: int, momentum: bool = True, init_noise: float = 0.05):
        super().__init__()
        self.trunk, head, self.modes = copy.deepcopy(teacher), teacher.head, modes
        self.trunk.head = nn.Identity()

        def new_head(outputs):
            if isinstance(head, nn.Conv2d):
                return nn.Conv2d(head.in_channels, outputs, head.kernel_size, padding=head.padding)
            return nn.Linear(head.in_features, outputs)
        self.velocity, self.logits = new_head(modes * len(head.bias)), new_head(modes)
        self.log_gamma = new_head(modes - 1) if momentum else None
        self.requires_grad_(True)
        with torch.no_grad():
            self.velocity.weight.copy_(head.weight.repeat(modes, *[1] * (head.weight.dim() - 1)))
            self.velocity.bias.copy_(head.bias.repeat(modes))
            if modes > 1:       # else all modes would stay equal
                self.velocity.bias.add_(init_noise * torch.randn_like(self.velocity.bias))
            self.logits.weight.zero_(), self.logits.bias.zero_()
            if momentum:
                self.log_gamma.weight.zero_()
                self.log_gamma.bias.copy_(torch.linspace(math.log(0.2), math.log(4.0), modes - 1))

    def forward(self, x, t, y=None):
        h = self.trunk.hidden(x, t, y)
        logits = self.logits(h).unsqueeze(2)
        g = torch.zeros_like(logits)
        if self.log_gamma is not None:
            g = torch.cat([g[:, :1], self.log_gamma(h).unsqueeze(2)], 1)
        return self.velocity(h).unflatten(1, (self.modes, -1)), logits, g


@torch.no_grad()
def sample(student, noise, y, nfe, warp, inside=1):
    """States (nfe * inside + 1, B, ...) at even raw times: one network call a segment, then moves on its curve."""
    path = [noise]
    for j in range(nfe):
        x, t_src = path[-1], warp(full(noise, 1 - j / nfe))
        policy = student(x, t_src, y)
        path += [move(policy, x, t_src, t_src, warp(full(x, 1 - (j + (i + 1) / inside) / nfe))) for i in range(inside)]
    return torch.stack(path)


# ------------------------------------------------------------------------------------------- training

def train(cfg, name, data, teacher, modes, momentum, segment_loss):
    """One student: a step is a rollout over all segments from fresh noise, each started where the last ended.
    segment_loss(policy, x_src, tau_src, y, ratio) -> loss and the next segment's start; tau_src is a number."""
    with common.seeded(cfg.seed):
        student = cfg.place(MomentumNetwork(teacher, modes, momentum, cfg.init_noise))
    average = copy.deepcopy(student).requires_grad_(False)
    gamma_head = [p for n, p in student.named_parameters() if "log_gamma" in n]
    others = [p for n, p in student.named_parameters() if "log_gamma" not in n]
    groups = [dict(params=others, lr=cfg.lr), dict(params=gamma_head, lr=cfg.lr * cfg.gamma_lr)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / cfg.warmup))
    progress = common.loop(cfg, name, student=student, average=average, optimizer=optimizer, schedule=schedule,
                           preview=lambda: sample(average, torch.randn(64, *data.shape, device=cfg.dev),
                                                  data.labels(64), cfg.nfe, lambda u: warped(u, cfg.shift))[-1])
    for step in progress:
        ratio = max(0.0, 1 - step / (cfg.decay * cfg.steps)) if cfg.decay else 0.0
        x, y = torch.randn(cfg.batch, *data.shape, device=cfg.dev), data.labels(cfg.batch)
        loss = 0.0
        for j in range(cfg.nfe):
            tau = 1 - j / cfg.nfe
            with cfg.autocast():
                policy = student(x, full(x, warped(tau, cfg.shift)), y)
                part, x = segment_loss([p.float() for p in policy], x, tau, y, ratio)
            loss = loss + part / cfg.nfe        # weighted with the length of the segment
        common.update(optimizer, loss, clip=50)
        schedule.step()
        common.ema_update(average, student, (1 - 1 / (step + 1)) ** (cfg.ema_gamma + 1))
        progress.losses(loss=loss)
    return average.eval()


# ------------------------------------------------------------------------------------------- the experiment

def run(cfg, log):
    data = common.load_data(cfg)
    teacher = common.flow_teacher(cfg, data, cfg.width, cfg.depth)
    size = 1 / cfg.nfe

    def warp(tau):
        return warped(tau, cfg.shift)

    def velocity(y):
        return lambda x, t: teacher(x, t, y)

    def imitate(policy, x, tau, y, ratio):
        settings = size, ratio, cfg.states, cfg.window, cfg.dropout, warp
        return imitation_loss(velocity(y), policy, x, full(x, tau), *settings)

    def regress_chord(policy, x, tau, y, ratio):
        return chord_loss(velocity(y), policy, x, warp(torch.linspace(tau, tau - size, cfg.chord_steps + 1)))

    noise, y = torch.randn(cfg.eval_samples, *data.shape, device=cfg.dev), data.labels(cfg.eval_samples)
    real = data.sample(cfg.eval_samples)[0]
    grid = cfg.nfe * cfg.inside

    def teacher_path(steps, method="euler"):
        return common.solve(velocity(y), noise, warp(torch.linspace(1, 0, steps + 1)), method, path=True)
    reference = teacher_path(grid * cfg.substeps, "heun")[::cfg.substeps]
    inside_steps = [i for i in range(grid) if i % cfg.inside]
    paths, errors = dict(teacher=reference), {}

    def record(arm, path, nfe, **more):
        """path (grid + 1, B, ...). Logs the rmse of a coordinate at the end and, path_rmse, inside the steps."""
        error = (path - reference).square().flatten(1).mean(1).sqrt()
        log(arm, **common.quality(cfg, data, path[-1]), rmse=error[-1],
            path_rmse=error[inside_steps].square().mean().sqrt(), nfe=nfe, **more)
        paths[arm], errors[arm] = path, (1 - warp(torch.linspace(1, 0, grid + 1)), error)

    log("data (floor)", **common.quality(cfg, data, real), nfe=0)
    log("teacher, reference", **common.quality(cfg, data, reference[-1]), nfe=2 * grid * cfg.substeps)
    record(f"teacher, {grid} steps", teacher_path(grid), grid)
    untrained = cfg.place(MomentumNetwork(teacher, 1, momentum=False))      # makes Euler steps of the teacher
    record(f"teacher, {cfg.nfe} steps", sample(untrained, noise, y, cfg.nfe, warp, cfg.inside), cfg.nfe)
    for arm, modes, momentum, segment_loss, calls in (
            ("chord regression", 1, False, regress_chord, 2 * cfg.chord_steps),
            ("linear", 1, False, imitate, cfg.states),
            ("constant mixture", cfg.modes, False, imitate, cfg.states),
            ("arcflow", cfg.modes, True, imitate, cfg.states)):
        student = train(cfg, arm, data, teacher, modes, momentum, segment_loss)
        record(arm, sample(student, noise, y, cfg.nfe, warp, cfg.inside), cfg.nfe, teacher_calls=cfg.nfe * calls)
    log.picture(picture(cfg, real, paths, errors), title=f"ArcFlow on {cfg.data}, {cfg.nfe} network calls; "
                "below, axes stretched: four of the teacher's most bent paths")


def picture(cfg, real, paths, errors):
    """Samples, the error along the way, and four of the most bent paths in the teacher's two principal directions."""
    panels = [("data", real), ("teacher", paths["teacher"][-1]), (f"arcflow, {cfg.nfe} calls", paths["arcflow"][-1]),
              ("distance from its path", dict(curves=dict(list(errors.items())[2:]), x="1 - t", y="rmse"))]
    lines = {k: F.pad(paths[k][:, :1000].flatten(2).float().cpu(), (0, 1)) for k in ("teacher", "linear", "arcflow")}
    centre = lines["teacher"].mean(0)
    bend = torch.linalg.svdvals((lines["teacher"] - centre).transpose(0, 1))[:, 1]
    for i in bend.argsort(descending=True)[:64:16].tolist():
        plane = torch.linalg.svd(lines["teacher"][:, i] - centre[i], full_matrices=False)[2][:2].T
        curves = {k: ((line[:, i] - centre[i]) @ plane).T for k, line in lines.items()}
        curves["linear"] = curves["linear"][:, ::cfg.inside]    # drawn with dots: the borders of its steps
        panels.append(("a bent path", dict(curves={k: tuple(v) for k, v in curves.items()})))
    return panels


CLAIMS = [
    common.Claim("arcflow", "<", "linear", metric="path_rmse", margin=0.5,
                 says="inside its two steps ArcFlow is far nearer the teacher's path than a student going straight"),
    common.Claim("arcflow", "<", "linear", metric="rmse", margin=0.75,
                 says="following the curve also brings the end point closer to the teacher's"),
    common.Claim("arcflow", "<", "constant mixture", metric="rmse", margin=0.75,
                 says="it is the momenta that do it: with gamma frozen at 1 the same network gains nothing"),
]
NOTES = """rmse is a coordinate's distance from the teacher's exact path (Heun, 96 steps), at its end or, path_rmse,
inside the two steps. Chord regression, shown the true end of each step, ends nearer than ArcFlow (0.018 against 0.026;
32 Euler steps of the teacher: 0.029) and is worst inside the steps. Tuned on seeds 100 to 110, one learning rate for
all arms. Away from the paper: window 0 (with 3/128, seed 106, students end farther off: linear 0.055, ArcFlow 0.036), and
the full learning rate for the gamma head (a tenth: path 0.018 for 0.013). Spirals, checkerboard: path ratio 0.16, 0.15."""

if __name__ == "__main__":
    common.main(run, Config, CLAIMS)
