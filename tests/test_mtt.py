"""MTT: the unrolled student against plain SGD and finite differences, the loss's scale, batches, gradient distance."""
import types

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import load_method

mtt = load_method("mtt")


def setting(network="mlp", shape=(1, 4, 4), classes=3, n=6, dtype=torch.float64):
    torch.manual_seed(0)
    cfg = types.SimpleNamespace(network=network, width=5, dev=torch.device("cpu"))
    forward = mtt.Functional(cfg, types.SimpleNamespace(shape=shape, n_classes=classes))
    forward.net.to(dtype)
    images = torch.randn(n, *shape, dtype=dtype)
    return forward, forward.fresh(2), images, torch.arange(n) % classes


@pytest.mark.parametrize("network, shape", [("mlp", (1, 4, 4)), ("convnet", (3, 8, 8))])
def test_flat_network_is_the_network(network, shape):
    forward, theta, images, _ = setting(network, shape)
    nn.utils.vector_to_parameters(theta[0], forward.net.parameters())
    assert torch.allclose(forward(theta[0], images), forward.net(images))
    assert not torch.allclose(theta[0], theta[1]), "fresh networks differ"


def test_unrolled_steps_are_sgd_on_the_batches():
    forward, theta, images, labels = setting()
    batches = [torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5]), torch.tensor([1, 4])]
    found = mtt.unrolled(forward, theta[0], images, labels, torch.tensor(0.3), batches)
    nn.utils.vector_to_parameters(theta[0].clone(), forward.net.parameters())
    optimizer = torch.optim.SGD(forward.net.parameters(), lr=0.3)
    for index in batches:
        optimizer.zero_grad()
        F.cross_entropy(forward.net(images[index]), labels[index]).backward()
        optimizer.step()
    assert torch.allclose(found, nn.utils.parameters_to_vector(forward.net.parameters()), atol=1e-7)


def test_gradients_reach_pixels_and_alpha_through_every_step():
    forward, theta, images, labels = setting()
    alpha, start, target = torch.tensor(0.5, dtype=torch.float64), theta[0], theta[1]
    batches = [torch.arange(6)] * 4

    def loss(x, a):
        return mtt.trajectory_loss(mtt.unrolled(forward, start, x, labels, a, batches), start, target)

    # numerical derivatives see all four steps; a step cut off from the graph, or alpha detached, would not
    assert torch.autograd.gradcheck(loss, (images.requires_grad_(True), alpha.requires_grad_(True)))
    assert not start.requires_grad


def test_augmentation_acts_on_the_batch_and_passes_gradient():
    forward, theta, images, labels = setting()
    images.requires_grad_(True)
    batches, alpha = [torch.arange(6)], torch.tensor(0.1)
    flipped = mtt.unrolled(forward, theta[0], images, labels, alpha, batches, lambda x: x.flip(-1))
    assert torch.allclose(flipped, mtt.unrolled(forward, theta[0], images.flip(-1), labels, alpha, batches))
    assert torch.autograd.grad(flipped.sum(), images)[0].abs().sum() > 0


def test_trajectory_loss_is_one_for_standing_still_and_zero_on_target():
    start, target = torch.randn(4, 7), torch.randn(4, 7)
    assert torch.allclose(mtt.trajectory_loss(start, start, target), torch.ones(4))
    assert torch.equal(mtt.trajectory_loss(target, start, target), torch.zeros(4))
    half = (start + target) / 2
    assert torch.allclose(mtt.trajectory_loss(half, start, target), torch.full((4,), 0.25))
    assert torch.allclose(mtt.trajectory_loss(9 * half, 9 * start, 9 * target), torch.full((4,), 0.25)), "no unit"


def test_trajectory_loss_has_gradient_to_the_student_alone():
    student, start, target = (torch.randn(7, requires_grad=True) for _ in range(3))
    mtt.trajectory_loss(student, start, target).backward()
    expected = 2 * (student - target) / (start - target).square().sum()
    assert torch.allclose(student.grad, expected) and start.grad is None and target.grad is None


def test_batches_use_every_image_once_and_the_small_part_first():
    torch.manual_seed(1)
    parts = list(mtt.batches_of(7, 3, 6))
    assert [len(p) for p in parts] == [1, 3, 3, 1, 3, 3]
    for one_pass in (parts[:3], parts[3:]):
        assert sorted(torch.cat(one_pass).tolist()) == list(range(7))
    assert [len(p) for p in mtt.batches_of(7, 0, 3)] == [7, 7, 7]


def test_gradient_distance_is_rowwise_cosine_without_biases():
    shapes = [(2, 3), (2,), (4, 1, 2, 2)]
    torch.manual_seed(2)
    real, synthetic = 10 * torch.randn(5, 24), 10 * torch.randn(5, 24)
    expected = torch.zeros(5)
    for i in range(5):
        for r, s in ((real[i, :6].view(2, 3), synthetic[i, :6].view(2, 3)),
                     (real[i, 8:].view(4, 4), synthetic[i, 8:].view(4, 4))):
            expected[i] += sum(1 - F.cosine_similarity(a, b, 0) for a, b in zip(r, s))
    assert torch.allclose(mtt.gradient_distance(real, synthetic, shapes), expected, atol=1e-5)
    scaled = torch.cat([3 * real[:, :3], 0.5 * real[:, 3:6], -real[:, 6:8], real[:, 8:]], 1)    # biases differ
    assert torch.allclose(mtt.gradient_distance(real, scaled, shapes), torch.zeros(5), atol=1e-5)
    assert torch.allclose(mtt.gradient_distance(real, -real, shapes), torch.full((5,), 12.0), atol=1e-5)
    real.requires_grad_(True), synthetic.requires_grad_(True)
    mtt.gradient_distance(real, synthetic, shapes).sum().backward()
    assert real.grad is None and synthetic.grad[:, 6:8].abs().sum() == 0 and synthetic.grad[:, :6].abs().sum() > 0


def test_centres():
    torch.manual_seed(3)
    x = torch.cat([torch.randn(50, 1, 2, 2) * 0.1 + c for c in (-5.0, 0.0, 5.0)])
    assert torch.allclose(mtt.centres(x, 1)[0], x.mean(0), atol=1e-5)
    found = mtt.centres(x, 3)
    # every centre is the mean of the points nearest to it
    member = torch.cdist(x.flatten(1), found.flatten(1)).argmin(1)
    for k in member.unique():
        assert torch.allclose(found[k], x[member == k].mean(0), atol=1e-4)


def test_distillation_beats_the_start_on_a_tiny_problem():
    forward, _, images, labels = setting(dtype=torch.float32)
    torch.manual_seed(4)
    start, other = forward.fresh(2)
    target = start + 0.2 * (other - start)
    images, alpha = images.requires_grad_(True), torch.tensor(0.1)
    optimizer, losses = torch.optim.Adam([images], 0.1), []
    for _ in range(60):
        student = mtt.unrolled(forward, start, images, labels, alpha, mtt.batches_of(6, 0, 5))
        losses.append(mtt.trajectory_loss(student, start, target))
        mtt.common.update(optimizer, losses[-1])
    assert losses[-1] < 0.8 * losses[0]


def test_experts_leave_distinct_epochs(tmp_path):
    """An alias of the live weights in every slot is the error to guard against."""
    cfg = mtt.Config(data="glyphs", experts=3, expert_epochs=2, batch_real=100, out=str(tmp_path))
    real, labels = torch.randn(300, 1, 4, 4), torch.arange(300) % 3
    data = types.SimpleNamespace(shape=(1, 4, 4), n_classes=3)
    forward = mtt.Functional(cfg, data)
    theta = mtt.train_experts(cfg, real, labels, forward, "test")
    assert theta.shape[:2] == (3, 3) and len({t.sum().item() for t in theta.flatten(0, 1)}) == 9
    losses = [forward.loss(t, real, labels).item() for t in theta[:, 0]]
    assert losses[2] < losses[0]
