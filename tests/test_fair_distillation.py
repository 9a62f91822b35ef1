"""Fair distillation: the groups' distance against integration, the KL, where gradients flow, own tables."""
import numpy as np
import pytest
import torch
from conftest import inline, load_method

fair = load_method("fair_distillation")


def gaussians(n, d, seed=0):
    torch.manual_seed(seed)
    return torch.randn(n, d, dtype=torch.float64), 0.3 * torch.randn(n, d, dtype=torch.float64)


def test_squared_distance_is_the_integral():
    """In one dimension against a sum over a grid, with groups of unequal size."""
    mean, logvar = gaussians(7, 1)
    s = torch.tensor([0, 0, 1, 1, 1, 1, 1])
    grid = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    density = torch.distributions.Normal(mean[:, 0, None], (0.5 * logvar).exp()[:, 0, None]).log_prob(grid).exp()
    expected = sum(((s == k).double().mean() ** 2)
                   * torch.trapezoid((density[s == k].mean(0) - density.mean(0)).square(), grid) for k in (0, 1))
    assert torch.allclose(fair.squared_distance(mean, logvar, s), expected, rtol=1e-8)


def test_squared_distance_in_more_dimensions():
    """Two rows in two groups: (1/4) 2 (1/4) (N_aa + N_bb - 2 N_ab), densities by torch.distributions."""
    mean, logvar = gaussians(2, 4)

    def overlap(i, j):
        std = (logvar[i].exp() + logvar[j].exp()).sqrt()
        return torch.distributions.Normal(mean[j], std).log_prob(mean[i]).sum().exp()
    expected = (overlap(0, 0) + overlap(1, 1) - 2 * overlap(0, 1)) / 8
    assert torch.allclose(fair.squared_distance(mean, logvar, torch.tensor([0, 1])), expected, rtol=1e-10)


def test_squared_distance_vanishes_without_difference():
    mean, logvar = gaussians(10, 3)
    for s in (torch.zeros(10, dtype=torch.long), torch.ones(10, dtype=torch.long)):        # one group absent
        assert fair.squared_distance(mean, logvar, s) == 0
    twice = torch.cat([mean, mean]), torch.cat([logvar, logvar])
    s = torch.arange(20) // 10
    assert fair.squared_distance(*twice, s).abs() < 1e-15
    assert fair.squared_distance(twice[0] + s[:, None], twice[1], s) > 1e-4
    # many dimensions and wide Gaussians: the product of densities must not lose the gradient to 1e-10 or overflow
    wide = fair.squared_distance(*(a.float().repeat(1, 20) for a in gaussians(6, 3)), torch.arange(6) % 2)
    assert wide.isfinite()


def test_descending_the_distance_moves_the_groups_together():
    mean, logvar = gaussians(200, 2)
    s = torch.arange(200) % 2
    mean = (mean + s[:, None]).requires_grad_()
    gradient = torch.autograd.grad(fair.squared_distance(mean, logvar, s), mean)[0]
    assert (gradient[s == 1].mean(0) > 0).all() and (gradient[s == 0].mean(0) < 0).all()


def test_gaussian_kl_and_utility_loss():
    (m_t, v_t), (m_s, v_s) = gaussians(5, 3, 1), gaussians(5, 3, 2)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(m_t, (v_t / 2).exp()), normal(m_s, (v_s / 2).exp()))
    assert torch.allclose(fair.gaussian_kl(m_t, v_t, m_s, v_s), expected.sum(1).mean())
    assert torch.allclose(fair.utility_loss(m_s, v_s, m_t, v_t), expected.sum(1).mean())       # teacher first
    zero = torch.zeros((), dtype=torch.float64)
    prior = torch.distributions.kl_divergence(normal(m_t, (v_t / 2).exp()), normal(zero, zero + 1))
    assert torch.allclose(fair.gaussian_kl(m_t, v_t, zero, zero), prior.sum(1).mean())
    assert fair.utility_loss(m_t, v_t, m_t, v_t).abs() < 1e-15


def test_distillation_gives_the_teacher_no_gradient():
    teacher, student = ([a.requires_grad_() for a in gaussians(6, 3, i)] for i in (1, 2))
    noise = torch.randn(6, 3, dtype=torch.float64)
    quality = fair.quality_loss(fair.draw(*student, noise), fair.draw(*teacher, noise))
    (quality + fair.utility_loss(*student, *teacher)).backward()
    assert all(a.grad is None for a in teacher) and all(a.grad.abs().sum() > 0 for a in student)


def test_quality_loss_teaches_means_and_variances():
    (mean, logvar), noise = gaussians(4, 3), torch.randn(4, 3, dtype=torch.float64)
    assert fair.quality_loss(fair.draw(mean, logvar, noise), fair.draw(mean, logvar, noise)) == 0
    shifted = fair.draw(mean + 0.5, logvar, noise)
    assert torch.allclose(fair.quality_loss(shifted, fair.draw(mean, logvar, noise)), torch.tensor(1.5).double())
    wider = fair.draw(mean, logvar + 1, noise)
    assert fair.quality_loss(wider, fair.draw(mean, logvar, noise)) > 0.1


def test_draw_has_the_standard_deviation_of_the_log_variance():
    mean, logvar = torch.tensor([[3.0, -1.0]]), torch.tensor([[0.0, 2 * float(np.log(5.0))]])
    assert torch.allclose(fair.draw(mean, logvar, torch.full((1, 2), 2.0)), torch.tensor([[5.0, 9.0]]))


def test_reconstruction_loss_by_hand():
    code = torch.tensor([[1.0, -1.0, 1, 0, 0, 1, 0], [0.0, 2.0, 0, 0, 1, 0, 1]])
    output = torch.zeros(2, 7)
    numbers = 0.5 * torch.tensor([2.0, 4.0]).mean()
    expected = numbers + torch.tensor(3.0).log() + torch.tensor(2.0).log()
    assert torch.allclose(fair.reconstruction_loss(output, code, 2, [3, 2]), expected)


def test_labels_come_from_the_latent_alone():
    torch.manual_seed(0)
    decoder = fair.Decoder(8, 3, 4, 16, 1)
    z = torch.randn(5, 4)
    (x0, y0), (x1, y1) = (decoder(z, torch.full((5,), s)) for s in (0, 1))
    assert torch.equal(y0, y1) and not torch.allclose(x0, x1)


def test_synthetic_groups_are_drawn_independently_of_the_rows():
    torch.manual_seed(0)
    s = (torch.rand(3000) < 0.3).long()
    table = fair.tabular.Table(s[:, None].float().repeat(1, 2), s, s)
    coder = fair.tabular.Coder(table.code, (0, 0))
    encoder, decoder = fair.Encoder(2, 2, 8, 1), fair.Decoder(2, 2, 2, 8, 1)
    made = fair.synthesise(encoder, decoder, table, coder)
    assert made.code.shape == (12_000, 2) and made.protected.float().mean() == s.float().mean()
    assert abs(torch.corrcoef(torch.stack([made.protected, s.repeat(4)]).float())[0, 1]) < 0.03


def own_table(n=200, **changes):
    rng = np.random.default_rng(0)
    x = np.stack([rng.normal(size=n), rng.integers(0, 2, n), rng.integers(0, 3, n)], 1)
    return dict(x=x, protected=rng.integers(0, 2, n), labels=rng.integers(0, 2, n)) | changes


@pytest.mark.parametrize("changes, said", [
    (dict(protected=np.zeros(200)), ["both labels"]),
    (dict(protected=np.arange(200)), ["'protected' must be 0 or 1", "199"]),
    (dict(labels=np.zeros(7, int)), ["'labels' has 7 values for the 200 rows"]),
    (dict(levels=np.array([0, 2])), ["'levels'", "3 columns"]),
    (dict(levels=np.array([2, 2, 3])), ["column 0", "0..1"]),
    (dict(x=np.full((200, 3), np.nan)), ["NaN"]),
    (dict(x=np.zeros(200)), ["1 dimensions"]),
])
def test_own_tables_that_are_not_fit(changes, said, tmp_path):
    np.savez(tmp_path / "mine.npz", **own_table(**changes))
    done = inline("fair_distillation", "--smoke", "--out", tmp_path, "--data", tmp_path / "mine.npz")
    lines = [line for line in done.stderr.strip().splitlines() if not line.startswith("note:")]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    for words in said:
        assert words in lines[0]


def test_unknown_tables(tmp_path):
    for name in ("moons", "no_such_table.npz"):
        done = inline("fair_distillation", "--smoke", "--out", tmp_path, "--data", name)
        assert done.returncode == 2 and "possible: tabular" in done.stderr


def test_own_table_runs_and_keeps_its_categories(tmp_path):
    np.savez(tmp_path / "mine.npz", **own_table(levels=np.array([0, 2, 3])))
    done = inline("fair_distillation", "--smoke", "--threads", "1", "--out", tmp_path, "--data", tmp_path / "mine.npz")
    assert done.returncode == 0, done.stderr[-1500:]
    assert "distilled" in done.stdout and "acc_deserved" not in done.stdout
