"""ACAM-KD: fusion, masks, the masked distance and its trap, diversity, and where gradients go."""
import pytest
import torch
from conftest import load_method

acam = load_method("acam_kd")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_fusion_is_attention_of_teacher_places_over_student_places():
    query, key, value = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    A = (torch.einsum("bcp,bcq->bpq", query.flatten(2), key.flatten(2)) / 3**0.5).softmax(2)
    expected = torch.einsum("bpq,bcq->bcp", A, value.flatten(2)).view(2, 5, 4, 4)
    assert torch.allclose(acam.fuse(query, key, value), expected, atol=1e-6)


def test_fusion_follows_the_teachers_places_and_not_the_students():
    query, key, value = (torch.randn(1, 4, 4, 4) for _ in range(3))
    fused = acam.fuse(query, key, value)
    assert torch.allclose(acam.fuse(query, key.flip(3), value.flip(3)), fused, atol=1e-6)
    assert torch.allclose(acam.fuse(query.flip(3), key, value), fused.flip(3), atol=1e-6)


def test_masks_in_closed_form():
    fused, m_c, m_s = torch.randn(2, 3, 4, 4), torch.randn(5), torch.randn(5, 3)
    channel, spatial = acam.channel_masks(fused, m_c), acam.spatial_masks(fused, m_s)
    assert channel.shape == (2, 5, 3) and spatial.shape == (2, 5, 16)
    assert channel[1, 4, 2].item() == pytest.approx((m_c[4] * fused[1, 2].mean()).sigmoid().item(), rel=1e-5)
    assert spatial[1, 4, 6].item() == pytest.approx((m_s[4] @ fused[1, :, 1, 2]).sigmoid().item(), rel=1e-5)


def test_masked_distance_against_the_sums_of_the_paper():
    difference, masks = torch.randn(2, 3, 4), torch.rand(2, 5, 4)
    expected = 0.0
    for b in range(2):
        for m in range(5):
            squares = sum((masks[b, m, p] * difference[b, k, p]) ** 2 for k in range(3) for p in range(4))
            expected += squares / (3 * masks[b, m].sum()) / 5 / 2
    assert acam.masked_distance(difference, masks).item() == pytest.approx(expected.item(), rel=1e-4)
    channel = torch.rand(2, 5, 3)
    expected = sum((channel[b, m, k] * difference[b, k, p]) ** 2 / (4 * channel[b, m].sum()) / 10
                   for b in range(2) for m in range(5) for k in range(3) for p in range(4))
    assert acam.masked_distance(difference.mT, channel).item() == pytest.approx(expected.item(), rel=1e-4)


def test_open_masks_give_the_plain_distance_and_empty_ones_nothing():
    difference = torch.randn(2, 3, 4)
    assert acam.masked_distance(difference, torch.ones(2, 5, 4)).item() == pytest.approx(
        difference.square().mean().item(), rel=1e-4)
    assert acam.masked_distance(difference, torch.zeros(2, 5, 4)).item() == 0


def test_the_distance_shrinks_with_the_masks_which_is_the_trap():
    difference, masks = torch.randn(2, 3, 16), torch.rand(2, 5, 16)
    half = acam.masked_distance(difference, masks / 2) / acam.masked_distance(difference, masks)
    assert half.item() == pytest.approx(0.5, rel=1e-3)
    logits = torch.zeros(2, 5, 16, requires_grad=True)
    acam.masked_distance(difference, logits.sigmoid()).backward()
    assert logits.grad.sum() > 0, "descending it closes the masks"


def test_diversity_is_the_mean_dice_overlap_of_different_masks():
    same = torch.rand(1, 1, 8).repeat(3, 4, 1)
    assert acam.diversity_loss(same).item() == pytest.approx(1)
    assert acam.diversity_loss(torch.eye(4)[None]).item() == 0
    assert acam.diversity_loss(torch.rand(2, 1, 8)).item() == 0
    masks = torch.rand(1, 3, 8)
    pairs = [2 * (masks[0, i] * masks[0, j]).sum() / (masks[0, i].square().sum() + masks[0, j].square().sum())
             for i, j in ((0, 1), (0, 2), (1, 2))]
    assert acam.diversity_loss(masks).item() == pytest.approx(sum(pairs).item() / 3, rel=1e-5)


def test_fixed_masks_have_mean_one_and_follow_the_magnitude():
    features = torch.randn(2, 6, 4, 4)
    channel, spatial = acam.fixed_masks(features)
    assert channel.shape == (2, 1, 6) and spatial.shape == (2, 1, 16)
    assert torch.allclose(channel.mean(2), torch.ones(2, 1)) and torch.allclose(spatial.mean(2), torch.ones(2, 1))
    assert torch.equal(spatial[:, 0].argmax(1), features.abs().mean(1).flatten(1).argmax(1))
    assert torch.equal(channel[:, 0].argmin(1), features.abs().mean((2, 3)).argmin(1))


def test_only_cooperative_masks_see_the_student():
    teacher, student = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)
    for cooperative in (True, False):
        masker = acam.Masker(8, 3, cooperative)
        for a, b in zip(masker(teacher, student), masker(teacher, torch.randn(2, 8, 4, 4))):
            assert torch.equal(a, b) != cooperative


def setting(**options):
    """Two steps of training: the weights of student and masker afterwards."""
    torch.manual_seed(1)
    weights = {k: options.pop(k) for k in ("alpha", "weight") if k in options}
    cfg = acam.Config(steps=2, batch=4, width=4, teacher_width=8, **weights)
    start, teacher, masker = acam.Segmenter(5, 4, 1), acam.Segmenter(5, 8, 1).eval(), acam.Masker(8, 3)
    before = [p.detach().clone() for p in masker.parameters()]
    images, labels = torch.randn(8, 3, 8, 8), torch.randint(5, (8, 8, 8))
    student, *_ = acam.train_student(cfg, "test", start, teacher, images, labels, images, masker=masker, **options)
    moved = any(not torch.equal(a, b) for a, b in zip(before, masker.parameters()))
    return list(student.parameters()), moved


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b))


def test_diversity_trains_the_masks_and_leaves_the_student_alone():
    alone, _ = setting(distil=False)
    with_diversity, moved = setting(alpha=0.0)
    assert same(alone, with_diversity) and moved
    assert not same(alone, setting(alpha=0.0, joint=True)[0]), "in the joint reading it reaches the student"


def test_distance_trains_the_student_and_leaves_the_masks_alone():
    alone, _ = setting(distil=False)
    distilled, moved = setting(diversity=False)
    assert not same(alone, distilled) and not moved
    assert setting(diversity=False, joint=True)[1]
