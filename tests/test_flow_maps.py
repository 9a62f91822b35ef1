"""Flow maps: the losses vanish at the exact map of a Gaussian and only there; derivatives, gradients, sampling."""
import math

import pytest
import torch
from conftest import load_method

import common

fm = load_method("flow_maps")
MEAN, STD = torch.tensor([0.7, -1.1], dtype=torch.float64), 0.4


def statistics(t):
    """Mean (B, 2) and standard deviation (B, 1) of the interpolant of N(MEAN, STD^2) and noise at t (B,)."""
    t = t[:, None]
    return (1 - t) * MEAN, ((1 - t)**2 * STD**2 + t**2).sqrt()


def exact_velocity(x, t):
    """d mean/dt + (d std/dt) / std (x - mean): the velocity of a Gaussian flow."""
    mean, std = statistics(t)
    rate = (t[:, None] - (1 - t[:, None]) * STD**2) / std**2
    return -MEAN + rate * (x - mean)


def exact_slope(x, s, t):
    """(X_{s,t}(x) - x) / (t - s) for s != t, X the affine map between the two Gaussians."""
    (mean_s, std_s), (mean_t, std_t) = statistics(s), statistics(t)
    return (mean_t + std_t / std_s * (x - mean_s) - x) / (t - s)[:, None]


def times(n=64):
    t = 0.9 * torch.rand(n, dtype=torch.float64)
    return t + 0.02 + (0.98 - t) * torch.rand(n, dtype=torch.float64), t       # s > t


def loss(name, v, b, x, s, t, **options):
    if name == "progressive":
        return fm.progressive_loss(v, v, x, s, t, options.get("gamma", torch.rand_like(s)))
    return {"lagrangian": fm.lagrangian_loss, "eulerian": fm.eulerian_loss}[name](v, b, x, s, t, **options)


LOSSES = ("lagrangian", "eulerian", "progressive")


@pytest.fixture
def setting():
    torch.manual_seed(0)
    s, t = times()
    mean, std = statistics(s)
    return mean + std * torch.randn(len(s), 2, dtype=torch.float64), s, t


@pytest.fixture
def net():
    torch.manual_seed(1)
    net = common.MLP(2, 16, 2, times=2).double()
    for p in net.parameters():      # clearly not linear
        p.data *= 3
    return net


def test_the_exact_gaussian_is_exact():
    """The velocity of the tests integrates to their map, so that the losses are judged against the truth."""
    x, one = torch.randn(50, 2, dtype=torch.float64), torch.ones(50, dtype=torch.float64)
    end = common.solve(exact_velocity, x, torch.linspace(1, 0, 401, dtype=torch.float64), "heun")
    assert torch.allclose(end, fm.flow_map(exact_slope, x, one, 0 * one), atol=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_off_diagonal_losses_vanish_at_the_exact_map(name, setting):
    x, s, t = setting
    assert loss(name, exact_slope, exact_velocity, x, s, t).shape == (64,)
    assert loss(name, exact_slope, exact_velocity, x, s, t).max() < 1e-5
    bent = loss(name, lambda x, s, t: exact_slope(x, s, t) + s[:, None] * t[:, None], exact_velocity, x, s, t)
    assert bent.mean() > 1e-4


@pytest.mark.parametrize("name", ["lagrangian", "eulerian"])
def test_the_other_direction_of_time_too(name, setting):
    """The identities do not ask that s > t: the paper's direction is the same code."""
    x, s, t = setting
    assert loss(name, exact_slope, exact_velocity, x, t, s).max() < 1e-5


def test_diagonal_loss_is_least_at_the_velocity():
    """Its minimum is the conditional variance of dI/dt, STD^2 / (variance of the interpolant)."""
    torch.manual_seed(0)
    n = 200_000
    x, noise = MEAN + STD * torch.randn(n, 2, dtype=torch.float64), torch.randn(n, 2, dtype=torch.float64)
    t = torch.full((n,), 0.3, dtype=torch.float64)
    x_t, std = common.interpolate(x, noise, t), statistics(t[:1])[1]
    found = fm.diagonal_loss(lambda x, s, t: exact_velocity(x, t), x_t, t, noise - x)
    assert math.isclose(found.mean(), STD**2 / std**2, rel_tol=0.02)


@pytest.mark.parametrize("shape", [(2,), (1, 4, 4)])
def test_the_map_from_a_time_to_itself_is_the_identity(shape):
    x, t = torch.randn(5, *shape), torch.rand(5)
    assert torch.equal(fm.flow_map(lambda x, s, t: 3 * x + 1, x, t, t), x)


def test_lagrangian_loss_by_hand(net, setting):
    """The derivative in t by central differences, b at the end of the jump."""
    x, s, t = setting
    v, h = fm.slope(net), 1e-5
    slope = (fm.flow_map(v, x, s, t + h) - fm.flow_map(v, x, s, t - h)) / (2 * h)
    b = fm.velocity(net)
    expected = (slope - b(fm.flow_map(v, x, s, t), t)).square().mean(1)
    assert torch.allclose(fm.lagrangian_loss(v, b, x, s, t), expected, rtol=1e-6, atol=1e-10)


def test_eulerian_loss_by_hand(net, setting):
    """The total derivative along the flow: d/dh X_{s+h,t}(x + h b_s(x))."""
    x, s, t = setting
    v, b, h = fm.slope(net), fm.velocity(net), 1e-5
    drift = (fm.flow_map(v, x + h * b(x, s), s + h, t) - fm.flow_map(v, x - h * b(x, s), s - h, t)) / (2 * h)
    assert torch.allclose(fm.eulerian_loss(v, b, x, s, t), drift.square().mean(1), rtol=1e-6, atol=1e-10)


def test_progressive_loss_is_the_semigroup_error_over_the_interval(net, setting):
    x, s, t = setting
    v, gamma = fm.slope(net), torch.rand(64, dtype=torch.float64)
    u = gamma * s + (1 - gamma) * t
    two = fm.flow_map(v, fm.flow_map(v, x, s, u), u, t)
    expected = ((fm.flow_map(v, x, s, t) - two) / (t - s)[:, None]).square().mean(1)
    assert torch.allclose(fm.progressive_loss(v, v, x, s, t, gamma), expected, rtol=1e-9)


def gradients(value, net):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value.mean(), list(net.parameters()))])


def constant_target(name, net, x, s, t, gamma, h=1e-5):
    """Each loss with its stopped part put in as a number and the derivative by differences: the gradient to have."""
    v, b, u = fm.slope(net), fm.velocity(net), gamma * s + (1 - gamma) * t
    with torch.no_grad():
        velocity = b(x, s)
        stopped = {
            "lagrangian": lambda: b(fm.flow_map(v, x, s, t), t),
            "eulerian": lambda: (fm.flow_map(v, x - h * velocity, s, t) - fm.flow_map(v, x + h * velocity, s, t)) / (2 * h),
            "progressive": lambda: (fm.flow_map(v, fm.flow_map(v, x, s, u), u, t) - x) / (t - s)[:, None]}[name]()
    if name == "lagrangian":
        moving = (fm.flow_map(v, x, s, t + h) - fm.flow_map(v, x, s, t - h)) / (2 * h)
    elif name == "eulerian":
        moving = (fm.flow_map(v, x, s + h, t) - fm.flow_map(v, x, s - h, t)) / (2 * h)
    else:
        moving = v(x, s, t)
    return (moving - stopped).square().mean(1)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_that_of_a_fixed_target(name, net, setting):
    x, s, t = setting
    gamma = torch.rand_like(s)
    options = dict(gamma=gamma) if name == "progressive" else {}
    found = gradients(loss(name, fm.slope(net), fm.velocity(net), x, s, t, **options), net)
    expected = gradients(constant_target(name, net, x, s, t, gamma), net)
    assert (found - expected).norm() < 1e-6 * expected.norm()
    if name != "progressive":       # without the stop-gradient the value stays and the gradient changes
        option = {"lagrangian": "stop_gradient", "eulerian": "stop_jacobian"}[name]
        free = loss(name, fm.slope(net), fm.velocity(net), x, s, t, **{option: False})
        assert torch.allclose(free, loss(name, fm.slope(net), fm.velocity(net), x, s, t), rtol=1e-9)
        assert (gradients(free, net) - found).norm() > 0.01 * found.norm()


def test_a_teacher_gets_no_gradient(net, setting):
    x, s, t = setting
    torch.manual_seed(2)
    teacher = common.MLP(2, 16, 2, times=2).double()
    for value in (fm.lagrangian_loss(fm.slope(net), fm.velocity(teacher), x, s, t),
                  fm.eulerian_loss(fm.slope(net), fm.velocity(teacher), x, s, t),
                  fm.eulerian_loss(fm.slope(net), fm.velocity(teacher), x, s, t, stop_jacobian=False),
                  fm.progressive_loss(fm.slope(net), fm.slope(teacher), x, s, t, torch.rand_like(s))):
        value.mean().backward()
    assert all(p.grad is None for p in teacher.parameters()) and all(p.grad is not None for p in net.parameters())


def test_jumps_of_the_exact_map_give_the_data():
    """Any number of jumps is exact, where Euler's single step collapses to the mean."""
    torch.manual_seed(0)
    z = torch.randn(1000, 2, dtype=torch.float64)
    for steps in (1, 2, 5):
        assert torch.allclose(fm.jump(exact_slope, z, steps), MEAN + STD * z, atol=1e-6)
    assert torch.allclose(common.sample_flow(lambda x, t, y: exact_velocity(x, t), z, 1), MEAN.expand_as(z))


def test_derivative_goes_through_the_unet():
    """Forward mode through convolutions, group norm and attention, against differences; backward after it."""
    torch.manual_seed(0)
    unet = common.UNet((3, 8, 8), 8, 1, 4, times=2).double()
    for p in unet.parameters():     # the last convolutions start at zero and would hide all else
        torch.nn.init.normal_(p, std=0.1)
    x, s, t, y = torch.randn(3, 3, 8, 8).double(), torch.rand(3).double(), torch.rand(3).double(), torch.arange(3)
    v, h = fm.slope(unet, y), 1e-5
    value, found = fm.derivative(lambda t: v(x, s, t), t, torch.ones_like(t))
    assert torch.allclose(value, v(x, s, t))
    assert torch.allclose(found, (v(x, s, t + h) - v(x, s, t - h)) / (2 * h), atol=1e-6)
    found = fm.derivative(lambda x: v(x, s, t), x, x)[1]
    assert torch.allclose(found, (v((1 + h) * x, s, t) - v((1 - h) * x, s, t)) / (2 * h), atol=1e-6)
    for name in LOSSES:
        assert gradients(loss(name, v, fm.velocity(unet, y), x, s, t), unet).isfinite().all()


def test_kl_of_histograms():
    torch.manual_seed(0)
    real = torch.rand(200_000, 2)
    assert fm.histogram_kl(real, torch.rand(200_000, 2), 16) < 0.01
    half = torch.rand(200_000, 2) * torch.tensor([1.0, 0.5])
    assert math.isclose(fm.histogram_kl(half, real, 16), math.log(2), rel_tol=0.02)
    away = torch.cat([real[:100_000], real[:100_000] + 5])       # half of the mass out of range
    assert math.isclose(fm.histogram_kl(real, away, 16), math.log(2), rel_tol=0.02)


def test_training_uses_the_parts_it_should(monkeypatch):
    """Flow matching alone: no off-diagonal; self-distillation: eta of the batch on it; distillation: none."""
    cfg = fm.Config(steps=2, batch=16, width=8, depth=1, device="cpu")
    data = common.load_data(cfg)
    start, seen = common.make_network(cfg, data, 8, 1, times=2), []
    diagonal, lagrangian = fm.diagonal_loss, fm.lagrangian_loss

    def spy_diagonal(v, x, t, target):
        assert (x - t[:, None] * target).abs().max() < 1.7322       # leads back to the board
        seen.append(("diagonal", len(x)))
        return diagonal(v, x, t, target)

    def spy_jump(v, b, x, s, t, stop_gradient):
        assert (s >= t).all() and (s > t).any()
        assert teacher is None or torch.equal(b(x, t), teacher(x, t))
        seen.append(("jump", len(x)))
        return lagrangian(v, b, x, s, t, stop_gradient)
    monkeypatch.setattr(fm, "diagonal_loss", spy_diagonal)
    monkeypatch.setattr(fm, "lagrangian_loss", spy_jump)
    for method, teacher, expected in ((None, None, {("diagonal", 16)}), ("LMD", start, {("jump", 16)}),
                                      ("LSD", None, {("diagonal", 12), ("jump", 4)})):
        seen.clear()
        _, norms = fm.train(cfg, str(method), data, start, method, teacher)
        assert set(seen) == expected and len(seen) == 2 * len(expected)
        assert (norms > 0).all() if method else (norms == 0).all()
