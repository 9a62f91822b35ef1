"""Self Forcing: roll-out, contexts, gradient flow, the loss."""
import pytest
import torch
import torch.nn.functional as F
from conftest import load_method

import common

sf = load_method("self_forcing")
GRID = (1.0, 0.9, 0.5)


@pytest.fixture
def generator():
    torch.manual_seed(0)
    return sf.FrameNet(2, 16, 2).double()


def rollout(generator, noise, exit_step, grid=GRID):
    exits = torch.full((len(noise),), exit_step)
    return sf.self_rollout(lambda *frame: sf.few_step(generator, *frame, grid, exits), noise)


def noise(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_few_step_is_the_stochastic_sampler(generator):
    """Predict, noise afresh, predict: not an Euler step."""
    x, past, level = noise(5, 2), noise(5, 2, 2), torch.zeros(5, 2, dtype=torch.float64)
    torch.manual_seed(1)
    found = sf.few_step(generator, x, past, level, GRID[:2], torch.tensor([1, 1, 0, 1, 1]))
    torch.manual_seed(1)
    first = x - generator(x, torch.ones(5, dtype=torch.float64), past, level)
    y = 0.1 * first + 0.9 * torch.randn_like(x)
    expected = y - 0.9 * generator(y, torch.full((5,), 0.9, dtype=torch.float64), past, level)
    torch.testing.assert_close(found[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])
    torch.testing.assert_close(found[2], first[2])          # the clip that leaves at the first step


def test_a_perfect_generator_leaves_at_the_data_at_every_exit():
    """With v = (x_t - target) / t every exit gives the target, and levels come from the grid in order."""
    target, seen = noise(4, 2), []

    def velocity(x, t, past, level):
        seen.append(t[0].item())
        return (x - target) / t[:, None]
    found = sf.few_step(velocity, noise(4, 2), noise(4, 2, 2), None, GRID, torch.tensor([0, 1, 2, 1]))
    torch.testing.assert_close(found, target)
    assert seen == list(GRID)


def test_gradient_goes_through_the_last_call_of_each_frame_alone():
    """d clip / d w for velocity = w * (x + context): compared with the derivative of that one call, by hand."""
    w = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    inputs = []

    def velocity(x, t, past, level):
        inputs.append((x.detach(), t, past.detach()))
        return w * (x + past.sum(1))
    clip = rollout(velocity, noise(3, 4, 2), 1)
    clip.sum().backward()
    last = inputs[1::3]
    torch.testing.assert_close(w.grad, -sum((t[:, None] * (x + past.sum(1))).sum() for x, t, past in last).detach())


def test_context_changes_the_frames_but_carries_no_gradient(generator):
    start = noise(3, 4, 2).requires_grad_()
    (gradient,) = torch.autograd.grad(rollout(generator, start, 0)[:, 2].sum(), start)
    assert gradient[:, 2].abs().sum() > 0 and not gradient[:, [0, 1, 3]].any()
    plain = sf.self_rollout(lambda x, past, level: x + past.sum(1), start)      # the roll-out itself cuts the gradient
    assert torch.equal(torch.autograd.grad(plain.sum(), start)[0], torch.ones_like(start))
    x, level = noise(3, 2), torch.zeros(3, 2, dtype=torch.float64)
    past = noise(3, 2, 2).requires_grad_()
    made = sf.few_step(generator, x, past, level, GRID, torch.zeros(3))
    assert torch.autograd.grad(made.sum(), past, allow_unused=True) == (None,)
    assert not torch.allclose(made, sf.few_step(generator, x, past + 0.1, level, GRID, torch.zeros(3)))


def test_rollout_is_causal_and_uses_its_own_frames(generator):
    a = noise(3, 6, 2)
    b = a.clone()
    b[:, 3] += 1
    x, y = (rollout(generator, z, 0) for z in (a, b))
    assert torch.equal(x[:, :3], y[:, :3]) and (x[:, 3:] != y[:, 3:]).any(-1).all()
    for i in range(6):      # each frame is what the generator makes from the two frames before it
        past, level = torch.zeros(3, 2, 2, dtype=torch.float64), torch.ones(3, 2, dtype=torch.float64)
        for k in range(1, min(i, 2) + 1):
            past[:, -k], level[:, -k] = x[:, i - k], 0
        torch.testing.assert_close(x[:, i], sf.few_step(generator, a[:, i], past, level, GRID, torch.zeros(3)))


def test_context_holds_the_frames_before_at_their_levels():
    clips, level = torch.randn(3, 4, 2), torch.rand(3, 4)
    past, found = (v.unflatten(0, (3, 4)) for v in sf.context(clips, level))
    assert past.shape == (3, 4, 2, 2) and not past[:, 0].any() and (found[:, 0] == 1).all()
    assert not past[:, 1, 0].any() and torch.equal(past[:, 1, 1], clips[:, 0])
    assert torch.equal(past[:, 3], clips[:, 1:3]) and torch.equal(found[:, 3], level[:, 1:3])
    assert torch.equal(found[:, 1], torch.stack([torch.ones(3), level[:, 0]], 1))


def test_teacher_forcing_from_pure_noise_on_its_own_rollout_is_that_rollout(generator):
    torch.manual_seed(7)
    own = rollout(generator, noise(3, 5, 2), 0, GRID[:1])
    torch.manual_seed(7)
    forced = sf.forced_clip(generator, own.detach(), torch.ones(3, 5, dtype=torch.float64), noised_context=False)
    torch.testing.assert_close(forced, own)


def test_forced_clips_use_clean_or_noised_real_frames(generator):
    """By hand for the third frame; a frame at level 0 is passed on as it is; causal."""
    clips, level = noise(3, 4, 2), torch.tensor([[0.75, 0.0, 1.0, 0.5]]).double().expand(3, 4)
    for noised_context in (False, True):
        torch.manual_seed(8)
        found = sf.forced_clip(generator, clips, level, noised_context)
        torch.manual_seed(8)
        noised = (1 - level[..., None]) * clips + level[..., None] * torch.randn_like(clips)
        seen, at = (noised, level) if noised_context else (clips, 0 * level)
        velocity = generator(noised[:, 2], level[:, 2], seen[:, 0:2], at[:, 0:2])
        torch.testing.assert_close(found[:, 2], noised[:, 2] - velocity)
        torch.testing.assert_close(found[:, 1], clips[:, 1])
        changed = clips.clone()
        changed[:, 2] += 1
        torch.manual_seed(8)
        assert torch.equal(sf.forced_clip(generator, changed, level, noised_context)[:, :2], found[:, :2])


def test_loss_gradient_is_the_normalised_score_difference():
    torch.manual_seed(3)
    clip, t, eps = noise(4, 5, 2).requires_grad_(), torch.tensor([0.1, 0.5, 0.7, 0.9]).double(), noise(4, 5, 2)
    real, fake = sf.ClipNet(10, 8, 2).double(), sf.ClipNet(10, 8, 2).double()
    sf.dmd_loss(clip, real, fake, t, eps).backward()
    s = t[:, None, None]
    x_t = ((1 - s) * clip + s * eps).detach()
    x_real, x_fake = x_t - s * real(x_t, t), x_t - s * fake(x_t, t)
    expected = (x_fake - x_real) / (clip - x_real).abs().mean((1, 2), keepdim=True) / clip.numel()
    torch.testing.assert_close(clip.grad, expected.detach())
    assert all(p.grad is None for p in [*real.parameters(), *fake.parameters()])


def test_equal_scores_give_no_gradient_and_a_descent_step_goes_to_the_data():
    clip = noise(64, 3, 2).requires_grad_()
    t, eps = sf.score_times(64, 3.0).double(), noise(64, 3, 2)

    def flow(mean):     # exact velocity of the point mass at `mean`
        return lambda x, t: (x - mean) / t[:, None, None]
    (none,) = torch.autograd.grad(sf.dmd_loss(clip, flow(2.0), flow(2.0), t, eps), clip)
    assert not none.any()
    (gradient,) = torch.autograd.grad(sf.dmd_loss(clip, flow(2.0), flow(0.0), t, eps), clip)
    assert (gradient < 0).all()      # fake at 0, real at 2: descent moves the clip up


def test_one_frame_is_dmd2_with_backward_simulation(generator):
    """N = 1 and the last exit: the loss of the clip equals DMD's on an image made by backward simulation."""
    z, t, eps = noise(6, 1, 2), sf.score_times(6, 3.0).double(), noise(6, 1, 2)
    real, fake = sf.ClipNet(2, 8, 1).double(), sf.ClipNet(2, 8, 1).double()
    torch.manual_seed(4)
    loss = sf.dmd_loss(rollout(generator, z, 2), real, fake, t, eps)
    found = torch.autograd.grad(loss, generator.parameters())
    torch.manual_seed(4)
    nothing, ones = torch.zeros(6, 2, 2, dtype=torch.float64), torch.ones(6, 2, dtype=torch.float64)
    x = z[:, 0]
    with torch.no_grad():
        for a, b in ((1.0, 0.9), (0.9, 0.5)):
            x = (1 - b) * (x - a * generator(x, torch.full((6,), a).double(), nothing, ones)) + b * torch.randn_like(x)
    x = (x - 0.5 * generator(x, torch.full((6,), 0.5).double(), nothing, ones))[:, None]
    with torch.no_grad():
        s = t[:, None, None]
        x_t = (1 - s) * x + s * eps
        x_real, x_fake = x_t - s * real(x_t, t), x_t - s * fake(x_t, t)
        target = x - (x_fake - x_real) / (x - x_real).abs().mean((1, 2), keepdim=True)
    expected = torch.autograd.grad(0.5 * F.mse_loss(x, target), generator.parameters())
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)


def test_critic_learns_the_velocity_of_the_clips_without_moving_them():
    clip, t, eps = noise(4, 3, 2).requires_grad_(), torch.full((4,), 0.25).double(), noise(4, 3, 2)

    def perfect(x, t):
        torch.testing.assert_close(x, (0.75 * clip + 0.25 * eps).detach())
        return (eps - clip).detach().requires_grad_()
    loss = sf.flow_matching_loss(perfect, clip, t, eps)
    assert loss.item() == 0
    loss.backward()
    assert clip.grad is None
    assert sf.flow_matching_loss(lambda x, t: clip - eps, clip, t, eps) > 1


def test_critic_and_teacher_see_whole_clips_the_student_only_the_past(generator):
    net = sf.ClipNet(8, 16, 2)
    x = torch.randn(2, 4, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(net(x, torch.rand(2))[:, 0].sum(), x)
    assert gradient[:, 3].abs().sum() > 0       # the first frame's velocity depends on the last frame
    level = torch.tensor([[1.0, 0.0]]).double().expand(3, 2)
    with pytest.raises(AssertionError):         # an absent frame and a clean one at the origin are told apart
        torch.testing.assert_close(*(generator(torch.zeros(3, 2).double(), torch.ones(3).double(),
                                               torch.zeros(3, 2, 2).double(), v) for v in (level, level.flip(1))))


def test_score_times_are_shifted_and_clamped():
    torch.manual_seed(5)
    t = sf.score_times(100000, 3.0)
    assert t.min() >= 0.02 and t.max() <= 0.98
    assert abs(t.median() - 0.75) < 0.01        # 3/2 / (1 + 2/2)
    assert abs(sf.score_times(100000, 1.0).median() - 0.5) < 0.01


@pytest.mark.parametrize("flags", [["--horizon", "1"], ["--grid", "0.9,0.5"], ["--grid", "1,1"],
                                   ["--data", "glyphs"]])
def test_impossible_settings_end_in_one_line(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        common.main(sf.run, sf.Config, sf.CLAIMS, ["--smoke", "--out", str(tmp_path), *flags])
    assert stop.value.code == 2 and capsys.readouterr().err.strip().count("\n") == 0
