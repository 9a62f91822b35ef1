"""The bouncing ball: exact physics, stationary clips, pictures."""
import pytest
import torch

from toy_data import moving


def test_step_agrees_with_a_slow_simulation():
    """Many tiny steps, each turned round at a wall."""
    torch.manual_seed(0)
    position = (2 * torch.rand(200, 2, dtype=torch.float64) - 1) * 0.999
    velocity = 0.9 * torch.randn(200, 2, dtype=torch.float64)
    found, after = moving.step(position, velocity)
    p, v, parts = position.clone(), velocity.clone(), 4000
    for _ in range(parts):
        p = p + v / parts
        v = torch.where(p.abs() > 1, -v.abs() * p.sign(), v)
        p = torch.where(p.abs() > 1, 2 * p.sign() - p, p)
    torch.testing.assert_close(found, p, atol=1e-9, rtol=0)
    assert torch.equal(after.sign(), v.sign()) and torch.equal(after.abs(), velocity.abs())
    assert (found.abs() <= 1).all() and (after != velocity).any()


def test_physics_can_be_run_backwards():
    torch.manual_seed(1)
    position, velocity = 2 * torch.rand(50, 2, dtype=torch.float64) - 1, torch.randn(50, 2, dtype=torch.float64)
    there, speed = moving.step(position, velocity)
    back, again = moving.step(there, -speed)
    torch.testing.assert_close(back, position)
    torch.testing.assert_close(again, -velocity)


def test_clips_have_the_promised_speed_and_labels():
    torch.manual_seed(2)
    clips, labels = moving.sample(3000, 5)
    assert clips.shape == (3000, 5, 2) and labels.dtype == torch.int64 and clips.abs().max() <= 1
    inside = (clips[:, :-1].abs() < 0.49).all(-1)       # too far from the walls to reach one: displacement = speed
    for label, speed in enumerate(moving.SPEEDS):
        flights = clips.diff(dim=1).norm(dim=-1)[inside & (labels == label)[:, None]]
        assert len(flights) and torch.allclose(flights, torch.tensor(speed), atol=1e-5)
        assert abs((labels == label).float().mean() - 1 / 3) < 0.04
    assert moving.sample(10, 3, speeds=(0.35,))[1].max() == 0


def test_every_frame_is_stationary():
    """Uniform over the box at the first frame and at the last, with directions that stay uniform."""
    torch.manual_seed(3)
    clips, _ = moving.sample(20000, 24, speeds=(0.35,), noise=0.1)
    for frame in (0, 7, 23):
        x = clips[:, frame]
        assert x.mean(0).abs().max() < 0.02 and (x.square().mean(0) - 1 / 3).abs().max() < 0.01
        counts = torch.histogramdd(x, bins=4, range=[-1, 1, -1, 1])[0]
        assert (counts / 20000 * 16 - 1).abs().max() < 0.15
    early, late = (clips[:, i:i + 2].diff(dim=1).square().sum(-1).mean() for i in (0, 22))
    assert abs(early / late - 1) < 0.03


def test_turns_have_the_promised_size_and_keep_the_speed():
    torch.manual_seed(4)
    velocity = torch.tensor([0.1, 0.0]).expand(20000, 2)
    velocities = moving.simulate(torch.zeros(20000, 2), velocity, 4, noise=0.05)[1]
    angle = torch.atan2(velocities[..., 1], velocities[..., 0])
    assert torch.allclose(velocities.norm(dim=-1), torch.tensor(0.1))
    for k in range(4):
        assert abs(angle[:, k].std() - 0.05 * k ** 0.5) < 0.002


def test_residual_is_zero_for_exact_physics_alone():
    torch.manual_seed(5)
    exact, noisy = (moving.sample(500, 8, noise=noise)[0] for noise in (0.0, 0.05))
    assert moving.residual(exact).shape == (500, 6) and moving.residual(exact).max() < 1e-5
    expected = (0.05 * torch.tensor(moving.SPEEDS).mean() * (2 / torch.pi) ** 0.5).item()     # mean |turn| x speed
    assert moving.residual(noisy).mean().item() == pytest.approx(expected, rel=0.1)
    assert moving.residual(exact + 0.1 * torch.randn_like(exact)).mean() > 0.1
    assert moving.residual(exact[torch.randperm(500)][:, torch.randperm(8)]).mean() > 0.1


def test_pictures_show_the_ball_where_it_is():
    states = torch.tensor([[0.0, 0.0], [0.5, -0.5], [-0.7, 0.6]])
    images = moving.render(states)
    assert images.shape == (3, 1, 12, 12) and images.min() == -1 and images.max() == 1
    weight = (images[:, 0] + 1) / 2
    centre = (2 * torch.arange(12) + 1) / 12 - 1
    x = (weight.sum(1) * centre).sum(1) / weight.sum((1, 2))
    y = -(weight.sum(2) * centre).sum(1) / weight.sum((1, 2))         # the first row is the upper one
    torch.testing.assert_close(torch.stack([x, y], 1), states, atol=0.03, rtol=0)
    area = weight.sum((1, 2)) * (2 / 12) ** 2
    assert (area / (torch.pi * 0.22 ** 2) - 1).abs().max() < 0.15
    assert moving.render(torch.tensor([[3.0, 0.0]])).max() == -1
    assert moving.render(torch.zeros(2, 5, 2), size=16).shape == (2, 5, 1, 16, 16)


def test_same_stream_same_clips():
    first, second = (torch.manual_seed(6) and moving.sample(4, 6)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_paths_of_a_clip_change_colour_at_the_training_length():
    points, beyond = moving.paths(torch.arange(10.0).view(1, 5, 2), 3)
    assert points.shape == (4 * 24, 2) and beyond.tolist() == [0] * 48 + [1] * 48
    assert torch.equal(points[24], torch.tensor([2.0, 3.0]))
