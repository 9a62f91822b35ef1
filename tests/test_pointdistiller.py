"""PointDistiller: selection and weights, the graph from the teacher alone, the loss by hand, where gradients flow."""
import torch
import torch.nn.functional as F
from conftest import load_method

import common

pd = load_method("pointdistiller")


def features(m=30, wide=7, narrow=3, seed=0):
    torch.manual_seed(seed)
    return torch.randn(m, wide), torch.randn(m, narrow, requires_grad=True)


def test_select_takes_the_fullest_or_random_rows():
    counts = torch.tensor([1, 5, 2, 8, 8, 3])
    assert set(pd.select(counts, 3).tolist()) == {1, 3, 4}
    torch.manual_seed(0)
    drawn = [frozenset(pd.select(counts, 3, random=True).tolist()) for _ in range(50)]
    assert all(len(rows) == 3 for rows in drawn) and len(set(drawn)) > 10
    assert len(pd.select(counts, 100)) == len(pd.select(counts, 100, random=True)) == 6


def test_box_loss_by_hand():
    """Quadratic below 0.1, |d| - 0.05 beyond; summed over the four numbers, averaged with the weights."""
    boxes, target = torch.zeros(3, 4), torch.tensor([[1.0, 0, 0, 0], [0.05, 0.05, 0, 0], [9.0, 9, 9, 9]])
    loss = pd.box_loss(boxes, target, torch.tensor([1.0, 3.0, 0.0]))
    assert torch.allclose(loss, torch.tensor((0.95 + 3 * 2 * 0.5 * 0.05**2 / 0.1) / 4))
    assert pd.box_loss(boxes, target, torch.zeros(3)) == 0


def test_weights_average_to_one_and_spread_over_the_full_pillars():
    counts = torch.tensor([8, 8, 5, 1])
    for tau in (1e-2, 1.0, 50.0):
        assert torch.allclose(pd.importance_weights(counts, tau).mean(), torch.tensor(1.0))
    assert torch.allclose(pd.importance_weights(counts, 1e-2), torch.tensor([2.0, 2, 0, 0]))    # ties at the cap share
    assert torch.allclose(pd.importance_weights(counts, 1e6), torch.ones(4), atol=1e-4)
    w = pd.importance_weights(counts, 2.0)
    assert torch.allclose(w[0] / w[2], torch.tensor(1.5).exp())         # phi / tau, not phi * tau


def test_neighbours_against_a_loop_and_include_the_centre():
    teacher, _ = features()
    rows = torch.tensor([4, 20, 9])
    index = pd.neighbours(teacher, rows, 5)
    for i, found in zip(rows, index):
        order = (teacher - teacher[i]).square().sum(1).argsort()
        assert set(found.tolist()) == set(order[:5].tolist()) and i in found
    assert torch.equal(pd.neighbours(teacher, rows, 1)[:, 0], rows)     # K = 1: no graph
    assert pd.neighbours(teacher, rows, 99).shape == (3, 30)


def test_edges_hold_neighbour_then_centre():
    x = torch.arange(10.0).view(5, 2)
    e = pd.edges(x, torch.tensor([1, 3]), torch.tensor([[1, 0], [3, 4]]))
    assert torch.equal(e[0], torch.tensor([[2.0, 3, 2, 3], [0, 1, 2, 3]]))
    assert torch.equal(e[1], torch.tensor([[6.0, 7, 6, 7], [8, 9, 6, 7]]))


def test_edge_layer_is_a_1x1_convolution_with_batch_norm():
    layer = pd.EdgeLayer(3, 4)
    e = torch.randn(6, 5, 6)
    h = F.conv2d(e.permute(2, 0, 1)[None], layer.linear.weight[:, :, None, None])
    h = (h - h.mean((2, 3), keepdim=True)) / (h.var((2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(layer(e), h.relu()[0].permute(1, 2, 0), atol=1e-5)
    assert layer.linear.bias is None and len(list(layer.parameters())) == 1
    assert len(list(pd.EdgeLayer(3, 4, affine=True).parameters())) == 3     # with BN's scale and shift


def test_local_loss_by_hand():
    teacher, student = torch.zeros(2, 1, 2), torch.tensor([[[1.0, 2.0]], [[3.0, 0.0]]])
    weights = torch.tensor([1.5, 0.5])
    expected = 2 * (1.5 * (1 + 4) + 0.5 * 9) / 4
    assert torch.allclose(pd.local_distillation_loss(teacher, student, weights), torch.tensor(expected))
    assert pd.local_distillation_loss(student, student, weights) == 0


def test_gradient_reaches_student_and_both_layers_in_the_chosen_neighbourhood_only():
    teacher, student = features()
    layers = pd.EdgeLayer(7, 4, affine=True), pd.EdgeLayer(3, 4)
    rows = torch.tensor([0, 1])
    index = pd.neighbours(teacher, rows, 3)
    graphs = (layer(pd.edges(f, rows, index)) for layer, f in zip(layers, (teacher, student)))
    pd.local_distillation_loss(*graphs, torch.ones(2)).backward()
    touched = student.grad.abs().sum(1) > 0
    assert touched.sum() > 2 and set(touched.nonzero()[:, 0].tolist()) <= set(index.flatten().tolist())
    assert all(p.grad is not None for layer in layers for p in layer.parameters()) and teacher.grad is None


def test_a_pillar_without_weight_gives_no_gradient():
    student = torch.randn(2, 3, 4, requires_grad=True)
    pd.local_distillation_loss(torch.zeros(2, 3, 4), student, torch.tensor([2.0, 0.0])).backward()
    assert student.grad[0].abs().min() > 0 and (student.grad[1] == 0).all()


def test_soft_targets():
    torch.manual_seed(0)
    kind, teacher_kind = torch.randn(2, 6, 4)
    boxes, teacher_boxes = torch.randn(2, 6, 4)
    kind.requires_grad_()
    teacher_kind.requires_grad_()
    assert pd.soft_target_loss(teacher_kind, boxes, teacher_kind, boxes, 3.0).abs() < 1e-6
    pd.soft_target_loss(kind, teacher_boxes, teacher_kind, teacher_boxes, 3.0).backward()
    expected = 3 * ((kind / 3).softmax(1) - (teacher_kind / 3).softmax(1)) / 6          # T (q - p) / M
    assert torch.allclose(kind.grad, expected.detach(), atol=1e-6) and teacher_kind.grad is None
    background = torch.tensor([50.0, 0, 0, 0]).expand(6, 4)
    assert pd.soft_target_loss(background, boxes, background, teacher_boxes, 1.0) < 1e-3     # no object, no box


def test_detection_loss_ignores_boxes_of_the_background():
    kind, target = torch.zeros(3, 4), torch.tensor([0, 2, 0])
    boxes = torch.randn(3, 4, requires_grad=True)
    loss = pd.detection_loss(kind, boxes, target, torch.zeros(3, 4))
    loss.backward()
    assert (boxes.grad[[0, 2]] == 0).all() and boxes.grad[1].abs().sum() > 0
    assert torch.allclose(pd.detection_loss(kind, boxes * 0, target, torch.zeros(3, 4)), torch.tensor(4.0).log())


def test_hint_loss_is_the_mean_square():
    teacher, student = torch.randn(5, 3, requires_grad=True), torch.zeros(5, 3, requires_grad=True)
    loss = pd.hint_loss(student, teacher)
    loss.backward()
    assert torch.allclose(loss, teacher.square().mean()) and teacher.grad is None and student.grad.abs().sum() > 0


def test_detector_knows_no_order_of_points_and_no_padding():
    torch.manual_seed(0)
    cfg = common.Config(data="clouds")
    clouds = common.domain(cfg, "clouds")
    points, valid, *_ = clouds.Scans().sample(2)
    net = pd.Detector(6).eval()
    pillars = clouds.pillarise(points, valid, 12)
    order = torch.randperm(8)
    shuffled = pillars._replace(features=pillars.features[:, order])
    padded = pillars._replace(features=F.pad(pillars.features, (0, 0, 0, 5)))
    kind, boxes, (own, mixed) = net(pillars, 2)
    assert own.shape == mixed.shape == (len(pillars.counts), 6)
    for other in (shuffled, padded):
        found = net(other, 2)
        assert torch.allclose(found[0], kind, atol=1e-5) and torch.allclose(found[1], boxes, atol=1e-5)
    assert net(pillars, 2)[0].shape == (len(pillars.counts), 4)
