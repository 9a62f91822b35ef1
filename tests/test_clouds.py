"""The LiDAR-like scans: shapes, what the sensor can see, pillars against a plain loop, targets, average precision."""
import pytest
import torch

from toy_data.clouds import SIZES, Pillars, Scans, average_precision, detections, pillar_targets, pillarise


@pytest.fixture(scope="module")
def scans():
    torch.manual_seed(0)
    return Scans().sample(60)


def test_shapes_and_ranges(scans):
    points, valid, boxes, labels = scans
    assert points.shape[::2] == (60, 4) and valid.shape == points.shape[:2] and points.isfinite().all()
    assert boxes.shape == (60, 4, 4) and labels.shape == (60, 4) and set(labels.unique().tolist()) == {0, 1, 2}
    seen = points[valid]
    assert ((seen[:, :2] >= 0) & (seen[:, :2] <= 12)).all() and seen[:, 2].amin() > -0.2 and seen[:, 2].amax() < 2
    assert (boxes[..., :2] > 0.5).all() and (boxes[..., :2] < 11.5).all()
    apart = torch.cdist(boxes[..., :2], boxes[..., :2]) + 9 * torch.eye(4)
    assert apart.min() > 1.5        # objects do not stand in one another


def test_sizes_are_those_of_the_class(scans):
    _, _, boxes, labels = scans
    for c, (length, width, _) in enumerate(SIZES):
        long, short = boxes[labels == c][:, 2:].amax(1), boxes[labels == c][:, 2:].amin(1)
        assert torch.allclose(long / short, torch.full_like(long, length / width), rtol=1e-4)
        assert long.min() >= 0.8 * length - 1e-5 and long.max() <= 1.2 * length + 1e-5


def test_points_lie_on_the_side_towards_the_sensor():
    torch.manual_seed(0)
    points, valid, boxes, labels = Scans(bushes=0, clutter=0, density=200).sample(40)
    parts = points.view(40, 4, 200, 4), valid.view(40, 4, 200)
    offset = parts[0][..., :2] - boxes[:, :, None, :2]
    half = boxes[:, :, None, [3, 2]] / 2
    assert (offset.abs() < half + 0.2)[parts[1]].all()
    for c in (1, 2):        # round: no point on the far half
        mine = (labels == c)[..., None] & parts[1]
        assert (offset[..., 1][mine] < 0.15).all()
    near = boxes[..., 1] < 4
    hits = parts[1].float().mean(2)
    assert hits[near].mean() > 1.2 * hits[boxes[..., 1] > 8].mean()     # fewer from afar


def test_reproducible_and_too_many_things():
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(Scans().sample(3))
    assert all(torch.equal(a, b) for a, b in zip(*drawn))
    with pytest.raises(ValueError, match="16 blocks"):
        Scans(objects=15, bushes=2).sample(1)


def test_pillars_against_a_loop(scans):
    points, valid, *_ = (a[:5] for a in scans)
    pillars = pillarise(points, valid, 12, cap=3)
    squares = {}
    for b in range(5):
        for p, there in zip(points[b], valid[b]):
            if there:
                squares.setdefault((b, int(p[1]), int(p[0])), []).append(p)
    assert len(squares) == len(pillars.counts)
    for i in range(0, len(pillars.counts), 7):
        b, row, column = (int(a[i]) for a in (pillars.scan, pillars.row, pillars.column))
        kept = torch.stack(squares[b, row, column][:3])
        assert pillars.counts[i] == len(kept)
        assert torch.allclose(pillars.features[i, :len(kept), :2], kept[:, :2] - torch.tensor([column, row]) - 0.5)
        assert torch.equal(pillars.features[i, :len(kept), 2:4], kept[:, 2:])
        assert torch.allclose(pillars.features[i, :len(kept), 4:7], kept[:, :3] - kept[:, :3].mean(0), atol=1e-5)
        assert (pillars.features[i, :len(kept), 7] == 1).all() and (pillars.features[i, len(kept):] == 0).all()


def test_canvas_and_gather_are_inverse_and_carry_gradient(scans):
    points, valid, *_ = (a[:4] for a in scans)
    pillars = pillarise(points, valid, 12)
    values = torch.randn(len(pillars.counts), 5, requires_grad=True)
    canvas = pillars.canvas(values, 4)
    assert canvas.shape == (4, 5, 12, 12) and torch.equal(pillars.gather(canvas), values)
    assert torch.allclose(canvas.sum(), values.sum(), rtol=1e-4)
    canvas.sum().backward()
    assert torch.equal(values.grad, torch.ones_like(values))


def one_scan(*places):
    """Pillars at (row, column), one point each, of a single scan on a 12 x 12 grid."""
    row, column = torch.tensor(places).T
    zero = torch.zeros_like(row)
    return Pillars(torch.zeros(len(row), 1, 8), zero + 1, zero, row, column, 12)


def test_targets_by_hand():
    boxes, labels = torch.tensor([[[3.5, 2.0, 2.0, 1.0], [9.0, 9.0, 1.0, 1.0]]]), torch.tensor([[2, 0]])
    kind, target = pillar_targets(one_scan((1, 3), (2, 3), (2, 5), (8, 9), (5, 5)), boxes, labels)
    assert kind.tolist() == [3, 3, 0, 1, 0]
    assert torch.allclose(target[0], torch.tensor([0.0, 0.5, 2.0, 1.0]) .where(torch.arange(4) < 2,
                          torch.tensor([0.0, 0.0, 2.0, 1.0]).log()))
    assert torch.allclose(target[3, :2], torch.tensor([-0.5, 0.5]))


def test_detections_strike_out_what_is_near_a_better_one():
    pillars = one_scan((1, 1), (1, 2), (6, 6), (9, 9))
    probabilities = torch.tensor([[0.1, 0.9, 0, 0], [0.2, 0.8, 0, 0], [0.3, 0.6, 0.1, 0], [0.5, 0, 0, 0.5]])
    offsets = torch.tensor([[0.2, 0.0], [-0.5, 0.0], [0.0, 0.0], [0.0, -0.25]])
    centres, scores = detections(probabilities, offsets, pillars, scans=1, radius=1.0)
    assert torch.allclose(scores[0, :, :3], torch.tensor([[0.9, 0.6, 0], [0.1, 0, 0], [0.5, 0, 0]]))
    assert torch.allclose(centres[0, 0, :2], torch.tensor([[1.7, 1.5], [6.5, 6.5]]))
    assert torch.allclose(centres[0, 2, 0], torch.tensor([9.5, 9.25]))
    assert (detections(probabilities, offsets, pillars, 1, radius=0.1)[1][0, 0] > 0).sum() == 3


def test_average_precision_by_hand():
    """One class: scores 0.9 (right), 0.8 (wrong place), 0.7 (the same object again), 0.6 (right); three objects."""
    boxes = torch.tensor([[[1.0, 1.0, 1, 1], [5.0, 5.0, 1, 1], [9.0, 9.0, 1, 1]]])
    labels = torch.zeros(1, 3, dtype=torch.long)
    centres, scores = torch.zeros(1, 3, 4, 2), torch.zeros(1, 3, 4)
    centres[0, 0] = torch.tensor([[1.2, 1.0], [3.0, 3.0], [1.0, 1.1], [5.0, 5.3]])
    scores[0, 0] = torch.tensor([0.9, 0.8, 0.7, 0.6])
    assert average_precision((centres, scores), boxes, labels) == pytest.approx([(1 + 2 / 4) / 3, 0, 0])
    assert average_precision((centres, scores), boxes, labels, distance=0.25)[0] == pytest.approx(1 / 3)
    assert average_precision((centres, scores), boxes, labels + 1)[1] == 0      # another class does not count


def test_targets_as_predictions_are_perfect(scans):
    points, valid, boxes, labels = scans
    pillars = pillarise(points, valid, 12)
    kind, target = pillar_targets(pillars, boxes, labels)
    found = detections(torch.nn.functional.one_hot(kind, 4).float(), target, pillars, 60)
    assert min(average_precision(found, boxes, labels)) > 0.95
    blind = detections(torch.full((len(kind), 4), 0.25), 0 * target, pillars, 60)
    assert max(average_precision(blind, boxes, labels)) < 0.3
