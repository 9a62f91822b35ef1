"""VSD: SDS as a special case, the analytic Gaussian, guidance, where gradients flow, the exact prior, the renderer."""
import math

import torch
from conftest import load_method

import common
from toy_data import scene
from toy_data.points import Points

vsd = load_method("vsd")


def gaussian_eps(x_t, t, mean=0.0, variance=1.0):
    """Exact eps-prediction for x ~ N(mean, variance)."""
    t = t[:, None]
    return t * (x_t - (1 - t) * mean) / ((1 - t).square() * variance + t.square())


def test_the_sampled_noise_in_place_of_eps_phi_gives_sds_bit_for_bit():
    torch.manual_seed(0)
    theta = torch.randn(32, 2, requires_grad=True)
    t, noise, points = 0.02 + 0.96 * torch.rand(32), torch.randn(32, 2), Points("eight_gaussians")
    x = 2 * theta.tanh()
    x_t = common.interpolate(x.detach(), noise, t)
    eps = vsd.noise_from_velocity(points.velocity(x_t, t), x_t, t)
    gradient = vsd.score_distillation_gradient(eps, noise, t)
    expected = t[:, None] ** 2 * (eps - noise)
    assert torch.equal(gradient, expected) and not gradient.requires_grad
    found, = torch.autograd.grad(vsd.particle_loss(x, gradient), theta)
    by_hand = expected / 32 * 2 * (1 - theta.tanh().square())       # the Jacobian of the rendering alone
    assert torch.allclose(found, by_hand, atol=1e-6)


def test_gaussian_target_keeps_its_variance_under_vsd_and_not_under_sds():
    variances = {}
    for method in ("VSD", "SDS"):
        torch.manual_seed(0)
        x = 0.3 * torch.randn(512, 1) + 0.5
        for _ in range(1500):
            t, noise = 0.02 + 0.96 * torch.rand(512), torch.randn(512, 1)
            x_t = common.interpolate(x, noise, t)
            eps_phi = gaussian_eps(x_t, t, x.mean(), x.var())       # exact for a normal cloud
            eps_other = eps_phi if method == "VSD" else noise
            x = x - 0.05 * vsd.score_distillation_gradient(gaussian_eps(x_t, t), eps_other, t)
        variances[method] = x.var().item()
        assert abs(x.mean()) < 0.1
    assert abs(variances["VSD"] - 1) < 0.1 and variances["SDS"] < 0.03, variances


def test_matched_distributions_have_no_mean_gradient_where_sds_pulls_inwards():
    torch.manual_seed(0)
    points, t = Points("unequal_ring"), 0.02 + 0.96 * torch.rand(20_000)
    x = points.sample(20_000)[0]
    noise = torch.randn_like(x)
    x_t = common.interpolate(x, noise, t)
    eps = vsd.noise_from_velocity(points.velocity(x_t, t), x_t, t)
    assert vsd.score_distillation_gradient(eps, eps, t).abs().max() == 0
    sds = vsd.score_distillation_gradient(eps, noise, t)
    outward = (sds * x).sum(1)      # descending it shrinks the cloud, although the cloud is right
    assert outward.mean() > 0.03


def test_guidance_and_the_first_gradient_of_vsd():
    torch.manual_seed(0)
    points = Points("eight_gaussians", conditional=True)
    t, x_t, y = 0.1 + 0.8 * torch.rand(16), torch.randn(16, 2), torch.arange(16) % 8
    given, free = (vsd.noise_from_velocity(points.velocity(x_t, t, label), x_t, t) for label in (y, None))
    eps = vsd.guided_noise(points.velocity, x_t, t, y, 7.5, 8)
    assert torch.allclose(eps, free + 7.5 * (given - free), atol=1e-4)
    gradient = vsd.score_distillation_gradient(eps, given, t)       # eps_phi is still the pretrained model
    assert torch.allclose(gradient, 6.5 * (t**2)[:, None] * (given - free), atol=1e-4)
    assert torch.equal(vsd.guided_noise(points.velocity, x_t, t, y, 1.0, 8), given)


def test_eps_prediction_of_the_exact_velocity():
    t, x_t = torch.tensor([0.3, 0.9]), torch.tensor([[1.0, -2.0], [0.4, 0.1]])
    clean = torch.tensor([[0.5, 0.5], [0.0, 1.0]])
    eps = (x_t - (1 - t)[:, None] * clean) / t[:, None]
    assert torch.allclose(vsd.noise_from_velocity(eps - clean, x_t, t), eps, atol=1e-6)


def test_fake_loss_trains_eps_phi_and_not_the_particles():
    torch.manual_seed(0)
    theta = torch.randn(8, 2, requires_grad=True)
    fake = vsd.FakeScore(common.MLP(4, 16, 1, 2, out=2), 1.0)
    noise, t, camera = torch.randn(8, 2), torch.rand(8), torch.randn(8, 2)
    loss = vsd.fake_loss(fake, 2 * theta, noise, t, torch.arange(8) % 2, camera)
    loss.backward()
    assert theta.grad is None and fake.network.head.weight.grad.abs().sum() > 0
    with torch.no_grad():
        v = fake((1 - t)[:, None] * 2 * theta + t[:, None] * noise, t, torch.arange(8) % 2, camera)
    assert torch.allclose(loss, (v - (noise - 2 * theta)).square().mean(), atol=1e-6)


def test_fake_score_with_a_silent_network_is_the_velocity_of_a_gaussian():
    network = common.MLP(2, 8, 1)
    torch.nn.init.zeros_(network.head.weight)
    torch.nn.init.zeros_(network.head.bias)
    x_t, t = torch.randn(5, 2), torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0])
    v = vsd.FakeScore(network, 0.25)(x_t, t)
    assert torch.allclose(vsd.noise_from_velocity(v, x_t, t), gaussian_eps(x_t, t, 0.0, 0.25**2), atol=1e-5)


def test_mixture_prior_without_factors_is_the_exact_velocity_of_points():
    torch.manual_seed(0)
    points = Points("unequal_ring", conditional=True)
    allowed = torch.eye(8, dtype=torch.bool)
    prior = scene.MixturePrior(points.means, torch.zeros(8, 2, 0), points.std, points.weights, allowed)
    x_t, t, y = torch.randn(64, 2), 0.05 + 0.9 * torch.rand(64), torch.randint(9, (64,))
    for label in (y, None):
        assert torch.allclose(prior(x_t, t, label), points.velocity(x_t, t, label), atol=1e-4)


def test_mixture_prior_with_factors_is_the_score_of_its_density():
    torch.manual_seed(0)
    means, factors = torch.randn(3, 5).double(), torch.randn(3, 5, 2).double()
    weights = torch.tensor([0.2, 0.3, 0.5]).double()
    prior = scene.MixturePrior(means, factors, 0.3, weights, torch.eye(3, dtype=torch.bool))
    for t in (0.1, 0.5, 0.95):
        x = torch.randn(5, dtype=torch.float64, requires_grad=True)
        eye = torch.eye(5, dtype=torch.float64)
        covariances = [(1 - t) ** 2 * (f @ f.T + 0.09 * eye) + t**2 * eye for f in factors]
        laws = [torch.distributions.MultivariateNormal((1 - t) * m, c) for m, c in zip(means, covariances)]
        log_p = torch.stack([w.log() + law.log_prob(x) for w, law in zip(weights, laws)])
        eps = -t * torch.autograd.grad(log_p.logsumexp(0), x)[0]
        level = torch.full((1,), t, dtype=torch.float64)
        found = vsd.noise_from_velocity(prior(x.detach()[None], level), x.detach()[None], level)[0]
        assert torch.allclose(found, eps, atol=1e-6)


def test_view_law_is_the_law_of_the_rendered_scenes():
    torch.manual_seed(0)
    means, factors = scene.view_law()
    views = scene.all_views(scene.sample(4000)).flatten(2)
    for k in range(4):
        here = views[k::4, 3]
        assert (here.mean(0) - means[k, 3]).abs().max() < 0.05
        assert (torch.cov(here.T) - factors[k, 3] @ factors[k, 3].T).abs().max() < 0.02


def test_renderer_occludes_turns_and_is_differentiable():
    solid = torch.full((1, 4, 8, 8, 8), -8.0)
    solid[:, 1:] = 0
    solid[:, 0, :, 2], solid[:, 0, :, 5] = 6, 6
    solid[:, 1, :, 2], solid[:, 1, :, 5] = 2, -2        # a red wall in front of a wall of the opposite colour
    front, back = (scene.render(solid, torch.tensor([a]))[0] for a in (0, scene.AZIMUTHS // 2))
    assert torch.allclose(front[0], torch.tensor(math.tanh(2.0)), atol=0.02)
    assert torch.allclose(back[0], -front[0], atol=0.02) and front[1:].abs().max() < 1e-6
    theta = torch.randn(2, 4, 8, 8, 8, dtype=torch.float64, requires_grad=True)
    azimuth, direction = torch.tensor([1, 6]), torch.randn(2, 4, 8, 8, 8, dtype=torch.float64)
    gradient, = torch.autograd.grad(scene.render(theta, azimuth).square().sum(), theta)
    with torch.no_grad():
        a, b = (scene.render(theta + s * 1e-5 * direction, azimuth).square().sum() for s in (1, -1))
    assert torch.allclose((gradient * direction).sum(), (a - b) / 2e-5, rtol=1e-4)


def test_variety_is_the_root_mean_squared_distance_of_pairs():
    torch.manual_seed(0)
    views = torch.randn(3, 7, 2, 5)
    pairs = torch.stack([(views[:, i] - views[:, j]).square().mean((1, 2)) for i in range(7) for j in range(i)])
    assert math.isclose(vsd.variety(views), pairs.mean().sqrt(), rel_tol=1e-5)
    assert vsd.variety(views[:, :1].expand(3, 7, 2, 5)) < 1e-6
