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
    assert [m.shape[2] for m in maps] == dict(mlp=[1, 1, 1, 1], resnet=[12, 6, 3, 2], vit=[3, 3, 3, 3])[kind]
    if kind == "resnet":
        assert len(net.stem) + sum(map(len, net.parts)) == 3 + 4 * 2      # no layer is left out
    if kind == "mlp":
        hidden = [m for part in net.parts for m in part if isinstance(m, torch.nn.Linear)]
        assert [m.in_features for m in hidden] == [144] + [8] * 7 and net.head[-1].in_features == 8


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
        kinds = (torch.nn.Conv2d, torch.nn.Linear)      # an MLP's have one linear layer for two convolutions
        layers = dict(resnet=[13, 9, 5, 2], mlp=[7, 5, 3, 2])[kind]
        assert [sum(isinstance(m, kinds) for m in e.modules()) for e in exits] == layers
        assert [e[-1].in_features for e in exits] == [dict(resnet=64, mlp=40)[kind]] * 4       # max(student's, 40)
    else:
        assert [len(e[0].blocks) for e in exits] == [3, 2, 1, 1] and exits[0][-1].in_features == 8
    maps = net.stages(data.normal(data.train[:4]))
    assert [e(m).shape for e, m in zip(exits, maps)] == [(4, 36)] * 4
    exits[0](maps[0]).square().sum().backward()
    assert next(net.parts[0].parameters()).grad.abs().sum() > 0
    assert all(p.grad is None for part in net.parts[1:] for p in part.parameters())


def test_a_dense_block_is_a_separable_one_on_maps_of_one_pixel():
    torch.manual_seed(0)
    dense, whole, x = ofa.dense(6, 10), ofa.separable(6, 10), torch.randn(20, 6, 1, 1)
    linear = [m for m in dense if isinstance(m, torch.nn.Linear)]
    depthwise, pointwise = ([m for m in whole if isinstance(m, torch.nn.Conv2d)][k::2] for k in (0, 1))
    with torch.no_grad():
        for a, b, c in zip(linear, depthwise, pointwise, strict=True):
            a.weight.copy_(c.weight[:, :, 0, 0] * b.weight[:, 0, 1, 1])
    torch.testing.assert_close(dense(x), whole(x))


def test_only_the_first_blocks_of_a_vit_know_where_a_token_is():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 3, 3)
    moved = x.roll(1, 3)
    later, first = ofa.Blocks(8, 1).eval(), ofa.Blocks(8, 1, [3, 3]).eval()
    torch.testing.assert_close(later(moved), later(x).roll(1, 3))
    assert (first(moved) - first(x).roll(1, 3)).abs().max() > 1e-3
    cfg = small()
    net = ofa.make_network(cfg, common.load_images(cfg), "vit", 8, 2)
    assert [name for name, _ in net.named_parameters() if "position" in name] == ["parts.0.position"]


@pytest.mark.parametrize("views", ["2", "0"])
def test_a_batch_carries_its_labels_and_the_teachers_answer_to_the_same_view(views):
    torch.manual_seed(0)
    cfg = small("--views", views, "--batch", "30", "--shift", "1")
    data = common.load_images(cfg)
    images, labels = data.train[:20], data.train_labels[:20]
    if cfg.views:
        images, labels = common.shift_and_flip(images.repeat(2, 1, 1, 1), 1), labels.repeat(2)
    teacher = ofa.make_network(cfg, data, "resnet", 4, 1).eval()
    x, y, logits_, *maps = ofa.view_source(cfg, data, images, labels, teacher)()
    torch.testing.assert_close(logits_, teacher(x).detach())
    torch.testing.assert_close(maps, [m.detach() for m in teacher.stages(x)])
    possible = common.Images.normal(data.train[:20])
    shifted = torch.stack([torch.roll(F.pad(possible, (1, 1, 1, 1), "replicate"), (i, j), (2, 3))[:, :, 1:-1, 1:-1]
                           for i in (-1, 0, 1) for j in (-1, 0, 1)])
    distance = (shifted[:, None] - x[None, :, None]).flatten(3).abs().amax(3).amin(0)
    assert (distance.amin(1) == 0).all() and torch.equal(data.train_labels[:20][distance.argmin(1)], y)
    assert not any(z.requires_grad for z in (logits_, *maps))


def test_a_patch_that_does_not_divide_the_image_is_refused():
    cfg = small("--patch", "5")
    with pytest.raises(common.UserError, match="patch"):
        ofa.make_network(cfg, common.load_images(cfg), "vit", 8, 1)
