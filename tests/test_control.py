"""The control tasks: tokens, the expert, obstacle and goals, roll-outs."""
import math

import pytest
import torch

from toy_data.control import Arm, Point

TASKS = [Point(), Arm(), Point(chunk=4, bins=11, reach=0.25, radius=0.15, tolerance=0.08, detour=0.8)]


@pytest.fixture(params=TASKS, ids=lambda task: f"{type(task).__name__}-{task.chunk}")
def task(request):
    torch.manual_seed(0)
    return request.param


def test_tokens_are_the_nearest_bins(task):
    tokens = torch.randint(task.bins, (50, task.length))
    assert torch.equal(task.tokens(task.actions(tokens)), tokens)
    actions = 2 * torch.rand(50, task.chunk, 2) - 1
    assert (task.actions(task.tokens(actions)) - actions).abs().max() <= 1 / (task.bins - 1) + 1e-6
    ends = torch.tensor([[[-1.0, 1.0], [-9.0, 0.0]]])
    assert task.tokens(ends).tolist() == [[0, task.bins - 1, 0, (task.bins - 1) // 2]]


def test_scenes_are_free(task):
    states, instruction = task.reset(2000)
    assert states.shape == (2000, task.width) and set(instruction.tolist()) == {0, 1}
    assert not task.collides(states).any()
    for goal in (0, 1):
        place = task.goal(states, torch.full((2000,), goal))
        assert torch.equal(place, states[:, 2 + 2 * goal:4 + 2 * goal])
        assert ((place - states[:, 6:8]).norm(dim=1) > task.radius + task.tolerance).all()


def test_a_step_moves_the_own_coordinates_alone(task):
    states, _ = task.reset(20)
    action = 2 * torch.rand(20, 2) - 1
    after = task.step(states, action)
    assert torch.equal(after[:, 2:], states[:, 2:])
    inside = (states[:, :2] + task.reach * action).abs().amax(1) <= 1
    assert torch.allclose(after[inside, :2], (states[:, :2] + task.reach * action)[inside])
    assert torch.equal(task.step(states, 5 * torch.ones(20, 2)), task.step(states, torch.ones(20, 2)))


def test_expert_reaches_the_goal_that_is_named_and_avoids_the_obstacle(task):
    states, instruction = task.reset(500)
    done = task.rollout(task.demonstrate, states, instruction, chunks=40 // task.chunk)
    assert done.success.float().mean() > (0.85 if isinstance(task, Arm) else 0.98)
    assert done.collision.float().mean() < 0.02
    wrong = task.rollout(lambda s, i: task.demonstrate(s, 1 - i), states, instruction, chunks=40 // task.chunk)
    assert wrong.success.float().mean() < 0.4
    end = (done.path[-1] - task.goal(states, instruction)).norm(dim=1)
    assert (end[done.success] < task.tolerance).all()


def test_going_straight_would_collide():
    torch.manual_seed(0)
    task = Point()
    states, instruction = task.reset(500)

    def straight(states, instruction):
        return task.shortened((task.goal(states, instruction) - states[:, :2]) / task.reach)[:, None]
    done = task.rollout(straight, states, instruction, chunks=30)
    assert 0.1 < done.collision.float().mean() < 0.6
    assert (done.success ^ done.collision).all()


def test_collision_and_success_end_an_episode():
    task = Point(radius=0.25, reach=0.25, tolerance=0.1)
    #                      hand       goals                  obstacle
    states = torch.tensor([[-0.5, 0., 0.8, 0., -0.8, 0.8, 0., 0.], [-0.5, 0., -0.1, 0.6, 0., 0., 0.6, -0.6]])
    instruction = torch.tensor([0, 1])
    right = torch.tensor([[[1.0, 0.0]] * 5] * 2)
    done = task.rollout(lambda s, i: right, states, instruction, chunks=2)
    assert done.collision.tolist() == [True, False] and done.success.tolist() == [False, True]
    assert done.steps.tolist() == [2, 2] and done.path.shape == (11, 2, 2)
    assert torch.equal(done.path[2], done.path[-1]) and torch.allclose(done.path[-1, :, 0], torch.zeros(2))


def test_detour_has_two_modes_and_the_noise_its_size():
    torch.manual_seed(0)
    task = Point(chunk=4, noise=0.0, detour=0.8, reach=0.1)
    states = torch.tensor([[-0.9, 0.9, 0.9, 0.9, 0.0, 0.9, 0.0, -0.4]]).repeat(400, 1)
    actions = task.demonstrate(states, torch.zeros(400, dtype=torch.long))
    first = torch.atan2(actions[:, 0, 1], actions[:, 0, 0])
    assert torch.allclose(first.abs(), torch.tensor(0.8), atol=1e-5) and 120 < (first > 0).sum() < 280
    assert torch.allclose(actions[:, 0], actions[:, 1], atol=0.1)
    back = torch.atan2(actions[:, 2, 1], actions[:, 2, 0])
    assert (back * first < 0).all() and (back.abs() < 0.2).all(), "then straight to the goal from where it is"

    noisy = Point(chunk=1, noise=0.2, reach=0.1).demonstrate(states.repeat(10, 1), torch.zeros(4000, dtype=torch.long))
    assert noisy[:, 0, 1].std().item() == pytest.approx(0.2, rel=0.1)


def test_samples_cover_the_episode_and_follow_the_expert(task):
    states, instruction, actions = task.sample(1000)
    assert actions.shape == (1000, task.chunk, 2) and actions.abs().max() <= 1
    distance = (task.hand(states) - task.goal(states, instruction)).norm(dim=1)
    assert (distance < task.tolerance).float().mean() > 0.1 and (distance > 0.6).float().mean() > 0.1
    torch.manual_seed(3)
    a = task.sample(50)
    torch.manual_seed(3)
    assert all(torch.equal(x, y) for x, y in zip(a, task.sample(50)))


def test_arm_moves_its_tip_towards_the_goal():
    torch.manual_seed(0)
    task = Arm(noise=0.0)
    states, _ = task.reset(300)
    assert torch.allclose(task.hand(torch.tensor([[0.0, 0.0, *[0.0] * 6], [math.pi / 2, math.pi / 2, *[0.0] * 6]])),
                          torch.tensor([[1.1, 0.0], [-0.5, 0.6]]), atol=1e-6)
    near = states.clone()
    near[:, 2:4] = task.hand(task.step(states, 0.3 * torch.randn(300, 2)))
    zeros = torch.zeros(300, dtype=torch.long)
    before = (task.hand(near) - near[:, 2:4]).norm(dim=1)
    after = (task.hand(task.step(near, task.expert(near, zeros))) - near[:, 2:4]).norm(dim=1)
    assert (after <= before + 1e-4).float().mean() > 0.9 and after.mean() < 0.5 * before.mean()


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="bins must be at least 2"):
        Point(bins=1)
