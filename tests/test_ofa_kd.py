"""OFA-KD: its weights and total, the paper's form, limits, where gradients flow, hints, CKA, exits and stages."""
import pytest
import torch
import torch.nn.functional as F
from conftest import load_method

import common

ofa = load_method("ofa_kd")


def logits(n=8, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    s, t = 2 * torch.randn(2, n, classes, generator=generator, dtype=torch.float64)
    return s.requires_grad_(), t.requires_grad_(), torch.arange(n) % classes


@pytest.mark.parametrize("eps", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("paper", [False, True])
def test_weights_of_the_label_and_of_the_others(eps, paper):
    _, t, labels = logits()
    p = t.softmax(1)
    weights = ofa.target_weights(t, labels, eps, paper)
    for i, y in enumerate(labels.tolist()):
        for c in range(5):
            other = p[i, c] if paper else p[i, c] ** eps
            expected = (1 + p[i, c]) ** eps - 1 if c == y else other
            assert abs(weights[i, c] - expected) < 1e-12


def test_eps_1_is_soft_cross_entropy_whatever_the_labels():
    s, t, labels = logits()
    soft = F.cross_entropy(s, t.detach().softmax(1))
    torch.testing.assert_close(ofa.ofa_loss(s, t, labels), soft)
    torch.testing.assert_close(ofa.ofa_loss(s, t, (labels + 1) % 5), soft)


def test_loss_is_the_sum_with_those_weights():
    s, t, labels = logits()
    weights = ofa.target_weights(t, labels, 1.5)
    expected = sum(-weights[i, c] * (s[i, c] - s[i].logsumexp(0)) for i in range(8) for c in range(5)) / 8
    torch.testing.assert_close(ofa.ofa_loss(s, t, labels, 1.5), expected)


def test_a_larger_exponent_weighs_the_label_more_the_surer_the_teacher():
    labels = torch.zeros(2, dtype=torch.long)
    t = torch.tensor([[4.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    gain = ofa.target_weights(t, labels, 2.0)[:, 0] - ofa.target_weights(t, labels, 1.0)[:, 0]
    assert gain[0] > gain[1] > 0
    p = t.softmax(1)[:, 0]
    torch.testing.assert_close(gain, p + p ** 2)        # (1 + p)^2 - 1 - p


def test_total_adds_the_label_the_output_and_every_exit():
    s, t, labels = logits()
    exits = [logits(seed=k)[0] for k in (1, 2, 3)]
    expected = F.cross_entropy(s, labels) + ofa.ofa_loss(s, t, labels, 1.2)
    expected = expected + sum(ofa.ofa_loss(z, t, labels, 1.2) for z in exits)
    torch.testing.assert_close(ofa.ofa_total(s, exits, t, labels, 1.2), expected)


def test_gradient_reaches_output_and_exits_but_not_the_teacher():
    s, t, labels = logits()
    exits = [logits(seed=k)[0] for k in (1, 2)]
    ofa.ofa_total(s, exits, t, labels, 1.5).backward()
    assert t.grad is None and all(z.grad.abs().sum() > 0 for z in (s, *exits))
    s, t, labels = logits()
    ofa.kd_loss(s, t, labels, 4.0, 0.9).backward()
    assert t.grad is None and s.grad.abs().sum() > 0


def test_extreme_logits_stay_finite():
    s = torch.tensor([[900.0, -900.0, 0.0]], requires_grad=True)
    loss = ofa.ofa_loss(s, -s.detach(), torch.tensor([0]), 1.5)
    loss.backward()
    assert loss.isfinite() and s.grad.isfinite().all()


def test_kd_matches_its_gradient():
    s, t, labels = logits()
    gradient, = torch.autograd.grad(ofa.kd_loss(s, t, labels, 4.0, 1.0), s)
    torch.testing.assert_close(gradient, 4 * ((s / 4).softmax(1) - (t / 4).softmax(1)).detach() / len(s))
    torch.testing.assert_close(ofa.kd_loss(s, t, labels, 4.0, 0.0), F.cross_entropy(s, labels))


def test_hint_compares_maps_on_the_smaller_grid():
    a, b = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 2, 2, requires_grad=True)
    pooled = a.view(2, 3, 2, 2, 2, 2).mean((3, 5))
    torch.testing.assert_close(ofa.hint_loss(a, b), (pooled - b).square().mean())
    torch.testing.assert_close(ofa.hint_loss(b, a), (pooled - b).square().mean())
    ofa.hint_loss(a, b).backward()
    assert b.grad is None and a.grad is not None


def test_cka_is_one_for_rotations_and_scales_and_small_for_unrelated_features():
    torch.manual_seed(0)
    x = torch.randn(300, 6)
    rotation = torch.linalg.qr(torch.randn(6, 6))[0]
    assert abs(ofa.cka(x, 3 * x @ rotation + 5) - 1) < 1e-6
    assert ofa.cka(x, torch.randn(300, 6)) < 0.1
    y = x[:, :2]
    a, b = x - x.mean(0), y - y.mean(0)
    expected = (a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    assert abs(ofa.cka(x, y) - expected.item()) < 1e-5


def small(*arguments):
    return common.parse(ofa.Config, ["--smoke", "--device", "cpu", *arguments])


@pytest.mark.parametrize("kind", ["mlp", "resnet", "vit"])
def test_stages_are_those_of_the_forward_pass(kind):
    torch.manual_seed(0)
    cfg = small()
    data = common.load_images(cfg)
    net = ofa.make_network(cfg, data, kind, 8, 2).eval()
    x = data.normal(data.test[:6])
    maps = net.stages(x)
    assert len(maps) == cfg.stages and [m.shape[1] for m in maps] == net.widths
    torch.testing.assert_close(net.classify(maps), net(x))
    assert [m.shape[2] for m in maps] == dict(mlp=[1, 1, 1], resnet=[12, 6, 3], vit=[3, 3, 3])[kind]
    whole = dict(mlp=3 * 2 * 2, resnet=3 + 6, vit=0)[kind]     # no layer is left out
    if kind == "resnet":
        assert len(net.stem) + sum(map(len, net.parts)) == whole
    if kind == "mlp":
        assert sum(isinstance(m, torch.nn.Conv2d | torch.nn.ReLU) for m in net.modules()) == whole


def test_tokens_attend_to_each_other_but_not_to_other_images():
    torch.manual_seed(0)
    blocks, x = ofa.Blocks(8, 2).eval(), torch.randn(2, 8, 3, 3, requires_grad=True)
    blocks(x)[0, :, 0, 0].sum().backward()
    assert (x.grad[0].abs().sum(0) > 0).all() and x.grad[1].abs().sum() == 0


@pytest.mark.parametrize("kind", ["mlp", "resnet", "vit"])
def test_exits_turn_maps_into_logits_and_send_gradient_to_no_later_stage(kind):
    torch.manual_seed(0)
    cfg = small()
    data = common.load_images(cfg)
    net = ofa.make_network(cfg, data, kind, 8, 1)
    exits = ofa.make_exits(net, 40, 36)
    if kind != "vit":
        assert [sum(isinstance(m, torch.nn.Conv2d) for m in e.modules()) for e in exits] == [8, 4, 1]
        assert [e[-1].in_features for e in exits] == [40, 40, 40]       # max(32, 40)
    else:
        assert [len(e[0].blocks) for e in exits] == [2, 1, 1] and exits[0][-1].in_features == 8
    maps = net.stages(data.normal(data.train[:4]))
    assert [e(m).shape for e, m in zip(exits, maps)] == [(4, 36)] * 3
    exits[0](maps[0]).square().sum().backward()
    assert next(net.parts[0].parameters()).grad.abs().sum() > 0
    assert all(p.grad is None for part in net.parts[1:] for p in part.parameters())


def test_a_patch_that_does_not_divide_the_image_is_refused():
    cfg = small("--patch", "5")
    with pytest.raises(common.UserError, match="patch"):
        ofa.make_network(cfg, common.load_images(cfg), "vit", 8, 1)
