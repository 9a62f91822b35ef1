"""CoMoSpeech: scalings, shifted noise, the two losses, samplers, gradient flow, padding."""
import math

import pytest
import torch
import torch.nn as nn
from conftest import load_method

import common
from toy_data import tones

como = load_method("comospeech")
B, C, L = 5, 6, 9


class Net(nn.Module):
    """A denoiser simple enough to be differentiated by hand, in the argument order of the script."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, dtype=torch.float64))

    def forward(self, x, mu, c_noise, mask):
        return (self.w[0] * x + self.w[1] * mu + self.w[2] * c_noise[:, None, None]) * mask


@pytest.fixture
def case():
    torch.manual_seed(0)
    x0, mu, xi = torch.randn(3, B, C, L, dtype=torch.float64).unbind()
    mask = (torch.arange(L) < torch.tensor([9, 7, 4, 8, 5])[:, None]).double()[:, None]
    return x0, mu, xi, mask


def bound(net, mu, mask):
    return lambda x, s: como.denoise(net, x, s, mu, mask)


def exact(mean, variance, mu):
    """The posterior mean of x0 ~ N(mean, variance) given x = x0 + s (xi + mu): the best D there is."""
    def D(x, s):
        s = s[:, None, None]
        return mean + variance / (variance + s**2) * (x - mean - s * mu)
    return D


def test_levels():
    levels = como.noise_levels(50)
    assert len(levels) == 51 and levels[0] == 0 and (levels.diff() > 0).all()
    torch.testing.assert_close(levels[1:].flip(0), common.karras_sigmas(50))


def test_denoiser_is_the_identity_at_eps_and_not_elsewhere(case):
    x0, mu, _, mask = case
    D, eps = bound(Net(), mu, mask), torch.full((B,), 0.002, dtype=torch.float64)
    assert torch.equal(D(x0, eps), x0)
    assert (D(x0, 2 * eps) - x0).abs().max() > 1e-5


def test_scalings_by_hand(case):
    x0, mu, _, mask = case
    net, s, sd, eps = Net(), 1.7, 0.4, 0.01
    found = como.denoise(net, x0, torch.full((B,), s, dtype=torch.float64), mu, mask, sd, eps)
    root = math.sqrt(s * s + sd * sd)
    F = (net.w[0] * x0 / root + net.w[1] * mu + net.w[2] * math.log(s) / 4) * mask
    torch.testing.assert_close(found, sd**2 / ((s - eps)**2 + sd**2) * x0 + (s - eps) * sd / root * F)


def test_only_the_network_is_masked(case):
    """c_skip x reaches the padding too, F does not."""
    x0, mu, _, mask = case
    s = torch.ones(B, dtype=torch.float64)
    outside = (como.denoise(Net(), x0, s, mu, mask) / x0)[(mask == 0).expand_as(x0)]
    torch.testing.assert_close(outside, torch.full_like(outside, 0.25 / (0.998**2 + 0.25)))


def test_teacher_loss_by_hand_and_its_gradient_to_the_encoder(case):
    x0, mu, xi, mask = case
    mu, net, s = mu.requires_grad_(), Net(), torch.tensor([0.1, 0.4, 1.0, 3.0, 7.0]).double()
    loss = como.diffusion_loss(bound(net, mu, mask), x0, xi + mu, s, mask)
    expected = 0.0
    for i, level in enumerate(s.tolist()):
        x = x0[i:i + 1] + level * (xi[i:i + 1] + mu[i:i + 1])
        error = como.denoise(net, x, s[i:i + 1], mu[i:i + 1], mask[i:i + 1]) - x0[i:i + 1]
        expected = expected + (level**2 + 0.25) / (0.5 * level)**2 * (error**2 * mask[i:i + 1]).sum()
    torch.testing.assert_close(loss, expected / (B * C * L))
    g_all, = torch.autograd.grad(loss, mu, retain_graph=True)
    g_hand, = torch.autograd.grad(expected / (B * C * L), mu)
    torch.testing.assert_close(g_all, g_hand)
    assert g_all.abs().sum() > 0


def test_masked_frames_carry_no_loss_but_count_in_the_mean(case):
    x0, mu, xi, mask = case
    net, s = Net(), torch.full((B,), 0.7, dtype=torch.float64)
    D = [bound(Net(), mu, mask) for _ in range(3)]
    for loss in (lambda x: como.diffusion_loss(bound(net, mu, mask), x, xi + mu, s, mask),
                 lambda x: como.consistency_distillation_loss(*D, x, xi + mu, s, s / 2, mask),
                 lambda x: como.prior_loss(x, mu, mask)):
        torch.testing.assert_close(loss(x0), loss(x0 + 5 * (1 - mask)))
        assert (loss(x0) - loss(x0 + 5 * mask)).abs() > 1e-3
    x, z, wide = (torch.cat([v, v], 2) for v in (x0, xi + mu, mask))
    wide[..., L:] = 0           # twice the frames, the second half padding: half the loss
    net.w.data[1] = 0
    twice = como.diffusion_loss(bound(net, torch.zeros_like(x), wide), x, z, s, wide)
    torch.testing.assert_close(2 * twice, como.diffusion_loss(bound(net, torch.zeros_like(x0), mask), x0, xi + mu, s, mask))
    torch.testing.assert_close(como.prior_loss(x, torch.zeros_like(x), wide), como.prior_loss(x0, 0 * x0, mask))


def test_prior_loss_is_the_gaussian_likelihood(case):
    x0, mu, _, mask = case
    density = -torch.distributions.Normal(mu, 1.0).log_prob(x0)
    torch.testing.assert_close(como.prior_loss(x0, mu, mask), density[(mask > 0).expand_as(x0)].mean())


def test_distillation_loss_by_hand(case):
    x0, mu, xi, mask = case
    nets, (a, b) = [Net() for _ in range(3)], (2.5, 1.5)
    s_next, s = (torch.full((B,), v, dtype=torch.float64) for v in (a, b))
    D = [bound(net, mu, mask) for net in nets]
    loss = como.consistency_distillation_loss(*D, x0, xi + mu, s_next, s, mask)
    x = x0 + a * (xi + mu)
    lower = x + (b - a) * (x - D[2](x, s_next)) / a
    torch.testing.assert_close(loss, ((D[0](x, s_next) - D[1](lower, s))**2 * mask).sum() / (B * C * L))
    loss.backward()
    assert nets[0].w.grad.abs().sum() > 0 and nets[1].w.grad is None and nets[2].w.grad is None
    nets[0].w.grad = None
    fixed = D[1](lower, s).detach()
    ((D[0](x, s_next) - fixed)**2 * mask).mean().backward()
    assert nets[0].w.grad.abs().sum() > 0


def test_at_the_lowest_level_the_target_is_the_teachers_step(case):
    """n = 1: D_ema is the identity at eps, so the student learns to do that step."""
    x0, mu, xi, mask = case
    levels = como.noise_levels(50).double()
    eps, s_next = (torch.full((B,), v, dtype=torch.float64) for v in (0.002, levels[2].item()))
    teacher = bound(Net(), mu, mask)
    x = x0 + s_next[:, None, None] * (xi + mu)
    goal = como.euler_step(teacher, x, s_next, eps)
    loss = como.consistency_distillation_loss(lambda x, s: goal, bound(Net(), mu, mask), teacher, x0, xi + mu, s_next,
                                              eps, mask)
    assert loss < 1e-20


def test_the_exact_consistency_function_has_no_loss_in_the_limit(case):
    """Gaussian data: the trajectory through (x, s) is known, and neighbours on it agree as levels get dense."""
    x0, mu, xi, mask = case
    mean, variance = 0.3, 0.2
    D = exact(mean, variance, mu)

    def trajectory_end(x, s):       # (x - mean - s mu) / sqrt(variance + s^2) is constant along the ODE
        s, eps = s[:, None, None], 0.002
        return mean + eps * mu + (x - mean - s * mu) * ((variance + eps**2) / (variance + s**2)).sqrt()
    losses = []
    for h in (0.1, 0.05):
        s_next = torch.full((B,), 1.0, dtype=torch.float64)
        losses.append(como.consistency_distillation_loss(trajectory_end, trajectory_end, D, x0, xi + mu, s_next,
                                                         s_next - h, mask))
    assert losses[0] < 1e-3 and losses[0] / losses[1] > 12       # the error of an Euler step falls as h^2, squared: 16
    far = como.consistency_distillation_loss(trajectory_end, trajectory_end, exact(mean, variance, 0 * mu), x0, xi + mu,
                                             s_next, s_next - 0.05, mask)
    assert far > 5 * losses[1]      # a teacher that does not know the shift follows other trajectories


def test_fifty_euler_steps_reach_the_data_only_from_the_shifted_start():
    """With the exact D of N(mean, variance): mean and spread are right; a start without mu ends elsewhere."""
    torch.manual_seed(1)
    mu = torch.full((4000, 1, 1), 0.8, dtype=torch.float64)
    xi = torch.randn_like(mu)
    D = exact(0.3, 0.2, mu)
    good, bad = como.teacher_sample(D, xi + mu, 50), como.teacher_sample(D, xi, 50)
    assert abs(good.mean() - 0.3) < 0.03 and abs(good.std() / 0.2**0.5 - 1) < 0.09
    assert bad.mean() < 0.05
    one = como.teacher_sample(D, xi + mu, 1)        # one step is nearly the posterior mean
    assert (one - 0.3).abs().max() < 0.02 and one.std() < 0.01


def test_consistency_sampler_adds_fresh_noise_between_calls(case):
    mu = case[1]
    calls, draws = [], [torch.randn(B, C, L, dtype=torch.float64) + mu for _ in range(3)]

    def D(x, s):
        calls.append((x, s[0].item()))
        return 0.1 * x
    queue = iter(draws)
    out = como.consistency_sample(D, lambda: next(queue), 3, eps=0.5)
    levels = como.noise_levels(4, 0.5).flip(0)[:3].tolist()
    assert [s for _, s in calls] == pytest.approx(levels) and levels[0] == pytest.approx(80)
    torch.testing.assert_close(calls[0][0], levels[0] * draws[0])
    torch.testing.assert_close(calls[1][0], 8 * draws[0] + math.sqrt(levels[1]**2 - 0.5**2) * draws[1],
                               atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(out, 0.1 * calls[2][0])
    calls.clear()
    one = como.consistency_sample(D, lambda: draws[0], 1)
    assert len(calls) == 1
    torch.testing.assert_close(one, 8 * draws[0], atol=1e-4, rtol=1e-5)


def test_mu_is_constant_during_a_phoneme_and_zero_after_the_end():
    torch.manual_seed(2)
    encoder = como.Encoder(tones.PAD + 1, tones.BINS)
    string, durations = tones.strings(6)
    mu, index = encoder(string, tones.alignment(durations, 32)), tones.alignment(durations, 32)
    same = (index[:, 1:] == index[:, :-1])[:, None].expand(-1, tones.BINS, -1)
    assert not mu.diff(dim=2)[same].any() and mu.diff(dim=2)[~same].ne(0).float().mean() > 0.5
    assert not mu.transpose(1, 2)[index == string.shape[1]].any()


def test_what_lies_in_the_padding_does_not_reach_the_network():
    torch.manual_seed(3)
    net = como.ConvNet(tones.BINS, 16, 3)
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    x, mu, mask = torch.randn(4, 20, 32), torch.randn(4, 20, 32), torch.ones(4, 1, 32)
    mask[:, :, 20:] = 0
    out = net(x, mu, torch.zeros(4), mask)
    torch.testing.assert_close(out, net(x + 9 * (1 - mask), mu, torch.zeros(4), mask))
    torch.testing.assert_close(out[:, :, :20], net(x[:, :, :20], mu[:, :, :20], torch.zeros(4), mask[:, :, :20]))
    assert not out[:, :, 20:].any() and out.abs().sum() > 0
    for changed in (net(x, 2 * mu, torch.zeros(4), mask), net(x, mu, torch.ones(4), mask)):
        assert (changed - out).abs().max() > 1e-3


@pytest.mark.parametrize("flags", [["--sigma-max", "0.5"], ["--levels", "1"], ["--frames", "4"], ["--data", "glyphs"]])
def test_impossible_settings_end_in_one_line(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        common.main(como.run, como.Config, como.CLAIMS, ["--smoke", "--out", str(tmp_path), *flags])
    assert stop.value.code == 2 and capsys.readouterr().err.strip().count("\n") == 0
