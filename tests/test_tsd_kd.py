"""tsd_kd.py: the likelihood of a ranking by enumeration; opener, weights and entropy by hand; where gradients flow."""
import itertools
import math

import pytest
import torch
from conftest import load_method

import common

tsd = load_method("tsd_kd")
B, L, V = 3, 6, 8


@pytest.fixture
def logits():
    torch.manual_seed(0)
    teacher, student = torch.randn(2, B, L, V, dtype=torch.float64) * 2
    return teacher, student.requires_grad_(True)


@pytest.fixture
def mask():
    return torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]).bool()


# ---------------------------------------------------------------------------------------------- the ranking

def test_plackett_luce_is_drawing_without_replacement():
    s = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    e = s.exp()
    by_hand = e[0] / e.sum() * e[1] / (e[1] + e[2])
    assert tsd.plackett_luce(s).item() == pytest.approx(-math.log(by_hand))


def test_probabilities_of_all_rankings_add_up_to_one():
    s = torch.randn(4, dtype=torch.float64)
    for prefix in (False, True):
        total = sum(tsd.plackett_luce(s[list(r)], prefix).neg().exp() for r in itertools.permutations(range(4)))
        assert total.item() == pytest.approx(1)


def test_prefix_form_is_the_likelihood_of_the_reversed_ranking():
    s = torch.randn(5, 7, 4, dtype=torch.float64)
    torch.testing.assert_close(tsd.plackett_luce(s, prefix=True), tsd.plackett_luce(s.flip(-1)))


def test_descent_orders_the_student_as_the_teacher_and_the_prefix_form_backwards():
    torch.manual_seed(1)
    teacher = torch.randn(1, 1, V)
    chosen = torch.ones(1, 1, dtype=torch.bool)
    for prefix, expected in ((False, 1.0), (True, -1.0)):
        student = torch.randn(1, 1, V).requires_grad_(True)
        optimizer = torch.optim.Adam([student], 0.05)
        for _ in range(300):
            common.update(optimizer, tsd.indirect_loss(teacher, student, chosen, V, prefix))
        assert tsd.kendall(teacher, student.detach(), V).item() == pytest.approx(expected)


def test_the_student_proposes_and_the_teacher_only_ranks(logits):
    """Gradient at the student's k likeliest tokens alone; of the teacher only the order of these matters."""
    teacher, student = logits
    chosen = torch.ones(B, L, dtype=torch.bool)
    loss = tsd.indirect_loss(teacher, student, chosen, 3)
    loss.backward()
    proposed = torch.zeros(B, L, V, dtype=torch.bool).scatter(-1, student.topk(3, -1).indices, True)
    assert torch.equal(student.grad != 0, proposed)
    other = torch.where(proposed, teacher * 100 + 5, 1000.0)
    torch.testing.assert_close(tsd.indirect_loss(other, student, chosen, 3), loss)
    best, second, third = torch.where(proposed, teacher, -torch.inf).argsort(-1, descending=True)[..., :3].unbind(-1)
    s = [student.gather(-1, i[..., None])[..., 0] for i in (best, second, third)]
    by_hand = -(s[0] - torch.stack(s).logsumexp(0)) - (s[1] - torch.stack(s[1:]).logsumexp(0))
    torch.testing.assert_close(loss, by_hand.mean())


def test_only_the_chosen_tokens_count(logits):
    teacher, student = logits
    chosen = torch.zeros(B, L, dtype=torch.bool)
    assert tsd.indirect_loss(teacher, student, chosen, 3) == 0
    chosen[0, 1] = chosen[2, 4] = True
    tsd.indirect_loss(teacher, student, chosen, 3).backward()
    assert torch.equal(student.grad.abs().sum(-1) > 0, chosen)


# ---------------------------------------------------------------------------------------------- the choice of tokens

def test_opener_by_hand():
    """Entropies 1 2 3 4: shares 0.1, 0.3, 0.6, 1. The token that reaches tau is in the opener; padding has no say."""
    h = torch.tensor([[1.0, 2, 3, 4, 50], [8.0, 1, 1, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    assert tsd.opener(h, mask, 0.05).int().tolist() == [[1, 0, 0, 0, 0], [1, 0, 0, 0, 0]]
    assert tsd.opener(h, mask, 0.25).int().tolist() == [[1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]
    assert tsd.opener(h, mask, 0.35).int().tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]
    assert tsd.opener(h, mask, 0.85).int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]
    assert tsd.opener(h * 0, mask, 0.5).int().tolist() == [[1, 0, 0, 0, 0], [1, 0, 0, 0, 0]]


def test_opener_is_each_text_s_own(mask):
    h = torch.rand(B, L)
    whole = tsd.opener(h, mask, 0.4)
    for i in range(B):
        assert torch.equal(whole[i:i + 1], tsd.opener(h[i:i + 1], mask[i:i + 1], 0.4))
    assert not (whole & ~mask).any() and whole[:, 0].all()


def test_weight_is_large_where_the_teacher_is_surer():
    flat, sharp = torch.zeros(1, 1, V), torch.eye(V)[None, :1] * 50
    assert tsd.surer_teacher(sharp, flat).item() == pytest.approx(V / (1 + V))       # sigmoid(log V)
    assert tsd.surer_teacher(flat, sharp).item() == pytest.approx(1 / (1 + V))
    assert tsd.surer_teacher(flat, flat).item() == 0.5
    assert not tsd.surer_teacher(flat, flat.requires_grad_(True)).requires_grad


def test_entropy_loss_takes_the_unsure_tokens_and_carries_gradient(logits, mask):
    _, student = logits
    h = tsd.entropy(student)
    torch.testing.assert_close(h, -(student.softmax(-1) * student.log_softmax(-1)).sum(-1))
    values = h[mask].sort().values                                                   # 14 tokens
    torch.testing.assert_close(tsd.entropy_loss(h, mask, 0.0), values.mean())
    torch.testing.assert_close(tsd.entropy_loss(h, mask, 0.5), values[7:].mean())
    torch.testing.assert_close(tsd.entropy_loss(h, mask, 1.0), values[-1])
    tsd.entropy_loss(h, mask, 0.5).backward()
    moved = student.grad.abs().sum(-1) > 0
    assert torch.equal(moved, mask & (h >= values[7]))


# ---------------------------------------------------------------------------------------------- the direct term

@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_direct_loss_is_the_weighted_jsd(logits, mask, beta):
    teacher, student = logits
    jsd, w = common.jensen_shannon(teacher, student, beta), torch.rand(B, L, dtype=torch.float64)
    torch.testing.assert_close(tsd.direct_loss(teacher, student, mask, w, beta), (w * jsd)[mask].sum() / mask.sum())


def test_direct_loss_moves_the_student_within_the_text_and_not_the_teacher(logits, mask):
    teacher, student = logits
    teacher = teacher.clone().requires_grad_(True)
    tsd.direct_loss(teacher, student, mask, tsd.surer_teacher(teacher, student), 0.9).backward()
    assert teacher.grad is None
    assert torch.equal(student.grad.abs().sum(-1) > 0, mask)


def test_weights_carry_no_gradient_into_the_student(logits, mask):
    """The gradient with the computed weights is that with the same numbers as constants."""
    teacher, student = logits
    found = []
    for w in (tsd.surer_teacher(teacher, student), tsd.surer_teacher(teacher, student).clone().detach()):
        found.append(torch.autograd.grad(tsd.direct_loss(teacher, student, mask, w, 0.9), student)[0])
    torch.testing.assert_close(*found, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------- the rest

def test_kendall_by_hand():
    """The student's three: 0, 1, 2 in this order; the teacher's order of them is 1, 0, 2: two pairs of three agree."""
    student, teacher = torch.tensor([5.0, 4, 3, -9]), torch.tensor([2.0, 3, 1, 99])
    assert tsd.kendall(teacher, student, 3).item() == pytest.approx(1 / 3)


def test_training_uses_the_students_own_texts_only_when_asked(monkeypatch):
    cfg = tsd.Config(steps=3, batch=4, device="cpu", points=1)
    torch.manual_seed(0)
    start, teacher = (common.frozen(common.Transformer(V, 8, 1, 2, 8)) for _ in range(2))
    calls, original = [], common.generate
    monkeypatch.setattr(common, "generate", lambda *a: calls.append(1) or original(*a))
    terms = dict(direct=1.0, entropy=1.0, indirect=1.0, own=True, weighted=True, prefix=False)
    for given, expected in ((None, 0), (terms | dict(own=False), 0), (terms, 3)):
        calls.clear()
        data = torch.randint(6, (9, 3)), torch.randint(6, (9, 4))
        student, _ = tsd.distil(cfg, f"x{expected}", start, teacher, *data, 7, lambda model: (0.0, 0.0), given)
        assert len(calls) == expected
        assert not torch.equal(student.head.weight, start.head.weight)


def test_sheet_frames_the_opener_and_shades_by_weight():
    tokens = torch.tensor([[1, 2], [3, 27]])
    weight = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    first = torch.tensor([[True, False], [False, False]])
    sheet = tsd.token_sheet(tokens, weight, first, torch.tensor([[1, 1], [1, 0]]).bool(), 60)
    assert sheet.shape == (1, 3, 60, 60) and sheet.min() >= -1 and sheet.max() <= 1
    assert sheet[0, :, 0, 0].tolist() == pytest.approx([0.7, -0.8, -0.8])            # red frame
    assert sheet[0, 0, 3, 33] < sheet[0, 0, 33, 3] < sheet[0, 0, 5, 5]               # dark, lighter, white
    assert (sheet[0, :, 30:, 30:] == 1).all()                                        # behind the end: nothing
