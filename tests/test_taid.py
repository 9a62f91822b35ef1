"""TAID: the moving target and its limits, where the gradient flows, the course of t, the language and the measures."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import load_method

import common

taid = load_method("taid")


def logits(seed, shape=(3, 4, 7)):
    return 1.5 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()


def gradient(loss, student, teacher, *t):
    """The gradient of a loss with respect to the student's logits, in double precision where the loss allows it."""
    student = student.clone().requires_grad_()
    loss(student, teacher, MASK, *t).backward()
    return student.grad


def test_target_at_the_ends_and_between():
    s, p = logits(0), logits(1)
    assert torch.allclose(taid.intermediate_target(s, p, 0.0), s.softmax(-1))
    assert torch.allclose(taid.intermediate_target(s, p, 1.0), p.softmax(-1))
    geometric = s.softmax(-1).pow(0.7) * p.softmax(-1).pow(0.3)     # a mixture of logits, not of probabilities
    assert torch.allclose(taid.intermediate_target(s, p, 0.3), geometric / geometric.sum(-1, keepdim=True), atol=1e-6)


def test_value_by_hand():
    s, p = torch.tensor([[[0.0, math.log(3)]]]), torch.tensor([[[math.log(9), math.log(3)]]])
    # t = 1/2: logits log 3 and log 3, so p_t = (1/2, 1/2); q = (1/4, 3/4)
    expected = -0.5 * math.log(0.25) - 0.5 * math.log(0.75)
    assert taid.taid_loss(s, p, torch.ones(1, 1).bool(), 0.5).item() == pytest.approx(expected)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_gradient_is_q_minus_p_t_where_the_mask_is(t):
    s, p = logits(0), logits(1)
    expected = (s.softmax(-1) - taid.intermediate_target(s, p, t)) * MASK[..., None] / MASK.sum()
    assert torch.allclose(gradient(taid.taid_loss, s, p, t), expected, atol=1e-7)
    if t == 0:
        assert expected.abs().max() < 1e-7      # a student that is its own target stands still


def test_teacher_gets_no_gradient_and_the_ablation_has_another_one():
    s, p = logits(0).requires_grad_(), logits(1).requires_grad_()
    for loss in (taid.taid_loss, taid.loss_without_stop_gradient):
        loss(s, p, MASK, 0.4).backward()
        assert p.grad is None
    same = [loss(s, p, MASK, 0.4).item() for loss in (taid.taid_loss, taid.loss_without_stop_gradient)]
    assert same[0] == pytest.approx(same[1])
    a, b = (gradient(loss, s.detach(), p.detach(), 0.4)
            for loss in (taid.taid_loss, taid.loss_without_stop_gradient))
    assert F.cosine_similarity(a.flatten(), b.flatten(), 0) < 0.99


def test_one_end_is_forward_kl_and_the_other_reverse_kl():
    s, p = logits(2), logits(3)
    forward, reverse = (gradient(taid.token_loss(d), s, p, None) for d in (common.forward_kl, common.reverse_kl))
    assert torch.allclose(gradient(taid.taid_loss, s, p, 1.0), forward, atol=1e-7)
    cosine, ratio = [], []
    for t in (0.4, 0.1, 0.01):
        small = gradient(taid.taid_loss, s, p, t)
        cosine.append(F.cosine_similarity(small.flatten(), reverse.flatten(), 0).item())
        ratio.append((small.norm() / reverse.norm() / t).item())
    assert cosine == sorted(cosine) and cosine[0] < 0.995 and cosine[2] > 0.9999
    assert ratio[2] == pytest.approx(1, abs=0.02)


def test_excluded_tokens_do_not_count():
    s, p = logits(4), logits(5)
    s[..., 2] = p[..., 2] = -math.inf
    kept = [0, 1, 3, 4, 5, 6]
    assert taid.taid_loss(s, p, MASK, 0.3).item() == pytest.approx(
        taid.taid_loss(s[..., kept], p[..., kept], MASK, 0.3).item())


def course(losses, t_start=0.2, t_end=1.0, alpha=0.01, beta=0.99):
    """t at every step when these are the losses."""
    t, momentum, previous, found = torch.tensor(t_start), torch.tensor(0.0), torch.tensor(math.inf), []
    for step, loss in enumerate(losses):
        found.append(t.item())
        t, momentum = taid.next_t(t, momentum, previous, torch.tensor(loss), step / len(losses), t_start, t_end, alpha,
                                  beta)
        previous = torch.tensor(loss)
    return found


def test_one_step_by_hand():
    t, m = taid.next_t(*torch.tensor([0.5, 0.1, 2.0, 1.5]), 0.1, 0.2, 1.0, 0.3, 0.9)
    assert m.item() == pytest.approx(0.9 * 0.1 + 0.1 * 0.25)
    assert t.item() == pytest.approx(0.5 + 0.3 * 0.5 / (1 + math.exp(-m.item())))


def test_first_step_leaves_t_alone_and_remembers_the_loss():
    t, m = taid.next_t(*torch.tensor([0.2, 0.0, math.inf, 3.0]), 0.0, 0.2, 1.0, 0.5, 0.9)
    assert t == torch.tensor(0.2) and m == 0


def test_course_of_t():
    n = 700
    flat = course([1.0] * n)
    line = [0.2 + 0.8 * max(0, step - 1) / n for step in range(n)]
    assert all(b >= a for a, b in zip(flat, flat[1:])) and all(t >= x - 1e-6 for t, x in zip(flat, line))
    published = [0.668, 0.862, 0.943]       # alpha x steps = 7
    assert [flat[n * k // 4] for k in (1, 2, 3)] == pytest.approx(published, abs=0.01)
    assert flat[n // 4] == pytest.approx(1 - 0.8 * math.exp(-0.01 / 2 * n / 4), abs=0.01)
    assert course([1.0] * n, alpha=0.0) == pytest.approx(line, abs=1e-5)        # the linear ablation
    assert max(course([1.0] * n, t_end=0.8)) == pytest.approx(0.8)


def test_t_rises_faster_while_the_loss_falls():
    fast = dict(alpha=0.2, beta=0.5)
    falling, rising = ([math.exp(sign * 0.3 * step) for step in range(40)] for sign in (-1, 1))
    assert course(falling, **fast)[-1] > course([1.0] * 40, **fast)[-1] > course(rising, **fast)[-1]


def test_words_have_their_law():
    torch.manual_seed(0)
    task = taid.Words(12, 3, 0.1, 5)
    assert torch.allclose(task.law.sum(1), torch.ones(12)) and (task.follow.sum(1) == 3).all()
    prompts, answers = task.sample(40_000)
    assert prompts.shape == (40_000, 1) and answers.shape == (40_000, 5)
    pairs = torch.bincount(answers[:, 1] * 12 + answers[:, 2], minlength=144).view(12, 12).float()
    assert (pairs / pairs.sum(1, keepdim=True) - task.law).abs().max() < 0.04
    among = 0.9 + 0.1 * (task.follow * (task.law - 0.3)).sum(1).mean().item() / 0.1
    assert task.valid(prompts, answers).mean().item() == pytest.approx(among, abs=0.02)


def test_measures_of_averaging_and_of_dropping():
    p = torch.tensor([0.5, 0.5, 0.0, 0.0]).clamp_min(1e-9).log()[None, None]
    spread, one_mode = (torch.tensor(q).clamp_min(1e-9).log()[None, None]
                        for q in ([0.3, 0.3, 0.2, 0.2], [1.0, 0.0, 0.0, 0.0]))
    mask = torch.ones(1, 1).bool()
    a, b, same = (taid.compare(p, q, mask) for q in (spread, one_mode, p))
    assert (a["leak"], a["miss"], a["tv"]) == pytest.approx((0.4, 0, 0.4), abs=1e-6)
    assert (b["leak"], b["miss"], b["tv"]) == pytest.approx((0, 0.5, 0.5), abs=1e-6)
    assert a["forward_kl"] < b["forward_kl"] and a["reverse_kl"] > b["reverse_kl"]
    assert max(abs(v) for v in same.values()) < 1e-6


@pytest.fixture(scope="module")
def setting():
    torch.manual_seed(0)
    cfg = taid.Config(steps=6, batch=4)
    task = taid.Words(8, 2, 0.1, 4)
    teacher, student = (common.Transformer(8, w, 1, 2, 5).eval().requires_grad_(False) for w in (8, 4))
    return cfg, teacher, student, task, 8


def test_training_follows_t_and_leaves_the_networks_alone(setting):
    cfg, teacher, student = setting[:3]
    before = [p.clone() for net in (teacher, student) for p in net.parameters()]
    net, t = taid.train(cfg, "a", *setting[1:], taid.taid_loss)
    assert t[0] == t[1] == cfg.t_start and (t.diff() >= 0).all() and t[-1] > t[0]
    assert all(torch.equal(a, b) for a, b in zip(before, [p for m in (teacher, student) for p in m.parameters()]))
    assert any(not torch.equal(a, b) for a, b in zip(student.parameters(), net.parameters()))


def test_a_target_fixed_at_one_trains_as_forward_kl_does(setting):
    a, _ = taid.train(setting[0], "b", *setting[1:], taid.taid_loss, t_fixed=1.0)
    b, _ = taid.train(setting[0], "c", *setting[1:], taid.token_loss(common.forward_kl))
    tokens = torch.randint(8, (16, 5))
    assert torch.allclose(a(tokens), b(tokens), atol=1e-4)


def test_linear_arm_follows_the_line_one_step_behind(setting):
    _, t = taid.train(setting[0], "d", *setting[1:], taid.taid_loss, adaptive=False, t_end=0.8)
    assert t.tolist() == pytest.approx([0.2] + [0.2 + 0.6 * step / 6 for step in range(5)])
