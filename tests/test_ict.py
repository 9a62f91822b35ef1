"""methods/ict.py: schedules and densities in closed form, the loss, where gradients flow, one data point."""
import math

import pytest
import torch
from conftest import load_method

import common

ict = load_method("ict")
EPS, T = 0.002, 80.0


def test_levels_rise_from_eps_to_T():
    levels = ict.noise_levels(11, EPS, T)
    assert levels[0].item() == pytest.approx(EPS) and levels[-1].item() == pytest.approx(T)
    assert torch.allclose(levels.float(), common.karras_sigmas(11, EPS, T).flip(0))


def test_levels_double_in_equal_stages_as_in_the_paper():
    n = [ict.doubling_levels(k, 400_000, 10, 1280) for k in range(0, 400_000, 1000)]
    assert list(dict.fromkeys(n)) == [11, 21, 41, 81, 161, 321, 641, 1281]
    assert all(n.count(v) == 50 for v in set(n))
    assert [ict.doubling_levels(k, 6, 10, 40) for k in range(6)] == [11, 11, 21, 21, 41, 41]
    assert [ict.doubling_levels(k, 5, 10, 10) for k in range(5)] == [11] * 5
    assert max(ict.doubling_levels(k, 1001, 10, 50) for k in range(1001)) == 51      # s1 / s0 no power of two


def test_schedule_of_the_original():
    n = [ict.sqrt_levels(k, 1000, 2, 150) for k in range(1001)]
    assert n == sorted(n) and (n[0], n[-1]) == (2, 151)
    assert n[250] == math.ceil(math.sqrt(0.25 * (151**2 - 4) + 4) - 1) + 1
    assert ict.target_decay(2, 2, 0.9) == pytest.approx(0.9**2)
    assert ict.target_decay(151, 2, 0.9) == pytest.approx(0.9 ** (2 / 150))


def test_index_has_the_mass_of_the_lognormal():
    sigmas = ict.noise_levels(1281, EPS, T)
    p, normal = ict.lognormal_index(sigmas), torch.distributions.Normal(-1.1, 2.0)
    assert len(p) == 1280 and p.sum().item() == pytest.approx(1) and (p > 0).all()
    cdf = normal.cdf(sigmas.log())
    assert torch.allclose(p.cumsum(0), (cdf[1:] - cdf[0]) / (cdf[-1] - cdf[0]))
    assert p[sigmas[1:] < math.exp(-1.1)].sum().item() == pytest.approx(0.5, abs=0.01)
    assert ict.lognormal_index(sigmas, 2.0, 0.1)[sigmas[1:] < 5].sum() < 1e-3


def test_pseudo_huber_is_quadratic_below_c_and_a_norm_above():
    torch.manual_seed(0)
    a, b, c = torch.randn(8, 3, 4, dtype=torch.double), torch.randn(8, 3, 4, dtype=torch.double), 0.3
    square = (a - b).square().sum((1, 2))
    assert torch.allclose(ict.pseudo_huber(a, b, c), (square + c * c).sqrt() - c)
    assert torch.allclose(ict.squared_l2(a, b), square)
    assert torch.allclose(ict.pseudo_huber(a, b, 1e-9), square.sqrt(), atol=1e-8)
    near = a + 1e-4 * (b - a)
    assert torch.allclose(ict.pseudo_huber(a, near, c), 1e-8 * square / (2 * c), rtol=1e-4)
    x = torch.zeros(1, 2, dtype=torch.double, requires_grad=True)
    ict.pseudo_huber(x, torch.zeros(1, 2), c).sum().backward()
    assert torch.equal(x.grad, torch.zeros(1, 2, dtype=torch.double))        # a bare norm has NaN here


def test_boundary_condition_and_scalings():
    torch.manual_seed(0)
    x, layer = torch.randn(5, 2), torch.nn.Linear(2, 2)
    at_eps = ict.consistency_function(lambda x, t: 100 * layer(x), x, torch.full((5,), EPS), 0.5, EPS)
    assert torch.allclose(at_eps, x, atol=1e-6)
    seen = {}

    def network(x, t):
        seen.update(x=x, t=t)
        return torch.ones_like(x)
    s = torch.tensor([0.01, 0.5, 3.0, 20.0, 80.0])
    f = ict.consistency_function(network, x, s, 0.5, EPS)
    skip, out = 0.25 / ((s - EPS)**2 + 0.25), 0.5 * (s - EPS) / (s**2 + 0.25).sqrt()
    assert torch.allclose(f, skip[:, None] * x + out[:, None])
    assert torch.allclose(seen["x"], x / (s**2 + 0.25).sqrt()[:, None]) and torch.allclose(seen["t"], s.log() / 4)


def batch(n=32, dim=2):
    torch.manual_seed(0)
    x, z, low = (torch.randn(n, dim, dtype=torch.double) for _ in range(3))
    sigma = low[:, 0].abs() + 0.1
    return x, z, sigma, sigma * 1.5


def test_loss_pairs_levels_with_the_same_noise_and_weighs_by_the_step():
    x, z, sigma, sigma_next = batch()
    calls = []

    def f(x, s):
        calls.append((x, s))
        return x
    loss = ict.consistency_training_loss(f, f, x, z, sigma, sigma_next, ict.squared_l2)
    gap = sigma_next - sigma
    assert loss.item() == pytest.approx((gap * z.square().sum(1)).mean().item())     # ||gap z||^2 / gap
    assert torch.equal(calls[0][1], sigma_next) and torch.equal(calls[1][1], sigma)  # gradient at the higher level
    assert torch.allclose(calls[0][0] - calls[1][0], gap[:, None] * z)
    plain = ict.consistency_training_loss(f, f, x, z, sigma, sigma_next, ict.squared_l2, "one")
    assert plain.item() == pytest.approx((gap.square() * z.square().sum(1)).mean().item())


def test_gradient_is_that_of_a_target_held_fixed():
    x, z, sigma, sigma_next = batch()
    layer = torch.nn.Linear(2, 2).double()

    def f(x, s):
        return layer(x) / (1 + s[:, None])
    ict.consistency_training_loss(f, f, x, z, sigma, sigma_next, ict.squared_l2, "one").backward()
    goal = f(x + sigma[:, None] * z, sigma).detach()
    loss = (f(x + sigma_next[:, None] * z, sigma_next) - goal).square().sum(1).mean()
    expected, = torch.autograd.grad(loss, layer.weight)
    assert torch.allclose(layer.weight.grad, expected)
    lagging = torch.nn.Linear(2, 2).double()
    ict.consistency_training_loss(f, lambda x, s: lagging(x), x, z, sigma, sigma_next, ict.squared_l2).backward()
    assert lagging.weight.grad is None


def test_gradient_for_one_point_is_that_of_the_loss():
    sigmas, xi = ict.noise_levels(30, EPS, T), 0.7
    theta, theta_minus = (torch.tensor([v], dtype=torch.double, requires_grad=True) for v in (0.2, -0.4))

    def model(parameter):
        return lambda x, s: (EPS / s)[:, None] * x + (1 - EPS / s)[:, None] * parameter
    z = torch.randn(29, 1, dtype=torch.double)
    loss = ict.consistency_training_loss(model(theta), model(theta_minus), torch.full_like(z, xi), z, sigmas[:-1],
                                         sigmas[1:], ict.squared_l2)
    loss.backward()
    assert ict.point_mass_gradient(theta, theta_minus, sigmas, xi).item() == pytest.approx(theta.grad.item())
    assert theta_minus.grad is None


def test_proposition_on_the_limit_of_many_levels():
    """Even grid: with theta- = theta it tends to 2 (theta - xi) E[eps / s^2 (1 - eps / s)]; else it grows like N."""
    eps, top, xi = 0.5, 4.0, 1.0
    theta = torch.tensor([0.2], dtype=torch.double)

    def gradient(n, minus):
        sigmas = torch.linspace(eps, top, n, dtype=torch.double)
        return ict.point_mass_gradient(theta, torch.full_like(theta, minus), sigmas, xi).item()
    s = torch.linspace(eps, top, 100001).double()
    limit = (2 * eps / s**2 * (1 - eps / s)).mean().item() * (0.2 - xi)
    assert gradient(20001, 0.2) == pytest.approx(limit, rel=1e-2)
    assert gradient(2001, 0.1) / gradient(201, 0.1) == pytest.approx(10, rel=0.05)
    pull = 2 * (1 - eps / s).square().mean().item() * 0.1 * 2000 / (top - eps)
    assert gradient(2001, 0.1) == pytest.approx(pull, rel=0.02)                      # xi has dropped out
    assert ict.point_mass_gradient(torch.ones(1), torch.ones(1), s.float(), 1.0).abs() < 1e-2


def test_averaged_target_slows_one_point_down_and_the_more_the_finer_the_grid():
    errors = {(mu, n): ict.descend(ict.noise_levels(n, EPS, T), mu, 400)[-1].item()
              for mu in (0, 0.99) for n in (10, 100)}
    assert errors[0, 10] < 1e-6 and errors[0, 100] < 1e-6
    assert errors[0.99, 10] < 0.1
    assert errors[0.99, 100] > 0.3


def test_multistep_sampler():
    torch.manual_seed(0)
    z = torch.randn(40000, 1)
    assert torch.allclose(ict.multistep_sample(lambda x, s: x / s[:, None], z, [T], EPS), z)
    assert torch.equal(ict.multistep_sample(lambda x, s: x, z, [T, EPS], EPS), T * z)        # nothing to add at eps

    def exact(x, s):        # data N(0, 0.7^2)
        return x * ((0.7**2 + EPS**2) / (0.7**2 + s**2)).sqrt()[:, None]
    assert ict.multistep_sample(exact, z, [T, 0.6], EPS).std().item() == pytest.approx(0.7, rel=0.02)
