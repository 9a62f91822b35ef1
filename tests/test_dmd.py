"""DMD: the gradient against exact scores, where gradients flow, the noise levels, the fake loss."""
import pytest
import torch
from conftest import load_method

import common
from toy_data.points import Points

dmd = load_method("dmd")


def gaussian_denoiser(mean, std):
    """E[x | x + sigma noise] for x ~ N(mean, std^2)."""
    def denoise(x, sigma, y=None):
        gain = std**2 / (std**2 + common.expand(sigma, x).square())
        return gain * x + (1 - gain) * mean
    return denoise


def test_gradient_by_hand():
    x = torch.tensor([[1.0, 2.0], [0.0, -4.0]])
    real = torch.tensor([[2.0, 5.0], [0.0, 0.0]])       # mean |x - real|: 2 and 2
    fake = torch.tensor([[0.0, 3.0], [6.0, 1.0]])
    expected = torch.tensor([[-1.0, -1.0], [3.0, 0.5]])     # (fake - real) / 2
    assert torch.equal(dmd.distribution_matching_gradient(x, real, fake), expected)


def test_gradient_is_the_weighted_score_difference():
    torch.manual_seed(0)
    points = Points("unequal_ring")
    x, sigma = points.sample(64)[0] + 0.3, 0.05 + torch.rand(64)
    x_t = x + sigma[:, None] * torch.randn_like(x)
    fake = gaussian_denoiser(0.2, 0.9)
    found = dmd.distribution_matching_gradient(x, points.denoise(x_t, sigma), fake(x_t, sigma))
    fake_score = (0.2 - x_t) / (0.9**2 + sigma[:, None].square())
    distance = (x - points.denoise(x_t, sigma)).abs().mean(1, keepdim=True)
    weight = sigma[:, None].square() / distance     # eq. 8 with alpha = 1
    assert torch.allclose(found, weight * (fake_score - points.score(x_t, sigma)), rtol=1e-3, atol=1e-4)


def test_gradient_descends_the_divergence():
    """Fake N(m, 1), real N(0, 1): the expected gradient has the sign of m and vanishes at m = 0."""
    torch.manual_seed(0)
    sigmas = common.karras_sigmas(1000, 0.002, 80.0)[19:980]
    for mean in (-1.5, 0.0, 1.5):
        x = mean + torch.randn(20_000, 1)
        x_t, sigma = dmd.add_noise(x, sigmas)
        real, fake = (gaussian_denoiser(m, 1.0)(x_t, sigma) for m in (0.0, mean))
        step = dmd.distribution_matching_gradient(x, real, fake).mean()
        assert step * mean > 0.2 if mean else step == 0


@pytest.mark.parametrize("shape", [(2,), (3, 4, 4)])
def test_normaliser_is_one_number_a_sample(shape):
    torch.manual_seed(0)
    x, real, fake = (torch.randn(5, *shape) for _ in range(3))
    gradient = dmd.distribution_matching_gradient(x, real, fake)
    ratio = ((fake - real) / gradient).flatten(1)
    assert torch.allclose(ratio, (x - real).abs().flatten(1).mean(1, keepdim=True).expand_as(ratio), rtol=1e-3)
    scale = common.expand(torch.tensor([1e-3, 0.1, 1.0, 10.0, 1e3]), x)     # a common scale drops out
    scaled = dmd.distribution_matching_gradient(scale * x, scale * real, scale * fake)
    assert torch.allclose(scaled, gradient, rtol=1e-3)


def test_a_finished_sample_gets_no_gradient():
    x = torch.ones(3, 2)
    assert torch.equal(dmd.distribution_matching_gradient(x, x, x), torch.zeros(3, 2))


def test_loss_puts_the_gradient_on_the_samples_alone():
    torch.manual_seed(0)
    x, real, fake = (torch.randn(6, 2, requires_grad=True) for _ in range(3))
    gradient = dmd.distribution_matching_gradient(x, real, fake)
    assert not gradient.requires_grad
    dmd.distribution_matching_loss(x, gradient).backward()
    assert torch.allclose(x.grad, gradient / x.numel(), atol=1e-7)
    assert real.grad is None and fake.grad is None


def test_fake_loss_value_and_gradients():
    x, denoised = torch.zeros(2, 2, requires_grad=True), torch.tensor([[1.0, 1.0], [2.0, 0.0]], requires_grad=True)
    loss = dmd.denoising_loss(denoised, x, torch.tensor([0.5, 2.0]), sigma_data=0.5)
    assert loss.item() == pytest.approx(((4 + 4) * 2 + (0.25 + 4) * 4) / 4)
    loss.backward()
    assert x.grad is None and torch.allclose(denoised.grad, torch.tensor([[4.0, 4.0], [4.25, 0.0]]))


def test_fake_loss_is_least_for_the_exact_denoiser():
    """Its minimum over the mean of a Gaussian denoiser is at the mean of the samples."""
    torch.manual_seed(0)
    x = 0.7 + 0.5 * torch.randn(50_000, 1)
    x_t, sigma = dmd.add_noise(x, common.karras_sigmas(1000))
    losses = {m: dmd.denoising_loss(gaussian_denoiser(m, 0.5)(x_t, sigma), x, sigma, 0.5) for m in (0.6, 0.7, 0.8)}
    assert min(losses, key=losses.get) == 0.7


def test_add_noise_uses_each_level_equally_and_reports_it():
    torch.manual_seed(0)
    levels, x = torch.tensor([0.1, 1.0, 10.0]), torch.zeros(30_000, 2)
    x_t, sigma = dmd.add_noise(x, levels)
    for level in levels:
        assert (sigma == level).float().mean().item() == pytest.approx(1 / 3, abs=0.02)
        assert x_t[sigma == level].std().item() == pytest.approx(level.item(), rel=0.03)


def test_generator_is_called_once_at_the_largest_noise_level():
    calls = []

    def network(x, sigma, y):
        calls.append((x, sigma))
        return x
    z = torch.randn(4, 2)
    dmd.generate(network, z, None, 80.0)
    (x, sigma), = calls
    assert torch.equal(x, 80 * z) and torch.equal(sigma, torch.full((4,), 80.0))


def test_learning_rate_rises_and_falls():
    cfg = dmd.Config(steps=100, warmup=10)
    factors = [dmd.learning_rate(step, cfg) for step in range(101)]
    assert factors[0] == pytest.approx(0.1) and max(factors) <= 1 and factors[100] == pytest.approx(0)
    assert factors.index(max(factors)) in (8, 9) and all(a > b for a, b in zip(factors[9:], factors[10:]))


@pytest.fixture(scope="module")
def setting():
    """Tiny networks on the ring: cfg, data, a random teacher and pairs."""
    cfg = dmd.Config(steps=3, batch=8, width=8, depth=1, pairs=4, warmup=1, threads=1)
    data = common.load_data(cfg)
    with common.seeded(0):
        teacher = common.make_network(cfg, data, 8, 1).eval().requires_grad_(False)
        return cfg, data, teacher, (torch.randn(4, 2), None, torch.randn(4, 2))


def weights(module):
    return torch.cat([p.flatten() for p in module.parameters()])


def test_training_moves_the_generator_and_not_the_teacher(setting):
    cfg, data, teacher, pairs = setting
    before = weights(teacher).clone()
    generator = dmd.train(cfg, "a", data, teacher, pairs)
    assert torch.equal(weights(teacher), before)
    assert not torch.equal(weights(generator), before)


def test_matching_starts_from_the_regression_alone(setting):
    """Fake and teacher are equal at the start: the score difference of the first update is zero, so one step of
    dmd and one of its regression half are the same; the fake score then moves, and later steps differ."""
    cfg, data, teacher, pairs = setting
    z, x = pairs[0][:1], pairs[2][:1]       # one pair, so that the two arms see the same batch
    arms = dict(dmd={}, regression=dict(matching=False))
    for steps, same in ((1, True), (3, False)):
        cfg.steps = steps
        found = [weights(dmd.train(cfg, f"{n} {steps}", data, teacher, (z, None, x), **o)) for n, o in arms.items()]
        assert torch.allclose(*found, atol=1e-6) == same


def test_matching_alone_ignores_the_pairs(setting):
    cfg, data, teacher, pairs = setting
    cfg.steps = 3
    other = (pairs[0] + 1, None, pairs[2] - 1)
    a, b = (weights(dmd.train(cfg, n, data, teacher, p, regression=False)) for n, p in (("m", pairs), ("n", other)))
    assert torch.equal(a, b)
