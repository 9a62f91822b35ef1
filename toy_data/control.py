"""Control tasks whose actions are tokens, made on the fly: a scripted noisy expert and batched closed-loop roll-outs.

    task = Point(chunk=5, bins=21)                                  # or Arm(...): two joints instead of a point
    states, instruction = task.reset(256)                           # (256, 8) float, (256,) int64
    actions = task.demonstrate(states, instruction)                 # (256, 5, 2) in [-1, 1], by the noisy expert
    tokens = task.tokens(actions)                                   # (256, 10) int64 in 0..20, actions() back
    states, instruction, actions = task.sample(4000)                # demonstrations from all stages of an episode
    done = task.rollout(policy, *task.reset(256), chunks=5)         # policy(states, instruction) -> actions (B, T, 2)
    done.success, done.collision, done.path                         # (256,) bool twice, (26, 256, 2)

The hand (the point, or the tip of the arm) has to reach that one of two goals which the instruction, 0 or 1, names,
and must not touch a round obstacle on its way. A state is (own coordinates 2, goals 2 x 2, obstacle 2); an action
moves the own coordinates by `reach` times its value. Random numbers come from torch's global stream; everything lies
on the device of the states.
"""
import math
from collections.abc import Callable
from typing import NamedTuple

import torch


class Rollout(NamedTuple):
    """What happened: success (B,) and collision (B,) bool, steps (B,) int64 until either (or the end), and the hand's
    path (T + 1, B, 2), which stands still once an episode is over."""
    success: torch.Tensor
    collision: torch.Tensor
    steps: torch.Tensor
    path: torch.Tensor


class Point:
    """A point in the square [-1, 1]^2, moved directly. chunk: actions of a demonstration; bins: tokens an action
    coordinate, whose values are spread evenly over [-1, 1]; reach: the longest move a step and coordinate; noise:
    standard deviation of the expert's actions; radius: of the obstacle; tolerance: distance from which a goal counts
    as reached; clearance: what the expert keeps from the obstacle's edge; detour: the angle by which the expert leaves
    the straight way in the first half of a chunk, to the left or to the right at random, so that a chunk has two
    modes; horizon: steps over which sample() draws."""
    width = 8                       # numbers of a state

    def __init__(self, chunk: int = 5, bins: int = 21, reach: float = 0.15, noise: float = 0.15, radius: float = 0.25,
                 tolerance: float = 0.1, clearance: float = 0.1, detour: float = 0.0,
                 horizon: int = 20):
        if bins < 2 or chunk < 1:
            raise ValueError(f"bins must be at least 2 and chunk at least 1, got {bins} and {chunk}")
        self.chunk, self.bins, self.reach, self.noise, self.radius = chunk, bins, reach, noise, radius
        self.tolerance, self.clearance, self.detour, self.horizon = tolerance, clearance, detour, horizon
        self.length = 2 * chunk         # tokens of a chunk
        self.key = f"{type(self).__name__} {sorted(vars(self).items())}"        # a part of the key of cached teachers

    def tokens(self, actions: torch.Tensor) -> torch.Tensor:
        """Actions (B, T, 2) to tokens (B, 2 T): the nearest bin, x before y; what lies outside [-1, 1] is cut off."""
        return ((actions.clamp(-1, 1) + 1) / 2 * (self.bins - 1)).round().long().flatten(1)

    def actions(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, 2 T) to the actions (B, T, 2) in the middle of their bins."""
        return (tokens.float() / (self.bins - 1) * 2 - 1).unflatten(1, (-1, 2))

    def hand(self, states: torch.Tensor) -> torch.Tensor:
        """Where the hand is: (B, 2)."""
        return states[:, :2]

    def place(self, n: int, device) -> torch.Tensor:
        """Random own coordinates (n, 2)."""
        return 2 * torch.rand(n, 2, device=device) - 1

    def target(self, n: int, device) -> torch.Tensor:
        """Random places (n, 2) that the hand can reach."""
        return 1.8 * torch.rand(n, 2, device=device) - 0.9

    def outside(self, x: torch.Tensor, obstacle: torch.Tensor) -> torch.Tensor:
        """Places (n, 2), those in or near the obstacle (n, 2) moved straight out of it."""
        offset = x - obstacle
        distance = offset.norm(dim=1, keepdim=True).clamp_min(1e-6)
        return obstacle + offset * ((self.radius + self.clearance + self.tolerance) / distance).clamp_min(1)

    def reset(self, n: int, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """n random scenes: states (n, 8), neither hand nor goals in the obstacle, and instructions (n,)."""
        obstacle = torch.rand(n, 2, device=device) - 0.5
        goals = [self.outside(self.target(n, device), obstacle) for _ in range(2)]
        states = torch.cat([self.outside(self.place(n, device), obstacle), *goals, obstacle], 1)
        return states, torch.randint(2, (n,), device=device)

    def goal(self, states: torch.Tensor, instruction: torch.Tensor) -> torch.Tensor:
        """The goal (B, 2) that the instruction names."""
        return torch.where(instruction[:, None] == 0, states[:, 2:4], states[:, 4:6])

    def step(self, states: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """The states after one action (B, 2)."""
        moved = states[:, :2] + self.reach * action.clamp(-1, 1)
        return torch.cat([moved.clamp(-1, 1), states[:, 2:]], 1)

    def reached(self, states: torch.Tensor, instruction: torch.Tensor) -> torch.Tensor:
        """(B,) bool: the hand is at the goal."""
        return (self.hand(states) - self.goal(states, instruction)).norm(dim=1) < self.tolerance

    def collides(self, states: torch.Tensor) -> torch.Tensor:
        """(B,) bool: the hand is in the obstacle."""
        return (self.hand(states) - states[:, 6:8]).norm(dim=1) < self.radius

    def heading(self, states: torch.Tensor, instruction: torch.Tensor,
                turn: torch.Tensor | float = 0.0) -> torch.Tensor:
        """The way (B, 2) that the expert's hand wants to go: to the goal, or along the tangent past the obstacle on
        the side where it already is, if the straight way would come too near. turn (B,): radians to the left of that,
        where this does not lead too near to the obstacle."""
        hand, goal, wide = self.hand(states), self.goal(states, instruction), self.radius + self.clearance
        way, offset = goal - hand, states[:, 6:8] - hand
        length, distance = way.norm(dim=1).clamp_min(1e-6), offset.norm(dim=1).clamp_min(1e-6)
        along = (offset * way).sum(1) / length
        side = (way[:, 0] * offset[:, 1] - way[:, 1] * offset[:, 0]) / length      # > 0: the obstacle is left
        blocked = (along > 0) & (along < length) & (side.abs() < wide)
        angle = torch.asin((wide / distance).clamp_max(1)) * torch.where(side > 0, -1.0, 1.0)
        tangent = self.turned(offset, angle) / distance[:, None]
        way = torch.where(blocked[:, None], tangent, way)
        aside = self.turned(way, way.new_zeros(len(way)) + turn)
        near = (hand + self.reach * self.shortened(aside / self.reach) - states[:, 6:8]).norm(dim=1) < wide
        return torch.where((blocked | near)[:, None], way, aside)

    def expert(self, states: torch.Tensor, instruction: torch.Tensor,
               turn: torch.Tensor | float = 0.0) -> torch.Tensor:
        """The scripted controller's action (B, 2) without noise."""
        return self.shortened(self.heading(states, instruction, turn) / self.reach)

    @staticmethod
    def turned(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        """Vectors (B, 2) turned to the left by an angle (B,)."""
        c, s = angle.cos(), angle.sin()
        return torch.stack([c * x[:, 0] - s * x[:, 1], s * x[:, 0] + c * x[:, 1]], 1)

    @staticmethod
    def shortened(action: torch.Tensor) -> torch.Tensor:
        """Actions (B, 2) of at most length 1, in the same direction."""
        return action / action.norm(dim=1, keepdim=True).clamp_min(1)

    def demonstrate(self, states: torch.Tensor, instruction: torch.Tensor, steps: int | None = None) -> torch.Tensor:
        """`steps` (default: chunk) actions (B, steps, 2) of the noisy expert, who sees where each of them led."""
        actions = []
        turn = self.detour * (2.0 * torch.randint(2, instruction.shape, device=states.device) - 1)
        for i in range(self.chunk if steps is None else steps):
            action = self.expert(states, instruction, turn if i < self.chunk // 2 else 0.0)
            actions.append((action + self.noise * torch.randn_like(action)).clamp(-1, 1))
            states = self.step(states, actions[-1])
        return torch.stack(actions, 1)

    def sample(self, n: int, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """n demonstrations, each begun after 0..horizon - 1 steps of the noisy expert: states (n, 8), instruction
        (n,), actions (n, chunk, 2)."""
        states, instruction = self.reset(n, device)
        start = torch.randint(self.horizon, (n, 1), device=device)
        for i in range(0, self.horizon, self.chunk):
            for j, action in enumerate(self.demonstrate(states, instruction).unbind(1)):
                states = torch.where(i + j < start, self.step(states, action), states)
        return states, instruction, self.demonstrate(states, instruction)

    @torch.no_grad()
    def rollout(self, policy: Callable, states: torch.Tensor, instruction: torch.Tensor, chunks: int = 5) -> Rollout:
        """Closed loop: `chunks` times policy(states, instruction) -> actions (B, T, 2), all of which are carried out.
        An episode ends with success at the goal and with a collision in the obstacle; its policy is still asked."""
        success = self.reached(states, instruction)
        collision = torch.zeros_like(success)
        steps, path = torch.zeros_like(instruction), [self.hand(states)]
        for _ in range(chunks):
            for action in policy(states, instruction).unbind(1):
                open_ = ~(success | collision)
                states = torch.where(open_[:, None], self.step(states, action), states)
                collision = collision | open_ & self.collides(states)
                success = success | open_ & ~collision & self.reached(states, instruction)
                steps = steps + open_
                path.append(self.hand(states))
        return Rollout(success, collision, steps, torch.stack(path))


class Arm(Point):
    """A planar arm of two links, its shoulder at the origin: own coordinates are the joint angles, an action turns
    them up to `reach` radians. The hand is the arm's tip; only the tip touches the obstacle. Options as of Point."""
    links = (0.6, 0.5)

    def hand(self, states):
        a, b = states[:, 0], states[:, 0] + states[:, 1]
        first, second = self.links
        return torch.stack([first * a.cos() + second * b.cos(), first * a.sin() + second * b.sin()], 1)

    def place(self, n, device):
        return torch.stack([2 * math.pi * torch.rand(n, device=device) - math.pi,
                            0.5 + 2 * torch.rand(n, device=device)], 1)

    def target(self, n, device):
        return self.hand(self.place(n, device))

    def reset(self, n, device="cpu"):
        joints, angle = self.place(n, device), 2 * math.pi * torch.rand(n, device=device)
        hand = self.hand(joints)
        obstacle = 0.75 * torch.stack([angle.cos(), angle.sin()], 1)
        wide = self.radius + self.clearance + self.tolerance
        turn = math.pi * ((hand - obstacle).norm(dim=1, keepdim=True) < wide)       # to the other side
        joints = torch.cat([joints[:, :1] + turn, joints[:, 1:]], 1)
        goals = [self.target(n, device) for _ in range(2)]
        goals = [torch.where((g - obstacle).norm(dim=1, keepdim=True) < wide, -g, g) for g in goals]
        return torch.cat([joints, *goals, obstacle], 1), torch.randint(2, (n,), device=device)

    def step(self, states, action):
        return torch.cat([states[:, :2] + self.reach * action.clamp(-1, 1), states[:, 2:]], 1)

    def expert(self, states, instruction, turn=0.0):
        """The heading of the hand turned into joint angles by damped least squares."""
        a, b = states[:, 0], states[:, 0] + states[:, 1]
        first, second = self.links
        elbow = torch.stack([-second * b.sin(), second * b.cos()], 1)
        shoulder = elbow + first * torch.stack([-a.sin(), a.cos()], 1)
        jacobian = torch.stack([shoulder, elbow], 2)                                    # d hand / d joints: (B, 2, 2)
        damped = jacobian @ jacobian.mT + 0.01 * torch.eye(2, device=states.device)
        way = self.shortened(self.heading(states, instruction, turn) / self.reach) * self.reach
        joints = (jacobian.mT @ torch.linalg.solve(damped, way[:, :, None]))[:, :, 0]
        return self.shortened(joints / self.reach)
