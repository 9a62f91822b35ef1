"""methods/consistency_models.py: closed forms for Gaussian data, boundary conditions, schedules, gradients."""
import math

import pytest
import torch
from conftest import load_method

import common
from toy_data.points import Points

cm = load_method("consistency_models")
EPS, T, SIGMA_DATA = 0.002, 80.0, 0.5


def gaussian(s):
    """Denoiser of N(0, s^2) data, and the exact consistency function of its ODE x(t) ~ sqrt(s^2 + t^2)."""
    def denoiser(x, t):
        return x * common.expand(s**2 / (s**2 + t**2), x)

    def exact(x, t):
        return x * common.expand(((s**2 + EPS**2) / (s**2 + t**2)).sqrt(), x)
    return denoiser, exact


def batch(n=64, dim=3):
    torch.manual_seed(0)
    t = cm.noise_level(torch.rand(n, dtype=torch.double) * 16, 18, EPS, T)
    return torch.randn(n, dim, dtype=torch.double) * common.expand(1 + t, torch.zeros(n, dim)), t


def test_levels_fall_from_T_to_eps():
    levels = cm.noise_level(torch.arange(18, dtype=torch.double), 18, EPS, T)
    assert levels[0].item() == pytest.approx(T) and levels[-1].item() == pytest.approx(EPS)
    assert (levels.diff() < 0).all()
    assert torch.allclose(levels.float(), common.karras_sigmas(18, EPS, T))


def test_boundary_condition_is_exact_for_any_network():
    torch.manual_seed(0)
    x, layer = torch.randn(5, 2), torch.nn.Linear(2, 2)
    f = cm.consistency_function(lambda x, t: layer(x) * 100, x, torch.full((5,), EPS), SIGMA_DATA, EPS)
    assert torch.equal(f, x)


def test_parameterisation_is_the_papers_for_the_same_network():
    def network(x, t):
        return torch.sin(3 * x) + t[:, None]

    def denoiser(x, t):     # EDM: D = c_skip x + c_out F(c_in x, c_noise)
        c_in = 1 / (t**2 + SIGMA_DATA**2).sqrt()
        c_skip, c_out = SIGMA_DATA**2 * c_in**2, SIGMA_DATA * t * c_in
        return c_skip[:, None] * x + c_out[:, None] * network(c_in[:, None] * x, t.log() / 4)
    x, t = batch()
    c_in = 1 / (t**2 + SIGMA_DATA**2).sqrt()
    c_skip, c_out = SIGMA_DATA**2 / ((t - EPS)**2 + SIGMA_DATA**2), SIGMA_DATA * (t - EPS) * c_in
    paper = c_skip[:, None] * x + c_out[:, None] * network(c_in[:, None] * x, t.log() / 4)
    assert torch.allclose(cm.consistency_function(denoiser, x, t, SIGMA_DATA, EPS), paper, atol=1e-12)


def test_student_starts_close_to_its_teacher_away_from_eps():
    x, t = batch()
    denoiser, _ = gaussian(SIGMA_DATA)
    large = t > 1
    f = cm.consistency_function(denoiser, x, t, SIGMA_DATA, EPS)
    assert torch.allclose(f[large], denoiser(x, t)[large], atol=0.02)


@pytest.mark.parametrize("solver, order", [("heun", 2), ("euler", 1)])
def test_order_of_one_pass_over_the_grid(solver, order):
    data = Points("eight_gaussians")
    torch.manual_seed(0)
    start = T * torch.randn(256, 2, dtype=torch.double)

    def final(n):
        x = start
        for i in range(n - 1):
            t, t_next = (cm.noise_level(torch.full((256,), j, dtype=torch.double), n, EPS, T) for j in (i, i + 1))
            x = cm.ode_step(data.denoise, x, t, t_next, solver)
        return x
    grid = cm.noise_level(torch.arange(1025, dtype=torch.double), 1025, EPS, T)
    exact = common.solve(lambda x, t: (x - data.denoise(x, t)) / t[:, None], start, grid, "heun")
    errors = [(final(n) - exact).abs().mean().item() for n in (65, 129)]
    assert 0.8 * 2**order < errors[0] / errors[1] < 1.35 * 2**order


def test_exact_consistency_function_of_the_teacher_has_no_distillation_loss():
    denoiser, exact = gaussian(0.7)
    x, _ = batch()
    index = torch.randint(199, (64,))
    t, t_next = (cm.noise_level(index.double() + k, 200, EPS, T) for k in (0, 1))
    x_next = cm.ode_step(denoiser, x, t, t_next)
    assert cm.consistency_loss(exact, exact, x, t, x_next, t_next) < 1e-6
    assert cm.consistency_loss(denoiser, denoiser, x, t, x_next, t_next) > 1e-4     # a mean is not a trajectory's end


def test_only_the_student_gets_gradient():
    student, target, teacher = (torch.nn.Linear(3, 3).double() for _ in range(3))
    x, t = batch()
    x_next = cm.ode_step(lambda x, t: teacher(x), x, t, t * 0.8)
    functions = [lambda x, t, m=m: cm.consistency_function(lambda x, t: m(x), x, t, SIGMA_DATA, EPS) for m in (student, target)]
    x = x.requires_grad_(True)
    cm.consistency_loss(*functions, x, t, x_next, t * 0.8).backward()
    assert student.weight.grad.abs().sum() > 0 and target.weight.grad is None and teacher.weight.grad is None
    cm.progressive_loss(functions[0], lambda x, t: teacher(x), x, t, t * 0.9, t * 0.8).backward()
    assert teacher.weight.grad is None


def test_consistency_training_is_euler_with_the_sample_as_denoiser():
    x, t = batch()
    z = torch.randn_like(x)
    x_t, t_next = x + t[:, None] * z, t * 0.7
    assert torch.allclose(cm.ode_step(lambda *_: x, x_t, t, t_next, "euler"), x + t_next[:, None] * z)


def test_ct_schedule():
    assert cm.ct_schedule(0, 1000, 2, 150, 0.9) == (2, pytest.approx(0.9**2))
    assert cm.ct_schedule(1000, 1000, 2, 150, 0.9) == (151, pytest.approx(math.exp(2 * math.log(0.9) / 150)))
    n = [cm.ct_schedule(k, 1000, 2, 150, 0.9)[0] for k in range(1001)]
    assert n == sorted(n)
    assert n[250] == math.ceil(math.sqrt(0.25 * (151**2 - 4) + 4) - 1) + 1


def test_multistep_sampler_keeps_the_law():
    _, exact = gaussian(0.7)
    torch.manual_seed(0)
    z = torch.randn(40000, 1)
    one = cm.multistep_sample(exact, z, [T], EPS)
    assert torch.allclose(one, exact(T * z, torch.full((40000,), T)))
    two = cm.multistep_sample(exact, z, [T, 0.6], EPS)
    assert two.std().item() == pytest.approx(0.7, rel=0.02)
    assert (one * two).mean() / (one.std() * two.std()) < 0.95       # new noise was drawn
    assert torch.equal(cm.multistep_sample(lambda x, t: x, z, [T, EPS], EPS), T * z)      # nothing to add at eps


def test_progressive_target_reaches_the_teachers_two_steps():
    denoiser, _ = gaussian(0.7)
    x, t = batch()
    t_mid, t_next = t * 0.8, t * 0.6
    end = cm.ode_step(denoiser, cm.ode_step(denoiser, x, t, t_mid, "euler"), t_mid, t_next, "euler")
    goal = x - t[:, None] * (end - x) / (t_next - t)[:, None]
    assert torch.allclose(cm.ode_step(lambda *_: goal, x, t, t_next, "euler"), end)
    assert cm.progressive_loss(lambda *_: goal, denoiser, x, t, t_mid, t_next) < 1e-20
    weight = torch.maximum(1 / t**2, torch.ones_like(t))
    loss = cm.progressive_loss(lambda *_: goal + 1, denoiser, x, t, t_mid, t_next)
    assert loss.item() == pytest.approx(weight.mean().item())


def test_progressive_stages():
    found = [cm.progressive_stage(k, 600, 4) for k in range(600)]
    counts = {n: sum(f[0] == n for f in found) for n in (8, 4, 2, 1)}
    assert counts == {8: 100, 4: 100, 2: 200, 1: 200}
    assert [n for n, position in found if position == 0] == [8, 4, 2, 1]
    assert max(position for _, position in found) < 1
