"""KD: the gradient of the paper's section 2, its high-temperature limit, where gradients flow, the bias correction."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import load_method

kd = load_method("kd")


def logits(seed=0, n=7, classes=6, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    pair = scale * torch.randn(2, n, classes, generator=generator, dtype=torch.float64)
    return tuple(x.clone().requires_grad_() for x in pair)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 4.0, 20.0])
def test_gradient_of_the_soft_term_is_T_times_q_minus_p(temperature):
    z, v = logits()
    gradient, = torch.autograd.grad(kd.soft_loss(z, v, temperature), z)
    expected = temperature * ((z / temperature).softmax(1) - (v / temperature).softmax(1)) / len(z)
    torch.testing.assert_close(gradient, expected)


def test_soft_term_is_the_papers_cross_entropy_up_to_the_entropy_of_the_targets():
    z, v = logits()
    p = (v / 3).softmax(1)
    cross_entropy = -(p * (z / 3).log_softmax(1)).sum(1).mean()
    entropy = -(p * p.log()).sum(1).mean()
    torch.testing.assert_close(kd.soft_loss(z, v, 3.0), 9 * (cross_entropy - entropy))
    assert kd.soft_loss(v, v, 3.0).abs() < 1e-12


def test_logit_matching_is_the_limit_in_value_and_gradient_also_for_logits_of_any_mean():
    z, v = logits(scale=1.0)
    shifted = v + torch.arange(7)[:, None]
    limit = kd.logit_matching_loss(z, shifted)
    torch.testing.assert_close(kd.soft_loss(z, shifted, 1e4), limit, rtol=1e-3, atol=0)
    gradients = [torch.autograd.grad(loss, z)[0] for loss in (kd.soft_loss(z, shifted, 1e4), limit)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-4)
    centred = [x - x.mean(1, keepdim=True) for x in (z, v)]
    torch.testing.assert_close(gradients[1], (centred[0] - centred[1]) / 6 / 7)
    far = [(kd.soft_loss(z, v, t) - kd.logit_matching_loss(z, v)).abs().item() for t in (1e2, 1e3)]
    assert far[1] < 0.2 * far[0]        # the difference falls like 1/T


def test_kd_loss_weighs_the_two_terms_and_its_hard_term_has_temperature_1():
    z, v = logits()
    labels = torch.arange(7) % 6
    hard, soft = F.cross_entropy(z, labels), kd.soft_loss(z, v, 4.0)
    torch.testing.assert_close(kd.kd_loss(z, v, labels, 4.0, 0.0), hard)
    torch.testing.assert_close(kd.kd_loss(z, v, labels, 4.0, 1.0), soft)
    torch.testing.assert_close(kd.kd_loss(z, v, labels, 4.0, 0.9), 0.9 * soft + 0.1 * hard)
    torch.testing.assert_close(kd.kd_loss(z, v, labels, math.inf, 1.0), kd.logit_matching_loss(z, v))


def test_certain_targets_at_temperature_1_are_hard_labels():
    z, _ = logits()
    labels = torch.arange(7) % 6
    certain = 1e3 * F.one_hot(labels, 6).double()
    torch.testing.assert_close(kd.soft_loss(z, certain, 1.0), F.cross_entropy(z, labels))


@pytest.mark.parametrize("temperature", [4.0, math.inf])
def test_no_gradient_reaches_the_teacher(temperature):
    z, v = logits()
    kd.kd_loss(z, v, torch.zeros(7, dtype=torch.long), temperature, 0.9).backward()
    assert v.grad is None and z.grad.abs().sum() > 0


def test_extreme_logits_stay_finite():
    z, v = (torch.tensor([[500.0, -500.0, 0.0]], requires_grad=True) * sign for sign in (1, -1))
    assert kd.soft_loss(z, v, 1.0).isfinite() and kd.soft_loss(z, v, 1.0) > 100


@pytest.mark.parametrize("share", [0.0, 0.1, 0.35, 1.0])
def test_bias_gives_the_class_its_share_and_changes_no_other_logit(share):
    x = logits(n=200)[0].detach() - 5 * F.one_hot(torch.tensor(2), 6)
    biased = kd.raise_bias(x, 2, kd.bias_for_share(x, 2, share))
    assert (biased.argmax(1) == 2).sum() == round(200 * share)
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(biased[:, others], x[:, others])


def test_bias_repairs_a_classifier_whose_one_bias_is_off():
    labels = torch.arange(300) % 6
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(0)) + 9 * F.one_hot(labels, 6)
    broken = kd.raise_bias(x, 3, -20.0)
    assert not (broken.argmax(1) == 3).any()
    bias = kd.bias_for_share(broken, 3, 1 / 6)
    assert (kd.raise_bias(broken, 3, bias).argmax(1) == labels).all()
