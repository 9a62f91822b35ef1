"""InstaFlow: the losses in the paper's letters, exact couplings of Gaussians, straightness along the own ODE."""
import math

import pytest
import torch
from conftest import load_method

import common

insta = load_method("instaflow")


class Linear(torch.nn.Module):
    """A velocity with a parameter, that keeps what it was called with."""

    def __init__(self):
        super().__init__()
        self.gain, self.seen = torch.nn.Parameter(torch.tensor(0.7)), []

    def forward(self, x, t, y=None):
        self.seen.append((x, t, y))
        return self.gain * x * common.expand(1 + t, x)


def gaussian_flow(std):
    """Exact velocity E[noise - x | x_t] of a 1-rectified flow whose data are N(0, std^2)."""
    def velocity(x, t, y=None):
        t = common.expand(t, x)
        return (t - (1 - t) * std**2) / ((1 - t).square() * std**2 + t.square()) * x
    return velocity


@pytest.mark.parametrize("shape", [(2,), (3, 4, 4)])
def test_reflow_loss_in_the_papers_letters(shape):
    """Paper: time s = 1 - t from noise X0 to data X1, X_s = s X1 + (1 - s) X0, target X1 - X0 for the velocity -v."""
    torch.manual_seed(0)
    x0, x1, t, net = torch.randn(6, *shape), torch.randn(6, *shape), torch.rand(6), Linear()
    found = insta.reflow_loss(net, x0, x1, t)
    s = common.expand(1 - t, x0)
    x_s = s * x1 + (1 - s) * x0
    assert torch.allclose(net.seen[0][0], x_s, atol=1e-6) and torch.equal(net.seen[0][1], t)
    expected = ((x1 - x0) - (-net(x_s, t))).square().mean()
    assert torch.allclose(found, expected, rtol=1e-5)


def test_reflow_is_zero_on_straight_lines_that_do_not_cross():
    """The coupling X1 = a X0 + b of a straight flow: its velocity is exact, at every time."""
    torch.manual_seed(0)
    noise, t, a, b = torch.randn(50, 2), torch.rand(50), 0.3, 2.0

    def straight(x, t, y=None):     # x_t = (1 - t)(a z + b) + t z solved for z
        t = common.expand(t, x)
        z = (x - (1 - t) * b) / ((1 - t) * a + t)
        return z - (a * z + b)
    assert insta.reflow_loss(straight, noise, a * noise + b, t) < 1e-9
    assert insta.reflow_loss(straight, noise.flip(0), a * noise + b, t) > 0.5       # re-matched: lines cross
    assert torch.allclose(insta.one_step(straight, noise), a * noise + b, atol=1e-6)
    assert insta.simulate(straight, noise, None, 7)[1] < 1e-9


def test_distillation_is_reflow_at_the_noise_end():
    torch.manual_seed(0)
    noise, image, y, net = torch.randn(6, 2), torch.randn(6, 2), torch.arange(6), Linear()
    found = insta.distillation_loss(net, noise, image, y)
    x, t, label = net.seen[0]
    assert torch.equal(x, noise) and torch.equal(t, torch.ones(6)) and label is y
    assert torch.allclose(found, insta.reflow_loss(net, noise, image, torch.ones(6), y), rtol=1e-5)
    assert torch.allclose(found, (noise - net(noise, torch.ones(6)) - image).square().mean(), rtol=1e-6)
    other = insta.distillation_loss(net, noise, image, y, distance=lambda a, b: (a - b).abs().sum())
    assert torch.allclose(other, (noise - net(noise, torch.ones(6)) - image).abs().sum(), rtol=1e-6)


def test_gradient_goes_to_the_network_alone():
    for loss in (lambda n, z, x: insta.reflow_loss(n, z, x, torch.rand(4)), insta.distillation_loss):
        net, noise, image = Linear(), torch.randn(4, 2, requires_grad=True), torch.randn(4, 2, requires_grad=True)
        loss(net, noise, image).backward()
        assert net.gain.grad is not None and noise.grad is None and image.grad is None


def test_straightness_by_hand():
    line = torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1)
    assert insta.straightness(line) == 0
    bent = torch.tensor([[[0.0, 0.0]], [[3.0, 1.0]], [[4.0, 0.0]]])     # velocities (6, 2), (2, -2), chord (4, 0)
    assert insta.straightness(bent) == pytest.approx((4 + 4 + 4 + 4) / 2)
    assert insta.straightness(torch.cat([bent, line.expand(3, 1, 2)], 1)) == pytest.approx(4)      # mean over samples


def test_straightness_of_the_own_ode_not_of_the_training_line():
    """Data N(0, s^2): the flow is X_t = X0 sqrt((1 - t)^2 s^2 + t^2), S = int |dX_t/dt|^2 - |X1 - X0|^2. On the
    training lines the same integrand is the loss, far larger."""
    torch.manual_seed(0)
    std, noise = 0.2, torch.randn(5000, 2)
    images, bend = insta.simulate(gaussian_flow(std), noise, None, 2000)
    assert torch.allclose(images, std * noise, atol=0.02)
    t = torch.linspace(0, 1, 20001, dtype=torch.float64)
    speed = (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2).sqrt()
    exact = (torch.trapezoid(speed.square(), t) - (1 - std) ** 2).item() * noise.square().sum(1).mean().item()
    assert bend == pytest.approx(exact, rel=0.02)
    line = insta.reflow_loss(gaussian_flow(std), noise, std * torch.randn(5000, 2), torch.rand(5000)) * 2
    assert line > 3 * bend


def test_transport_cost_falls_and_the_marginal_stays():
    """Independent N(0, 1) and N(0, s^2) in 2-D cost 2 (1 + s^2), the flow's coupling 2 (1 - s)^2."""
    torch.manual_seed(0)
    std, noise = 0.5, torch.randn(20000, 2)
    images = insta.simulate(gaussian_flow(std), noise, None, 200)[0]
    assert insta.transport_cost(noise, std * torch.randn(20000, 2)) == pytest.approx(2 * (1 + std**2), rel=0.03)
    assert insta.transport_cost(noise, images) == pytest.approx(2 * (1 - std) ** 2, rel=0.03)
    assert images.std().item() == pytest.approx(std, rel=0.02)


def test_stretch_of_a_linear_map():
    a, b = torch.randn(9, 3, 2, 2), torch.randn(9, 3, 2, 2)
    assert insta.stretch(a, 1 - 3 * a, b, 1 - 3 * b) == pytest.approx(3, rel=1e-5)


def test_one_step_of_the_1_rf_goes_to_the_mean():
    """Independent X0, X1: E[X1 - X0 | X0] leads every noise to E[X1], which is why one step of it is useless."""
    assert insta.one_step(gaussian_flow(0.5), torch.randn(10, 2)).abs().max() < 1e-6


def test_parts_and_labels_of_simulate():
    torch.manual_seed(0)
    noise, y = torch.randn(25, 2), torch.arange(25) % 3

    def velocity(x, t, y):
        return x * (y[:, None] + t[:, None])
    whole, parts = insta.simulate(velocity, noise, y, 5), insta.simulate(velocity, noise, y, 5, part=7)
    assert torch.allclose(whole[0], parts[0]) and math.isclose(whole[1], parts[1], rel_tol=1e-5)


def test_pairs_are_the_flows_own_and_guided():
    """Guidance in the paper's form: w v(.|c) + (1 - w) v(.|null); two calls of the network."""
    torch.manual_seed(0)
    cfg = insta.Config(data="eight_gaussians", pairs=40, nfe_teacher=6)
    data = common.load_data(cfg, conditional=True)
    net = common.make_network(cfg, data, 8, 1).requires_grad_(False)
    guided = insta.with_guidance(net, 3.0, data.classes)
    noise, images, y = insta.make_pairs(cfg, data, guided)
    x, null = noise, torch.full_like(y, data.classes)
    for i in range(6):
        t = torch.full((40,), 1 - i / 6)
        x = x - (3 * net(x, t, y) - 2 * net(x, t, null)) / 6
    assert torch.allclose(images, x, atol=1e-5)
    assert insta.calls(guided) == 2 and insta.calls(net) == 1
    assert insta.with_guidance(net, 1, data.classes) is net and insta.with_guidance(net, 3.0, 0) is net


def test_training_keeps_the_pairing_and_leaves_the_start_alone():
    """On the pairs X1 = X0 / 2 + 1 reflow finds one flow and distillation one map; re-matched noise leads to the mean."""
    cfg = insta.Config(batch=128, lr=1e-2)
    data = common.load_data(cfg)
    torch.manual_seed(0)
    start = common.make_network(cfg, data, 32, 2).requires_grad_(False)
    before = [p.clone() for p in start.parameters()]
    noise = torch.randn(2000, 2)
    pairs, test = (noise, noise / 2 + 1, None), torch.randn(500, 2)
    student = insta.distil(cfg, "student", start, pairs, 150)
    straight = insta.reflow(cfg, "reflow", data, start, pairs, 150)
    loose = insta.reflow(cfg, "control", data, start, pairs, 150, rematch=True)
    error = [(insta.one_step(net, test) - test / 2 - 1).square().mean().sqrt() for net in (student, straight, loose)]
    assert error[0] < 0.1 and error[1] < 0.1 and error[2] > 0.35
    assert (insta.one_step(loose, test) - 1).square().mean() < 0.03
    assert all(torch.equal(a, b) for a, b in zip(before, start.parameters()))
    assert all(not p.requires_grad for p in student.parameters())
