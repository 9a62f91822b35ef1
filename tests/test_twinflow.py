"""TwinFlow: targets against closed forms, direction of the rectification, where gradients must and must not flow."""
import math
from typing import ClassVar

import pytest
import torch
import torch.nn as nn
from conftest import load_method

import common

twinflow = load_method("twinflow")
B, D = 64, 3


def point_flow(c):
    """The flow from noise to the single point c, at both signs of time: every average velocity is (x - c) / |t|."""
    return lambda x, t, y, s: (x - c) / t.abs().clamp_min(1e-9)[:, None]


def curved(x, t, y, s):
    """Some smooth network without structure."""
    return torch.sin(x.roll(1, 1) + 2 * t[:, None]) + x * (s - 0.3 * t)[:, None]


@pytest.fixture
def draw():
    torch.manual_seed(0)
    t = 0.05 + 0.95 * torch.rand(B, dtype=torch.float64)
    s = t - torch.rand_like(t) * t
    x, z = torch.randn(2, B, D, dtype=torch.float64)
    return x, z, t, s


def test_any_step_target_is_a_fixed_point_of_the_exact_flow(draw):
    _, z, t, s = draw
    c = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    x_t, v = common.interpolate(c.expand(B, D), z, t), z - c
    for order in (1, 2, 3):
        target = twinflow.any_step_target(point_flow(c), v, v, x_t, t, s, order=order)
        torch.testing.assert_close(target, v, rtol=0, atol=1e-9)


def test_any_step_target_of_order_one_is_the_discrete_mean_flow_target(draw):
    x, z, t, s = draw
    delta, v, x_t = 0.01, z - x, common.interpolate(x, z, t)
    s = torch.minimum(s, t - 2 * delta)
    ahead = (t - delta - s)[:, None] * curved(x_t - delta * v, t - delta, None, s)
    mean_flow = (delta * v + ahead) / (t - s)[:, None]      # (t - s) F(x_t, t, s) = delta v + (t - delta - s) F^-(...)
    near = mean_flow + 1e-3 * torch.randn_like(v)            # near enough that the clamp does nothing
    target = twinflow.any_step_target(curved, near, v, x_t, t, s, order=1, delta=delta)
    expected = near - (t - s)[:, None] / delta * (near - mean_flow)
    torch.testing.assert_close(target, expected, rtol=0, atol=1e-9)
    far = mean_flow + 5 * delta / (t - s)[:, None]          # error 5, clamped to 1
    torch.testing.assert_close(twinflow.any_step_target(curved, far, v, x_t, t, s, order=1, delta=delta), far - 1)


def test_any_step_target_of_order_two_adds_both_halves(draw):
    x, z, t, s = draw
    v, x_t, s = z - x, common.interpolate(x, z, t), torch.minimum(s, t - 0.02)
    start, x_1 = t - 0.01, x_t - 0.01 * v
    half = ((start - s) / 2)[:, None]
    first = half * curved(x_1, start, None, (start + s) / 2)
    second = half * curved(x_1 - first, (start + s) / 2, None, s)
    F_t = (0.01 * v + first + second) / (t - s)[:, None]
    torch.testing.assert_close(twinflow.any_step_target(curved, F_t, v, x_t, t, s), F_t, rtol=0, atol=1e-9)


def test_any_step_target_below_delta_is_the_velocity_and_finite(draw):
    x, z, t, _ = draw
    v, x_t = z - x, common.interpolate(x, z, t)
    for gap in (0.0, 0.009):
        target = twinflow.any_step_target(curved, v + 0.5, v, x_t, t, t - gap)
        torch.testing.assert_close(target, v)
        torch.testing.assert_close(twinflow.any_step_target(curved, v + 3, v, x_t, t, t - gap), v + 2)


def test_any_step_target_carries_no_gradient(draw):
    x, z, t, s = draw
    F_t = torch.randn(B, D, dtype=torch.float64, requires_grad=True)
    assert not twinflow.any_step_target(curved, F_t, z - x, common.interpolate(x, z, t), t, s).requires_grad


def test_rectification_has_the_gradient_of_the_velocity_difference(draw):
    x, z, t, _ = draw
    weight = torch.ones(D, dtype=torch.float64, requires_grad=True)

    def network(x, t, y, s):
        return weight * curved(x, t, y, s)
    F_fake = torch.randn(B, D, dtype=torch.float64, requires_grad=True)
    x_fake = z - F_fake
    twinflow.rectification_loss(network, F_fake, x_fake, x, t).backward()
    x_t = common.interpolate(x_fake.detach(), x, t)
    difference = (curved(x_t, -t, None, -t) - curved(x_t, t, None, t)).detach()
    torch.testing.assert_close(F_fake.grad, 2 * difference / F_fake.numel())
    assert weight.grad is None
    F_fake.grad = None
    twinflow.rectification_loss(network, F_fake, z - F_fake, x, t, limit=0.1).backward()
    torch.testing.assert_close(F_fake.grad, 2 * difference.clamp(-0.1, 0.1) / F_fake.numel())


def test_rectification_moves_the_fakes_towards_the_data(draw):
    _, z, t, _ = draw
    real, fake = torch.full((D,), 1.5, dtype=torch.float64), torch.full((D,), -0.5, dtype=torch.float64)

    def network(x, t, y, s):
        return torch.where(t[:, None] > 0, point_flow(real)(x, t, y, s), point_flow(fake)(x, t, y, s))
    F_fake = (z - fake).requires_grad_(True)
    twinflow.rectification_loss(network, F_fake, z - F_fake, torch.randn_like(z), t).backward()
    moved = z - (F_fake - 0.1 * F_fake.grad)
    assert ((moved - real).abs() < (fake - real).abs()).all()


def test_fake_flow_loss_is_flow_matching_at_negative_times_without_gradient_to_the_fakes(draw):
    x, z, t, _ = draw
    fake, seen = torch.full((D,), 0.7, dtype=torch.float64), []

    def network(x, t, y, s):
        seen.append((t, s))
        return scale * point_flow(fake)(x, t, y, s)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    assert twinflow.fake_flow_loss(network, fake.expand(B, D), z, t).item() == pytest.approx(0, abs=1e-20)
    assert torch.equal(seen[0][0], -t) and torch.equal(seen[0][1], -t)
    x_fake = x.clone().requires_grad_(True)
    twinflow.fake_flow_loss(network, x_fake, z, t).backward()
    assert x_fake.grad is None and scale.grad.abs() > 0


def test_warm_decay_climbs_from_zero_to_its_final_value():
    decays = [0.0]
    for _ in range(2000):
        decays.append(twinflow.warm_decay(decays[-1], 0.99))
    assert decays[1] == pytest.approx(0.495) and decays[2] == pytest.approx(0.495 + 0.505 * 0.495 / 2)
    assert all(a <= b for a, b in zip(decays, decays[1:])) and decays[-1] == pytest.approx(0.99, abs=1e-3)


def test_generate_reaches_the_data_of_the_exact_flow_in_any_number_of_steps():
    c, calls = torch.tensor([0.3, -1.0, 2.0]), []

    def network(x, t, y, s):
        calls.append((t[0].item(), s.abs().max().item(), (x - (1 - t[:, None]) * c) / t[:, None]))
        return point_flow(c)(x, t, y, s)
    for steps in (1, 3):
        x = twinflow.generate(network, torch.randn(2000, D), None, steps)
        torch.testing.assert_close(x, c.expand(2000, D), rtol=0, atol=1e-5)
    assert [round(t, 3) for t, *_ in calls] == [1, 1, 0.667, 0.333] and all(s == 0 for _, s, _ in calls)
    for *_, noise in calls:         # x_t = (1 - t) c + t noise
        assert noise.mean(0).abs().max() < 0.1 and (noise.std(0) - 1).abs().max() < 0.1
    assert (calls[2][2] - calls[1][2]).abs().mean() > 0.5       # the noise is fresh


@pytest.mark.parametrize("data, kind", [("checkerboard", "mlp"), ("glyphs", "mlp"), ("shapes", "unet")])
def test_network_tells_a_time_from_its_twin(data, kind):
    cfg = twinflow.Config(data=data, network=kind, width=16, depth=1)
    points = common.load_data(cfg, False)
    net, t = twinflow.make_velocity(cfg, points), torch.rand(4) * 0.9 + 0.1
    with torch.no_grad():
        for p in net.parameters():      # the U-Net starts with zeros on which the time has no effect
            p.add_(0.1 * torch.randn_like(p))
        x = torch.randn(4, *points.shape)
        real, fake = net(x, t, None, t), net(x, -t, None, -t)
    assert real.shape == x.shape and (real - fake).abs().flatten(1).max(1)[0].min() > 1e-3


class Spy(nn.Module):
    """A network that writes down, in one list for all its copies, its times and whether a gradient is asked for."""
    seen: ClassVar[list] = []

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x, t, y=None, s=None):
        Spy.seen.append((t, s, torch.is_grad_enabled() and self.linear.weight.requires_grad))
        return self.linear(x) + t[:, None]


@pytest.mark.parametrize("options, grad, no_grad", [
    (dict(velocity=False, adv=False, rectify=False), 1, 2), (dict(adv=False, rectify=False), 2, 2),
    (dict(), 4, 4), (dict(adv=False), 3, 4), (dict(endpoint=True), 4, 6)])
def test_training_calls_what_each_arm_needs(options, grad, no_grad):
    Spy.seen.clear()
    cfg = twinflow.Config(data="checkerboard", steps=1, batch=8)
    data = common.load_data(cfg, False)
    twinflow.train(cfg, "arm", data, Spy(), 1e-3, **options)
    assert sum(g for *_, g in Spy.seen) == grad and sum(not g for *_, g in Spy.seen) == no_grad
    negative = [g for t, _, g in Spy.seen if (t < 0).any()]
    expected = [True] * options.get("adv", True) + [False] * options.get("rectify", True)
    assert negative == expected      # the twin is trained by L_adv and only read by L_rectify
    one_step = [g for t, s, g in Spy.seen if (t == 1).all() and (s == 0).all()]
    assert one_step == ([True] if expected else [])
    for t, s, _ in Spy.seen:
        assert (s.abs() <= t.abs() + 1e-6).all() and math.isfinite(float(t.sum()))
