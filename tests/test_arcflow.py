"""ArcFlow: the closed form against quadrature, limits, what the imitation loss sees, where gradients flow."""
import math

import pytest
import torch
from conftest import load_method

import common

arcflow = load_method("arcflow")
POINTS, IMAGES = (3,), (2, 4, 4)


def policy_of(shape, batch=5, modes=4, spread=3.0, seed=0):
    """A random momentum mixture in float64 and its leaves."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_()
    m, logits = draw(batch, modes, *shape), draw(batch, modes, 1, *shape[1:])
    raw = draw(batch, modes - 1, 1, *shape[1:])
    g = torch.cat([torch.zeros_like(logits[:, :1]), spread * raw], 1)
    return (m, logits, g), (m, logits, raw)


def velocity_by_hand(policy, since):
    m, logits, g = policy
    return (torch.softmax(logits, 1) * m * torch.exp(g * since)).sum(1)


def times(*values, batch=5):
    return [torch.full((batch,), v, dtype=torch.float64) for v in values]


@pytest.mark.parametrize("shape", [POINTS, IMAGES])
@pytest.mark.parametrize("a, b", [(1.0, 0.5), (0.83, 0.61)])
def test_closed_form_equals_fine_quadrature(shape, a, b):
    policy, leaves = policy_of(shape)
    x = torch.randn(5, *shape, dtype=torch.float64)
    exact = arcflow.move(policy, x, *times(1.0, a, b))
    n = 2000        # Simpson's rule
    nodes = torch.linspace(a, b, n + 1, dtype=torch.float64)
    weights = torch.tensor([1.0] + [4.0, 2.0] * (n // 2 - 1) + [4.0, 1.0], dtype=torch.float64) * (a - b) / (3 * n)
    numeric = x - sum(w * velocity_by_hand(policy, 1.0 - t) for w, t in zip(weights.tolist(), nodes.tolist()))
    torch.testing.assert_close(exact, numeric, rtol=1e-9, atol=1e-9)
    found, wanted = (torch.autograd.grad(out.sin().sum(), leaves, retain_graph=True) for out in (exact, numeric))
    for ours, theirs in zip(found, wanted):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8)


def test_two_moves_equal_one():
    policy, _ = policy_of(POINTS)
    x = torch.randn(5, 3, dtype=torch.float64)
    half = arcflow.move(policy, x, *times(0.9, 0.9, 0.7))
    torch.testing.assert_close(arcflow.move(policy, half, *times(0.9, 0.7, 0.2)),
                               arcflow.move(policy, x, *times(0.9, 0.9, 0.2)))


def test_one_mode_without_momentum_is_a_straight_step():
    m = torch.randn(5, 1, 3, dtype=torch.float64)
    policy = m, torch.randn(5, 1, 1, dtype=torch.float64), torch.zeros(5, 1, 1, dtype=torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(arcflow.move(policy, x, *times(1.0, 0.8, 0.3)), x - 0.5 * m[:, 0])


def test_duration_zero_is_the_velocity_and_growth_is_toward_the_data():
    policy, _ = policy_of(POINTS)
    torch.testing.assert_close(arcflow.mean_velocity(policy, *times(0.4, 0.0)), velocity_by_hand(policy, 0.4))
    g = torch.tensor([0.0, 2.0]).view(1, 2, 1)
    one = torch.ones(1, 2, 1), torch.tensor([-30.0, 30.0]).view(1, 2, 1), g
    early, late = (arcflow.mean_velocity(one, torch.tensor([s]), torch.zeros(1)).item() for s in (0.0, 0.5))
    assert early == pytest.approx(1.0) and late == pytest.approx(math.e)


def test_phi_and_its_gradient_near_zero():
    y = torch.tensor([-1.0, -1e-3, -1e-5, 0.0, 1e-9, 1e-5, 1e-3, 2.0], dtype=torch.float64, requires_grad=True)
    value = arcflow.phi(y)
    series = sum(y.detach() ** k / math.factorial(k + 1) for k in range(18))
    torch.testing.assert_close(value.detach(), series, rtol=3e-9, atol=0)
    slope = sum(k * y.detach() ** (k - 1) / math.factorial(k + 1) for k in range(1, 18))
    torch.testing.assert_close(torch.autograd.grad(value.sum(), y)[0], slope, rtol=2e-5, atol=0)


def test_dropout_removes_modes_but_never_all():
    logits = torch.zeros(4000, 3, 1)
    dropped = arcflow.drop_modes(logits, 0.5).isinf()
    assert not dropped.all(1).any()
    assert dropped.float().mean().item() == pytest.approx(0.5 - 0.125, abs=0.03)    # all three, once in eight, stay
    assert not arcflow.drop_modes(logits, 0.0).isinf().any()


def imitate(policy, teacher, x, ratio=0.0, window=0.0, dropout=0.0, tau=1.0, size=0.5, shift=1.0, states=4, seed=1):
    torch.manual_seed(seed)
    return arcflow.imitation_loss(teacher, policy, x, *times(tau), size, ratio, states, window, dropout,
                                  lambda t: arcflow.warped(t, shift))


def turning_teacher(t_src):
    """A teacher whose velocity, the same everywhere, is a momentum mixture, and the policy that equals it."""
    policy = [part.detach()[:1].expand(5, *part.shape[1:]) for part in policy_of(POINTS, spread=1.0)[0]]
    return policy, lambda x, t: arcflow.mean_velocity(policy, t_src - t, torch.zeros_like(t))


@pytest.mark.parametrize("shift", [1.0, 3.2])
def test_a_policy_that_equals_the_teacher_has_no_loss_and_ends_on_its_path(shift):
    t_src, t_dst = arcflow.warped(0.9, shift), arcflow.warped(0.4, shift)
    policy, teacher = turning_teacher(t_src)
    x = torch.randn(5, 3, dtype=torch.float64)
    loss, x_dst = imitate(policy, teacher, x, tau=0.9, shift=shift)
    assert loss.item() < 1e-20
    exact = common.solve(teacher, x, torch.linspace(t_src, t_dst, 2001, dtype=torch.float64), "heun")
    torch.testing.assert_close(x_dst, exact, rtol=1e-5, atol=1e-6)
    bent = policy[0], policy[1], policy[2] * 1.1
    assert imitate(bent, teacher, x, tau=0.9, shift=shift)[0] > 1e-7
    assert imitate(policy, teacher, x, tau=0.9, shift=shift, window=0.1)[0] > 1e-7     # the mean is of later times


def test_prediction_at_full_teacher_ratio_is_the_mean_over_the_teacher_step():
    """With ratio 1 the states are the corners of the teacher's Euler path and the n means join up over the segment."""
    policy, _ = policy_of(POINTS)
    seen = []

    def teacher(x, t):
        seen.append((x, t))
        return torch.zeros_like(x)
    x = torch.randn(5, 3, dtype=torch.float64)
    loss, x_dst = imitate(policy, teacher, x, ratio=1.0, dropout=0.7)
    corners = [t for _, t in seen] + times(0.5)
    by_hand = sum((((arcflow.move(policy, x, *times(1.0), a, b) - x) / (a - b)[:, None]) ** 2).mean()
                  for a, b in zip(corners, corners[1:])) / 4
    torch.testing.assert_close(loss, by_hand)
    assert all(torch.equal(state, x) for state, _ in seen) and torch.allclose(seen[0][1], times(1.0)[0])
    torch.testing.assert_close(x_dst, x)        # no student time is left, so the dropped modes do not matter


def test_states_at_full_teacher_ratio_are_the_teachers_euler_steps():
    policy, _ = policy_of(POINTS)
    seen = []

    def teacher(x, t):
        seen.append((x, t))
        return torch.tanh(x) + t[:, None]
    _, x_dst = imitate(policy, teacher, torch.randn(5, 3, dtype=torch.float64), ratio=1.0, shift=3.2)
    seen.append((x_dst, times(arcflow.warped(0.5, 3.2))[0]))
    assert len(seen) == 5
    for (x, t), (x_next, t_next) in zip(seen[:4], seen[1:]):
        torch.testing.assert_close(x_next, x + (t_next - t)[:, None] * (torch.tanh(x) + t[:, None]))


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_states_lie_in_the_segment_before_the_window(ratio):
    policy, _ = policy_of(POINTS)
    seen = []

    def teacher(x, t):
        seen.append(t)
        return -x
    imitate(policy, teacher, torch.randn(5, 3, dtype=torch.float64), ratio, window=0.1, tau=0.5)
    t = torch.stack(seen)
    assert (t.diff(dim=0) <= 0).all() and t.max() <= 0.5 and t.min() >= 0.1 - 1e-9


def test_gradient_reaches_the_policy_through_the_prediction_alone():
    policy, leaves = policy_of(POINTS)
    weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    seen = []

    def teacher(x, t):
        seen.append((x, t))
        return torch.tanh(x @ weight)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    loss, x_dst = imitate(policy, teacher, x, ratio=0.4, window=0.05, dropout=0.3)
    assert not x_dst.requires_grad
    found = torch.autograd.grad(loss, [*leaves, x, weight], allow_unused=True, retain_graph=True)
    assert found[3] is None and found[4] is None
    torch.manual_seed(1)        # the same loss with the states as constants
    torch.rand(5, 4), torch.rand(5, 4)
    steps = torch.nn.functional.pad(torch.rand(5, 3).sort(1)[0], (1, 0))
    steps = 0.4 * 0.45 * torch.nn.functional.pad(steps, (0, 1), value=1.0).diff(dim=1)
    fixed = [(s.detach(), t.detach()) for s, t in seen]
    errors = [arcflow.mean_velocity(policy, 1.0 - t, steps[:, i] + 0.05) - torch.tanh(s @ weight.detach())
              for i, (s, t) in enumerate(fixed)]
    total = sum(error.square().mean() for error in errors) / 4
    torch.testing.assert_close(loss, total, rtol=1e-6, atol=0)
    for ours, theirs in zip(found, torch.autograd.grad(total, leaves)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_states_use_the_thinned_mixture_and_predictions_the_whole():
    policy, _ = policy_of(POINTS, spread=1.0)
    visited, losses = [], []

    def teacher(x, t):
        visited.append(x)
        return torch.zeros_like(x)
    for dropout in (0.0, 0.6):
        loss, _ = imitate(policy, teacher, torch.zeros(5, 3, dtype=torch.float64), dropout=dropout)
        losses.append(loss)
    assert not torch.allclose(torch.stack(visited[:4]), torch.stack(visited[4:]))
    torch.testing.assert_close(*losses)         # the teacher is 0 everywhere, so only predictions can differ


def test_chord_loss_is_zero_on_the_teachers_chord():
    t = torch.linspace(1.0, 0.5, 5)
    x = torch.randn(6, 2)

    def teacher(x, t):
        return x * t[:, None]
    end = common.solve(teacher, x, t, "heun")
    policy = [p.requires_grad_() for p in (((x - end) / 0.5)[:, None], torch.zeros(6, 1, 1), torch.zeros(6, 1, 1))]
    loss, x_dst = arcflow.chord_loss(teacher, policy, x, t)
    assert loss.item() < 1e-12 and loss.requires_grad and not x_dst.requires_grad
    torch.testing.assert_close(x_dst, end)


def networks():
    torch.manual_seed(0)
    mlp, unet = common.MLP(2, 16, 2), common.UNet((3, 8, 8), 8, 1, classes=4)
    torch.nn.init.normal_(unet.down[0].conv2.weight)
    return [(mlp, torch.randn(5, 2), None), (unet, torch.randn(5, 3, 8, 8), torch.tensor([0, 1, 2, 3, 4]))]


@pytest.mark.parametrize("teacher, x, y", networks())
def test_the_student_starts_as_the_teacher(teacher, x, y):
    t = torch.rand(5)
    student = arcflow.MomentumNetwork(common.frozen(teacher), 6, init_noise=0.0)
    m, logits, g = student(x, t, y)
    for k in range(6):
        torch.testing.assert_close(m[:, k], teacher(x, t, y))
    assert logits.shape == g.shape == (5, 6, 1, *x.shape[2:]) and not logits.any() and not g[:, 0].any()
    growth = g[0, 1:].flatten(1)[:, 0].exp()
    torch.testing.assert_close(growth[[0, -1]], torch.tensor([0.2, 4.0]))
    torch.testing.assert_close(growth[1:] / growth[:-1], torch.full((4,), 20 ** 0.25))
    assert all(p.requires_grad for p in student.parameters())
    noisy = arcflow.MomentumNetwork(teacher, 300, init_noise=0.05)(x, t, y)[0] - teacher(x, t, y)[:, None]
    assert noisy.std().item() == pytest.approx(0.05, rel=0.15)
    assert noisy.flatten(3).std(-1).max() < 1e-5 if x.dim() == 4 else True      # one number a mode and channel


@pytest.mark.parametrize("teacher, x, y", networks())
def test_fifty_calls_without_momentum_are_the_teachers_euler_steps(teacher, x, y):
    student = arcflow.MomentumNetwork(teacher, 1, momentum=False)
    path = arcflow.sample(student, x, y, 50, lambda t: t, inside=3)
    torch.testing.assert_close(path[::3], common.sample_flow(teacher, x, 50, y, path=True), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(path[1], path[0] + (path[3] - path[0]) / 3, rtol=1e-4, atol=1e-5)


def test_sample_asks_the_network_once_a_segment_at_warped_times():
    asked = []

    def student(x, t, y):
        asked.append(t[0].item())
        return torch.ones(len(x), 1, 2), torch.zeros(len(x), 1, 1), torch.zeros(len(x), 1, 1)
    noise = torch.randn(4, 2)
    path = arcflow.sample(student, noise, None, 2, lambda t: arcflow.warped(t, 3.2), inside=4)
    assert asked == pytest.approx([1.0, 3.2 / 4.2]) and len(path) == 9
    torch.testing.assert_close(path[-1], noise - 1)
