"""DMD2: score difference, GAN terms on noised samples, who is trained when, backward simulation."""
import math

import pytest
import torch
from conftest import load_method

import common
from toy_data.points import Points

dmd2 = load_method("dmd2")


def test_gradient_by_hand():
    x = torch.tensor([[1.0, 2.0], [0.0, -4.0]])
    real = torch.tensor([[2.0, 5.0], [0.0, 0.0]])       # mean |x - real|: 2 and 2
    fake = torch.tensor([[0.0, 3.0], [6.0, 1.0]])
    expected = torch.tensor([[-1.0, -1.0], [3.0, 0.5]])     # (fake - real) / 2
    assert torch.equal(dmd2.distribution_matching_gradient(x, real, fake), expected)
    assert torch.equal(dmd2.distribution_matching_gradient(x, x, x), torch.zeros(2, 2))


def test_gradient_is_the_weighted_score_difference():
    torch.manual_seed(0)
    points = Points("unequal_ring")
    x, sigma = points.sample(64)[0] + 0.3, 0.05 + torch.rand(64)
    x_t = x + sigma[:, None] * torch.randn_like(x)
    gain = 0.9**2 / (0.9**2 + sigma[:, None].square())      # the fakes' law: N(0.2, 0.9^2)
    real, fake = points.denoise(x_t, sigma), gain * x_t + (1 - gain) * 0.2
    fake_score = (0.2 - x_t) / (0.9**2 + sigma[:, None].square())
    weight = sigma[:, None].square() / (x - real).abs().mean(1, keepdim=True)
    expected = weight * (fake_score - points.score(x_t, sigma))
    assert torch.allclose(dmd2.distribution_matching_gradient(x, real, fake), expected, rtol=1e-3, atol=1e-4)


def test_matching_loss_puts_the_gradient_on_the_samples_alone():
    torch.manual_seed(0)
    x, real, fake = (torch.randn(6, 2, requires_grad=True) for _ in range(3))
    gradient = dmd2.distribution_matching_gradient(x, real, fake)
    dmd2.distribution_matching_loss(x, gradient).backward()
    assert torch.allclose(x.grad, gradient / x.numel(), atol=1e-7)
    assert real.grad is None and fake.grad is None


def test_fake_loss_value_and_gradients():
    x, denoised = torch.zeros(2, 2, requires_grad=True), torch.tensor([[1.0, 1.0], [2.0, 0.0]], requires_grad=True)
    loss = dmd2.denoising_loss(denoised, x, torch.tensor([0.5, 2.0]), sigma_data=0.5)
    assert loss.item() == pytest.approx(((4 + 4) * 2 + (0.25 + 4) * 4) / 4)
    loss.backward()
    assert x.grad is None and torch.allclose(denoised.grad, torch.tensor([[4.0, 4.0], [4.25, 0.0]]))


def test_gan_losses_by_hand():
    zero, high = torch.zeros(3), torch.full((3,), 2.0)
    assert dmd2.generator_gan_loss(zero).item() == pytest.approx(math.log(2))
    assert dmd2.generator_gan_loss(high).item() == pytest.approx(math.log1p(math.exp(-2)))
    assert dmd2.discriminator_loss(zero, zero).item() == pytest.approx(2 * math.log(2))
    assert dmd2.discriminator_loss(high, -high).item() == pytest.approx(2 * math.log1p(math.exp(-2)))
    assert dmd2.discriminator_loss(-high, high) > dmd2.discriminator_loss(high, -high)


def test_best_discriminator_is_the_log_density_ratio():
    """Real N(1/2, 1), fake N(-1/2, 1): log p_real(x) / p_fake(x) = x."""
    torch.manual_seed(0)
    real, fake = 0.5 + torch.randn(200_000), -0.5 + torch.randn(200_000)
    losses = {(k, b): dmd2.discriminator_loss(k * real + b, k * fake + b)
              for k, b in ((1, 0), (0.8, 0), (1.2, 0), (1, 0.2), (1, -0.2), (-1, 0))}
    assert min(losses, key=losses.get) == (1, 0)


def test_generator_gan_gradient_points_to_the_real_data():
    x = torch.tensor([[-1.0], [2.0]], requires_grad=True)
    dmd2.generator_gan_loss(x[:, 0]).backward()     # with the logit x the real data lie at larger x
    assert torch.allclose(x.grad[:, 0], -torch.sigmoid(-x[:, 0].detach()) / 2)


def test_add_noise_uses_each_level_equally_and_passes_the_gradient():
    torch.manual_seed(0)
    levels, x = torch.tensor([0.1, 1.0, 10.0]), torch.zeros(30_000, 2, requires_grad=True)
    x_t, sigma = dmd2.add_noise(x, levels)
    for level in levels:
        assert (sigma == level).float().mean().item() == pytest.approx(1 / 3, abs=0.02)
        assert x_t[sigma == level].std().item() == pytest.approx(level.item(), rel=0.03)
    x_t.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


class Recorder:
    """A generator that notes its calls and returns a constant plus its call number, with gradient to `weight`."""

    def __init__(self):
        self.calls, self.weight = [], torch.zeros(1, requires_grad=True)

    def __call__(self, x, sigma, y=None):
        self.calls.append((x, sigma, torch.is_grad_enabled()))
        return torch.full_like(x, 10.0 * len(self.calls)) + self.weight


@pytest.mark.parametrize("i", [0, 1, 3])
def test_backward_simulation_is_the_sampler_cut_short(i):
    torch.manual_seed(0)
    generator, z, levels = Recorder(), torch.randn(4000, 2), (80.0, 2.0, 0.5, 0.1)
    x = dmd2.backward_simulation(generator, z, levels, i)
    assert [call[1][0].item() for call in generator.calls] == pytest.approx(levels[:i])
    assert not x.requires_grad and not any(call[2] for call in generator.calls)
    if i == 0:
        assert torch.equal(x, 80 * z)
        return
    assert torch.equal(generator.calls[0][0], 80 * z)
    assert x.mean().item() == pytest.approx(10 * i, abs=5 * levels[i] / 80)
    noise = (x - 10 * i) / levels[i]
    assert noise.std().item() == pytest.approx(1, abs=0.05)
    assert abs((noise * z).mean().item()) < 0.06        # fresh noise, not that of the start
    generator = Recorder()
    samples = dmd2.sample(generator, z, levels[:i + 1])
    assert len(generator.calls) == i + 1 and torch.equal(samples, torch.full_like(z, 10.0 * (i + 1)))


def test_one_step_sample_is_one_call_at_the_largest_level():
    generator, z = Recorder(), torch.randn(4, 2)
    dmd2.sample(generator, z, (80.0,))
    (x, sigma, _), = generator.calls
    assert torch.equal(x, 80 * z) and torch.equal(sigma, torch.full((4,), 80.0))


@pytest.fixture(scope="module")
def setting():
    """Tiny networks on the ring: cfg, data, a random teacher."""
    cfg = dmd2.Config(steps=2, batch=8, width=8, depth=1, warmup=1, threads=1, checkpoints=2, ratio=3)
    data = common.load_data(cfg)
    with common.seeded(0):
        return cfg, data, common.make_network(cfg, data, 8, 1).eval().requires_grad_(False)


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_logits_read_the_fake_scores_features_and_reach_the_sample(setting):
    _, _, teacher = setting
    fake = dmd2.FakeScore(common.Denoiser(teacher))
    x = torch.randn(5, 2, requires_grad=True)
    logits = fake.logits(x, torch.rand(5))
    assert logits.shape == (5,)
    logits.sum().backward()
    trunk = fake.denoiser.velocity.trunk
    assert x.grad.abs().sum() > 0 and all(p.grad is not None for p in [*trunk.parameters(), *fake.head.parameters()])
    assert all(p.grad is None for p in fake.denoiser.velocity.head.parameters())
    assert teacher.trunk[0].weight.grad is None


def test_bottleneck_of_the_unet_for_images():
    net = common.UNet((3, 8, 8), 8, 1, classes=2)
    fake = dmd2.FakeScore(common.Denoiser(net))
    x, y = torch.randn(2, 3, 8, 8, requires_grad=True), torch.tensor([0, 1])
    seen = []
    net = fake.denoiser.velocity
    net.middle.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    fake(x, torch.ones(2), y)
    assert fake.logits(x, torch.ones(2), y).shape == (2,)
    assert torch.equal(seen[0], seen[1])        # the same features as in the whole network
    fake.logits(x, torch.ones(2), y).sum().backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in net.up.parameters())


def test_ratio_counts_the_updates(setting, monkeypatch):
    """2 generator updates, each followed by `ratio` updates of the fake score; the order is the official one."""
    cfg, data, teacher = setting
    turns, update = [], common.update

    def spy(optimizer, loss, clip=0.0):
        turns.append(len(optimizer.param_groups[0]["params"]))
        update(optimizer, loss, clip)
    monkeypatch.setattr(common, "update", spy)
    dmd2.train(cfg, "turns", data, teacher, ratio=3, gan=True)
    generator, fake = min(turns), max(turns)        # the fake score has a head more
    assert turns == 2 * [generator, fake, fake, fake]


def test_gan_term_freezes_the_fake_score_and_tells_real_from_fake(setting, monkeypatch):
    cfg, _, teacher = setting
    far, trained, seen = Points("unequal_ring"), [], []
    monkeypatch.setattr(far, "sample", lambda n: (torch.full((n, 2), 1e4), None))

    def logits(self, x, sigma, y=None):
        trained.append(self.head[0].weight.requires_grad)
        return x[:, 0] + 0 * self.head[0].weight.sum()
    monkeypatch.setattr(dmd2.FakeScore, "logits", logits)
    monkeypatch.setattr(dmd2, "discriminator_loss", lambda r, f: seen.append((r.mean(), f.mean())) or 0 * (r - f).sum())
    dmd2.train(cfg, "frozen", far, teacher, ratio=3, gan=True)
    assert trained == 2 * [False, True, True, True]     # the generator's turn, then three of the fake score
    assert len(seen) == 6 and all(real > 9000 and abs(fake) < 1000 for real, fake in seen)


def test_gan_weight_reaches_the_generator(setting):
    cfg, data, teacher = setting
    found = []
    for weight in (0.0, 1.0):
        cfg.gan_weight = weight
        with common.seeded(0):      # the same head
            found.append(weights(dmd2.train(cfg, f"weight {weight}", data, teacher, ratio=3, gan=True)[0]))
    assert not torch.equal(*found)


def test_without_the_gan_the_real_data_do_not_matter(setting, monkeypatch):
    cfg, data, teacher = setting
    found = {}
    for gan in (False, True):
        for shift in (0.0, 3.0):
            other = Points("unequal_ring")
            monkeypatch.setattr(other, "sample", lambda n, shift=shift: (data.sample(n)[0] + shift, None))
            with common.seeded(0):      # the same head
                found[gan, shift] = weights(dmd2.train(cfg, f"{gan} {shift}", other, teacher, ratio=3, gan=gan)[0])
    assert torch.equal(found[False, 0.0], found[False, 3.0])
    assert not torch.equal(found[True, 0.0], found[True, 3.0])


def test_training_moves_the_generator_and_not_the_teacher(setting):
    cfg, data, teacher = setting
    before = weights(teacher).clone()
    for simulate in (True, False):
        generator, _ = dmd2.train(cfg, f"s{simulate}", data, teacher, 3, True, (80.0, 1.0), simulate)
        assert torch.equal(weights(teacher), before) and not torch.equal(weights(generator), before)


def test_first_matching_update_is_zero(setting):
    """Fake and teacher start equal, so the first score difference is 0 and only AdamW's decay moves the weights."""
    _, data, teacher = setting
    one = dmd2.Config(steps=1, batch=8, width=8, depth=1, warmup=1, threads=1, checkpoints=1, lr=1e-2)
    generator, _ = dmd2.train(one, "zero", data, teacher)
    assert torch.allclose(weights(generator), weights(teacher) * (1 - 1e-2 * 0.01), atol=1e-6)


def test_learning_rate_rises_stays_and_falls():
    cfg = dmd2.Config(warmup=10, fall=0.5)
    factors = [dmd2.learning_rate(n, 100, cfg) for n in range(101)]
    assert factors[:10] == pytest.approx([(n + 1) / 10 for n in range(10)]) and set(factors[9:51]) == {1}
    assert factors[75] == pytest.approx(0.5) and factors[100] == pytest.approx(0, abs=1e-12)
    cfg.fall = 0.0
    assert {dmd2.learning_rate(n, 100, cfg) for n in range(9, 100)} == {1}


def test_gan_and_scores_see_all_noise_levels(setting, monkeypatch):
    _, data, teacher = setting
    cfg = dmd2.Config(steps=20, batch=64, width=8, depth=1, threads=1, checkpoints=1)
    seen, logits, forward = {"gan": [], "score": []}, dmd2.FakeScore.logits, dmd2.FakeScore.forward
    monkeypatch.setattr(dmd2.FakeScore, "logits", lambda self, x, sigma, y=None:
                        seen["gan"].append(sigma) or logits(self, x, sigma, y))
    monkeypatch.setattr(dmd2.FakeScore, "forward", lambda self, x, sigma, y=None:
                        seen["score"].append(sigma) or forward(self, x, sigma, y))
    dmd2.train(cfg, "noise", data, teacher, ratio=2, gan=True)
    for sigmas in seen.values():
        sigmas = torch.cat(sigmas)
        assert sigmas.max() > 75 and sigmas.min() < 0.01 and sigmas.max() <= cfg.sigma_max


def test_curve_holds_generator_updates_and_distances(setting):
    cfg, data, teacher = setting
    _, curve = dmd2.train(cfg, "curve", data, teacher, ratio=3)
    assert curve[:, 0].tolist() == [1, 2] and (curve[:, 1] > 0).all()
