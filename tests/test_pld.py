"""PLD: the Plackett-Luce law, its special cases, convexity, the printed gradient, where gradients flow; DIST; Kendall."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import load_method

pld = load_method("pld")


def logits(n=9, classes=5, scale=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    s, t = scale * torch.randn(2, n, classes, generator=generator, dtype=torch.float64)
    return s.requires_grad_(), t.requires_grad_(), torch.arange(n) % classes


def test_the_probabilities_of_all_orders_sum_to_one():
    s = logits(1, 4)[0]
    orders = torch.tensor(list(itertools.permutations(range(4))))
    log_p = -pld.choice_losses(s.expand(24, 4), orders).sum(1)
    torch.testing.assert_close(log_p.exp().sum(), torch.ones((), dtype=torch.float64))


def test_choices_are_softmaxes_over_the_classes_that_are_left():
    s, order = torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([[2, 0, 1]])
    first = -math.log(math.exp(0.5) / (math.exp(1) + math.exp(-2) + math.exp(0.5)))
    second = -math.log(math.exp(1) / (math.exp(1) + math.exp(-2)))
    torch.testing.assert_close(pld.choice_losses(s, order), torch.tensor([[first, second, 0.0]]))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("label_first", [True, False])
def test_loss_is_the_formula_written_with_loops(temperature, label_first):
    s, t, labels = logits()
    total = 0.0
    for a, b, y in zip(s, t, labels.tolist()):
        order = b.argsort(descending=True).tolist()
        if label_first:
            order = [y] + [c for c in order if c != y]
        q = (b / temperature).softmax(0)        # over all classes, whatever the order
        total = total + sum(q[c] * (a[order[k:]].logsumexp(0) - a[c]) for k, c in enumerate(order))
    torch.testing.assert_close(pld.pld_loss(s, t, labels, temperature, label_first), total / len(s))


def test_order_puts_the_label_first_and_keeps_the_teachers_order_of_the_others():
    t = torch.tensor([[3.0, 1.0, 2.0, 0.0]] * 4)
    expected = [[0, 2, 1, 3], [1, 0, 2, 3], [2, 0, 1, 3], [3, 0, 2, 1]]
    assert pld.target_order(t, torch.arange(4)).tolist() == expected
    assert pld.target_order(t, torch.arange(4), label_first=False).tolist() == [[0, 2, 1, 3]] * 4


def test_a_certain_teacher_makes_it_cross_entropy():
    s, _, labels = logits()
    certain = 1e3 * F.one_hot(labels, 5).double()
    torch.testing.assert_close(pld.pld_loss(s, certain, labels), F.cross_entropy(s, labels))


def test_an_infinite_temperature_makes_it_listmle():
    s, t, labels = logits()
    listmle = pld.choice_losses(s, pld.target_order(t, labels)).sum(1).mean()
    torch.testing.assert_close(pld.pld_loss(s, t, labels, math.inf), listmle / 5)


def test_gradient_is_the_one_of_the_paper():
    s, t, labels = logits(3, 6)
    gradient, = torch.autograd.grad(pld.pld_loss(s, t, labels, 2.0), s)
    order = pld.target_order(t, labels)
    alpha = (t / 2).softmax(1).gather(1, order)
    expected = torch.zeros_like(s)
    for i in range(3):
        for k in range(6):
            rest = order[i, k:]
            expected[i, rest] += alpha[i, k] * s[i, rest].softmax(0)
            expected[i, order[i, k]] -= alpha[i, k]
    torch.testing.assert_close(gradient, (expected / 3).detach())


def test_no_gradient_reaches_the_teacher():
    for loss in (pld.pld_loss, pld.dist_loss, lambda *a: pld.kd_loss(*a, 2.0, 0.9)):
        s, t, labels = logits()
        loss(s, t, labels).backward()
        assert t.grad is None and s.grad.abs().sum() > 0


def test_loss_is_blind_to_a_constant_and_convex():
    s, t, labels = logits(n=200)
    shift = torch.arange(200.0)[:, None]
    torch.testing.assert_close(pld.pld_loss(s + shift, t, labels), pld.pld_loss(s, t, labels))
    other = logits(n=200, seed=1)[0]
    ends = (pld.pld_loss(s, t, labels) + pld.pld_loss(other, t, labels)) / 2
    assert pld.pld_loss((s + other) / 2, t, labels) < ends


def test_extreme_logits_stay_finite():
    s = torch.tensor([[800.0, -800.0, 0.0]], requires_grad=True)
    loss = pld.pld_loss(s, -s.detach(), torch.tensor([1]))
    loss.backward()
    assert loss.isfinite() and s.grad.isfinite().all()


def test_dist_is_zero_at_the_teacher_and_matches_pearson():
    s, t, labels = logits()
    assert pld.dist_loss(t, t, labels, 0.0, 1.0).abs() < 1e-12
    q, p = s.softmax(1), t.softmax(1)
    rows = torch.stack([torch.corrcoef(torch.stack([a, b]))[0, 1] for a, b in zip(q, p)])
    columns = torch.stack([torch.corrcoef(torch.stack([a, b]))[0, 1] for a, b in zip(q.T, p.T)])
    expected = 0.3 * F.cross_entropy(s, labels) + 0.5 * (1 - rows.mean()) + 0.5 * (1 - columns.mean())
    torch.testing.assert_close(pld.dist_loss(s, t, labels, 0.3, 0.5), expected)


def test_kd_matches_its_gradient():
    s, t, labels = logits()
    gradient, = torch.autograd.grad(pld.kd_loss(s, t, labels, 4.0, 1.0), s)
    torch.testing.assert_close(gradient, 4 * ((s / 4).softmax(1) - (t / 4).softmax(1)).detach() / len(s))
    torch.testing.assert_close(pld.kd_loss(s, t, labels, 4.0, 0.0), F.cross_entropy(s, labels))


def test_kendall_counts_pairs_of_wrong_classes_only():
    from scipy.stats import kendalltau
    s, t, labels = (z.detach() for z in logits(n=450, classes=7))
    kept = [[c for c in range(7) if c != y] for y in labels.tolist()]
    expected = sum(kendalltau(a[k].numpy(), b[k].numpy())[0] for a, b, k in zip(s, t, kept)) / 450
    assert abs(pld.kendall(s, t, labels) - expected) < 1e-6
    assert pld.kendall(t, t, labels) == 1 and pld.kendall(-t, t, labels) == -1


def test_views_from_the_pool_carry_their_own_label_and_answer():
    import common
    torch.manual_seed(0)
    cfg = common.parse(pld.Config, ["--smoke", "--views", "3", "--device", "cpu", "--batch", "50",
                                    "--shift", "0"])
    data = common.load_images(cfg)
    data.train, data.train_labels = data.train[:40], data.train_labels[:40]
    teacher = pld.make_classifier(cfg, data, "mlp", 8, 1).eval()
    x, teacher_logits, features, labels = pld.view_source(cfg, data, teacher)()
    torch.testing.assert_close(teacher_logits, teacher(x).detach())
    torch.testing.assert_close(features, teacher[:-1](x).detach())
    nearest = torch.cdist(x.flatten(1), data.normal(data.train).flatten(1)).argmin(1)
    assert torch.equal(data.train_labels[nearest], labels)
