"""FTD: GSAM's gradient and its limits, the chained error and its decomposition, curvature, the unrolled student."""
import types

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import load_method
from torch.func import grad, vmap

ftd = load_method("ftd")


def bowl(*curvatures):
    """Gradient and Hessian of a quadratic with random axes."""
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(len(curvatures), len(curvatures), dtype=torch.float64))[0]
    hessian = q @ torch.diag(torch.tensor(curvatures, dtype=torch.float64)) @ q.T
    return (lambda theta: theta @ hessian), hessian


def test_gsam_in_steps_on_a_quadratic():
    gradient, hessian = bowl(1.0, 5.0, 20.0)
    theta = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    g = hessian @ theta
    climb = 0.1 * theta**2 * g / torch.linalg.vector_norm(theta.abs() * g)
    g_p = hessian @ (theta + climb)
    unit = g_p / g_p.norm()
    perpendicular = g - (g @ unit) * unit
    assert abs(perpendicular @ g_p) < 1e-9 < perpendicular.norm()
    found = ftd.gsam_gradient(gradient, theta, 0.1, 0.4)
    assert torch.allclose(found, g_p - 0.4 * perpendicular)
    # what remains of g's orthogonal part points away from it, and the part along g_p is untouched
    assert torch.allclose(found @ unit, g_p.norm()) and (found - g_p) @ g < 0


def test_gsam_limits():
    gradient, _ = bowl(1.0, 5.0, 20.0)
    theta = torch.randn(4, 3, dtype=torch.float64)
    assert torch.equal(ftd.gsam_gradient(gradient, theta, 0.0, 0.4), gradient(theta))
    assert torch.allclose(ftd.gsam_gradient(gradient, theta, 1e-9, 0.4), gradient(theta), atol=1e-6)
    sam = ftd.gsam_gradient(gradient, theta, 0.5, 0.0)      # without the decomposition: the gradient after the climb
    assert not torch.allclose(sam, gradient(theta))
    rows = torch.stack([ftd.gsam_gradient(gradient, row, 0.5, 0.4) for row in theta])
    assert torch.allclose(ftd.gsam_gradient(gradient, theta, 0.5, 0.4), rows), "leading axes are separate networks"


def test_gsam_climbs_further_where_weights_are_large():
    seen = []

    def gradient(theta):
        seen.append(theta)
        return torch.ones_like(theta)

    theta = torch.tensor([1.0, 2.0, -4.0])
    ftd.gsam_gradient(gradient, theta, 0.1, 0.4)
    step = seen[1] - theta
    assert torch.allclose(step / step[0], torch.tensor([1.0, 4.0, 16.0]), rtol=1e-4)
    assert torch.allclose((step / theta.abs()).norm(), torch.tensor(0.1))      # length rho, relative to the weights


def test_unrolled_is_gradient_descent_and_differentiable():
    torch.manual_seed(1)
    cfg = types.SimpleNamespace(network="mlp", width=5, dev=torch.device("cpu"))
    forward = ftd.Functional(cfg, types.SimpleNamespace(shape=(1, 4, 4), n_classes=3))
    forward.net.double()
    start = forward.fresh(2)
    images, labels = torch.randn(2, 6, 1, 4, 4, dtype=torch.float64), torch.arange(6) % 3
    rates = torch.tensor([[0.3], [0.6]], dtype=torch.float64)
    gradient = vmap(grad(forward.loss), (0, 0, None))
    found = ftd.unrolled(gradient, start, images, labels, rates, 4)
    for k in range(2):
        nn.utils.vector_to_parameters(start[k].clone(), forward.net.parameters())
        optimizer = torch.optim.SGD(forward.net.parameters(), lr=rates[k].item())
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(forward.net(images[k]), labels).backward()
            optimizer.step()
        assert torch.allclose(found[k], nn.utils.parameters_to_vector(forward.net.parameters()))

    def loss(x, lr):
        return ftd.trajectory_loss(ftd.unrolled(gradient, start, x, labels, lr, 3), start, start.flip(0))

    images, rates = images[:, :2].clone().requires_grad_(True), rates.requires_grad_(True)
    labels = labels[:2]
    assert torch.autograd.gradcheck(loss, (images, rates))      # through every step, the sets apart


def test_trajectory_loss_scale_and_gradient():
    student, start, target = (torch.randn(3, 7, requires_grad=True) for _ in range(3))
    assert torch.allclose(ftd.trajectory_loss(start, start, target), torch.ones(3))
    ftd.trajectory_loss(student, start, target).sum().backward()
    assert torch.allclose(student.grad, 2 * (student - target) / (start - target).square().sum(1, keepdim=True))
    assert start.grad is None and target.grad is None


def test_accumulated_error_of_a_linear_student():
    """A[theta] = a theta + b, so eps_{i+1} = a eps_i + matching error, in closed form."""
    torch.manual_seed(2)
    checkpoints = torch.randn(4, 2, 5, dtype=torch.float64)
    for a in (0.5, 1.3):
        b = torch.randn(5, dtype=torch.float64)
        epsilon, chain, match = torch.zeros(2, 5, dtype=torch.float64), [], []
        for i in range(3):
            matching = a * checkpoints[i] + b - checkpoints[i + 1]
            epsilon = a * epsilon + matching
            chain.append(epsilon.square().sum(1) / (checkpoints[0] - checkpoints[i + 1]).square().sum(1))
            match.append(matching.square().sum(1) / (checkpoints[i] - checkpoints[i + 1]).square().sum(1))
        found = ftd.accumulated_error(lambda theta, a=a, b=b: a * theta + b, checkpoints)
        expected = torch.stack(chain).mean(1), torch.stack(match).mean(1), torch.full((2,), a)
        for series, right in zip(found, expected):
            assert torch.allclose(series, right.double(), atol=1e-6)


def test_accumulated_error_of_a_perfect_student_is_zero():
    checkpoints = torch.arange(4.0)[:, None, None] * torch.ones(1, 2, 5)
    chain, match, _ = ftd.accumulated_error(lambda theta: theta + 1, checkpoints)
    assert torch.equal(chain, torch.zeros(3)) and torch.equal(match, torch.zeros(3))


def test_top_eigenvalue():
    _, hessian = bowl(0.5, -1.0, 3.0, 7.0)
    theta = torch.randn(4, dtype=torch.float64)
    value = ftd.top_eigenvalue(lambda t: 0.5 * t @ hessian @ t, theta, 60)
    assert value.item() == pytest.approx(7.0, rel=1e-6)


def test_gsam_finds_the_flatter_of_two_minima():
    """A sharp and a flat minimum of one height: from between them descent ends in the nearer, GSAM does not."""
    def loss(t):
        return torch.minimum(50 * (t - 1.0).square(), (t - 2.0).square()).sum()

    ends = []
    for rho in (0.0, 0.5):
        theta = torch.tensor([1.05])
        for _ in range(300):
            theta = theta - 0.005 * ftd.gsam_gradient(grad(loss), theta, rho, 0.4)
        ends.append(theta.item())
    assert ends[0] == pytest.approx(1.0, abs=0.05) and ends[1] > 1.2


def test_experts_with_and_without_rho_share_start_and_batches(tmp_path):
    cfg = ftd.Config(data="glyphs", experts=3, expert_epochs=2, batch_real=100, out=str(tmp_path))
    real, labels = torch.randn(300, 1, 4, 4), torch.arange(300) % 3
    forward = ftd.Functional(cfg, types.SimpleNamespace(shape=(1, 4, 4), n_classes=3))
    plain, tiny, flat = (ftd.train_experts(cfg, f"rho {rho}", rho, real, labels, forward, "test")
                         for rho in (0, 1e-7, 0.5))
    assert torch.equal(plain[0], flat[0]) and not torch.allclose(plain[-1], flat[-1], atol=1e-4)
    assert torch.allclose(plain[-1], tiny[-1], atol=1e-4)
    assert len({t.sum().item() for t in flat.flatten(0, 1)}) == 9, "every epoch is stored apart, for every expert"
