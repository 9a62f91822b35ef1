"""A ball that bounces in a box: clips made on the fly, with the physics known exactly.

The box is [-1, 1]^2. A ball flies straight on at a constant speed (its displacement per frame), is mirrored at the
walls, and turns by a small random angle after every frame: the process noise. Position uniform in the box and direction
uniform on the circle is the stationary law of this process, and sample() starts from it. So every window of a clip, early
or late, has the same law, and rollouts of any length can be compared with real clips. Nothing is scaled: a coordinate
has the standard deviation 1 / sqrt(3). All random numbers come from torch's global stream.
"""
import math

import torch

SPEEDS = (0.2, 0.35, 0.5)       # displacement a frame; the index is the class label
NOISE = 0.05                    # standard deviation of the turn after each frame, in radians


def fold(z: torch.Tensor) -> torch.Tensor:
    """Coordinates on the line mirrored into [-1, 1] as by walls at -1 and 1, any number of times."""
    return 1 - (torch.remainder(z + 1, 4) - 2).abs()


def step(position: torch.Tensor, velocity: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact physics of one frame, without noise: (..., 2) position and velocity after it."""
    z = position + velocity
    return fold(z), torch.where(torch.remainder(z + 1, 4) > 2, -velocity, velocity)


def turned(velocity: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """velocity (..., 2) rotated by angle (...) in radians."""
    c, s = angle.cos(), angle.sin()
    return torch.stack([c * velocity[..., 0] - s * velocity[..., 1], s * velocity[..., 0] + c * velocity[..., 1]], -1)


def simulate(position: torch.Tensor, velocity: torch.Tensor, frames: int, noise: float = NOISE):
    """Clips (n, frames, 2) that begin with position (n, 2), and the velocities (n, frames, 2) with which the balls leave
    each frame; the first is velocity (n, 2)."""
    positions, velocities = [position], [velocity]
    for _ in range(frames - 1):
        position, velocity = step(position, velocity)
        if noise:
            velocity = turned(velocity, noise * torch.randn(len(position), device=position.device))
        positions.append(position)
        velocities.append(velocity)
    return torch.stack(positions, 1), torch.stack(velocities, 1)


def sample(n: int, frames: int, speeds: tuple[float, ...] = SPEEDS, noise: float = NOISE,
           device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """n stationary clips (n, frames, 2) and their labels (n,) int64, the index of the speed; speeds equally likely.
    speeds=(0.35,) gives one class."""
    label = torch.randint(len(speeds), (n,), device=device)
    position = 2 * torch.rand(n, 2, device=device) - 1
    angle = 2 * math.pi * torch.rand(n, device=device)
    speed = torch.tensor(speeds, device=device)[label]
    velocity = speed[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    return simulate(position, velocity, frames, noise)[0], label


def residual(clips: torch.Tensor) -> torch.Tensor:
    """Distance of each frame from where the two frames before it lead, (n, frames - 2) for clips (n, frames, 2): 0 for
    exact physics, about noise * speed for real clips. Between the two frames the ball may have met a wall; the way
    that fits best counts: then the earlier position is replaced by its mirror image behind that wall."""
    a, b, c = clips[:, :-2], clips[:, 1:-1], clips[:, 2:]
    images = torch.stack([a, 2 - a, -2 - a])
    return (fold(2 * b - images) - c).abs().amin(0).norm(dim=-1)


def render(states: torch.Tensor, size: int = 12, radius: float = 0.22) -> torch.Tensor:
    """Pictures (..., 1, size, size) in [-1, 1] of positions (..., 2): a bright disc with a soft edge on black; x to the
    right, y upward. A disc at the wall is cut by it; outside the box nothing is seen."""
    centre = (2 * torch.arange(size, device=states.device) + 1) / size - 1
    x, y = states[..., 0, None, None] - centre, states[..., 1, None, None] + centre[:, None]
    edge = 2 / size
    return (2 * ((radius - (x * x + y * y).sqrt()) / edge + 0.5).clamp(0, 1) - 1).unsqueeze(-3)


def paths(clips: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points along the paths of clips (n, N, 2), 24 from frame to frame, and their labels, 0 up to frame `length` and 1
    beyond it: a scatter panel in which a path reads as a line that changes colour."""
    points = torch.lerp(clips[:, :-1, None], clips[:, 1:, None], torch.arange(24, device=clips.device)[:, None] / 24)
    beyond = (torch.arange(points.shape[1], device=clips.device) >= length - 1).long()
    return points.flatten(0, 2), beyond[:, None].expand(points.shape[:3]).flatten()
