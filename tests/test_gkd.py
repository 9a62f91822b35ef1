"""gkd.py: the divergences against closed forms and limits, masks, where the gradient flows, what a step trains on."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import load_method

import common

gkd = load_method("gkd")
B, L, V = 3, 5, 7


@pytest.fixture
def logits():
    torch.manual_seed(0)
    teacher, student = torch.randn(2, B, L, V, dtype=torch.float64) * 2
    return teacher, student.requires_grad_(True)


def test_divergences_of_two_tokens_by_hand():
    """p = (3/4, 1/4), q = (1/4, 3/4), beta = 1/4: m = (3/8, 5/8)."""
    p, q = (torch.tensor([[w]], dtype=torch.float64).log() for w in ([0.75, 0.25], [0.25, 0.75]))
    to_teacher = 0.75 * math.log(0.75 / 0.375) + 0.25 * math.log(0.25 / 0.625)
    to_student = 0.25 * math.log(0.25 / 0.375) + 0.75 * math.log(0.75 / 0.625)
    assert gkd.generalized_jsd(p, q, 0.25).item() == pytest.approx(0.25 * to_teacher + 0.75 * to_student)


def test_ends_are_the_two_kls(logits):
    """torch's kl_div(input, target) is KL(target || exp(input))."""
    teacher, student = (x.log_softmax(-1) for x in logits)
    forward = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    reverse = F.kl_div(teacher, student, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(gkd.generalized_jsd(*logits, 0), forward)
    torch.testing.assert_close(gkd.generalized_jsd(*logits, 1), reverse)


def test_scaled_jsd_goes_to_the_kl_at_either_end(logits):
    for beta, end, scale in ((1e-6, 0, 1e-6), (1 - 1e-6, 1, 1e-6)):
        near = gkd.generalized_jsd(*logits, beta) / scale
        torch.testing.assert_close(near, gkd.generalized_jsd(*logits, end), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_zero_at_equality_positive_elsewhere_jsd_bounded(logits, beta):
    teacher, student = logits
    assert gkd.generalized_jsd(teacher, teacher, beta).abs().max() < 1e-12
    assert (gkd.generalized_jsd(teacher, student, beta) > 0).all()
    if 0 < beta < 1:
        far = torch.eye(V, dtype=torch.float64)[:2] * 1000
        bound = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)        # distributions without overlap
        assert gkd.generalized_jsd(far[:1], far[1:], beta).item() == pytest.approx(bound)


def test_gradient_of_the_forward_kl_is_the_difference_of_the_distributions(logits):
    teacher, student = logits
    mask = torch.ones(B, L, dtype=torch.bool)
    gkd.gkd_loss(teacher, student, mask, 0.0).backward()
    torch.testing.assert_close(student.grad, (student.detach().softmax(-1) - teacher.softmax(-1)) / (B * L))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_no_gradient_to_the_teacher_nor_to_what_follows_the_end(logits, beta):
    teacher, student = logits
    teacher = teacher.clone().requires_grad_(True)
    tokens = torch.tensor([[0, 6, 1, 6, 2], [6, 0, 0, 0, 0], [0, 1, 2, 3, 4]])
    mask = common.answer_mask(tokens, 6)
    loss = gkd.gkd_loss(teacher, student, mask, beta)
    loss.backward()
    assert teacher.grad is None
    assert ((student.grad.abs().sum(-1) > 0) == mask).all()


def test_every_sequence_counts_once_whatever_its_length(logits):
    teacher, student = logits
    mask = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    d = gkd.generalized_jsd(teacher, student, 0.3)
    expected = (d[0, 0] + d[1, :2].mean() + d[2].mean()) / 3
    torch.testing.assert_close(gkd.gkd_loss(teacher, student, mask, 0.3), expected)
    assert gkd.gkd_loss(teacher, student, mask & False, 0.3) == 0


@pytest.mark.parametrize("lmbda", [0.0, 0.5, 1.0])
def test_the_share_lambda_of_the_steps_is_on_fresh_texts_of_the_student(monkeypatch, lmbda):
    """The sampler is counted and given the student as it is at that step; the teacher stays as it was."""
    cfg = gkd.Config(steps=60, batch=4, device="cpu", points=1)
    torch.manual_seed(0)
    start, teacher = (common.frozen(common.Transformer(V, 8, 1, 2, 8)) for _ in range(2))
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    seen, original = [], common.generate

    def counted(model, *arguments):
        seen.append(model.head.weight.detach().clone())
        return original(model, *arguments)
    monkeypatch.setattr(common, "generate", counted)
    data = torch.randint(6, (9, 3)), torch.randint(6, (9, 4))
    student, _ = gkd.distil(cfg, "x", start, teacher, *data, 6, lmbda, 0.0, 1e-2, lambda model: 0.0)
    assert (len(seen) in {0.0: [0], 0.5: range(18, 43), 1.0: [60]}[lmbda])
    assert all(not torch.equal(a, b) for a, b in zip(seen, seen[1:]))
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not torch.equal(student.head.weight, start.head.weight)


def test_on_policy_distillation_reaches_a_teacher_that_the_data_do_not_show():
    """One prompt, data with one answer only: after it the student knows one path, on-policy it knows the tree."""
    torch.manual_seed(0)
    start, teacher = (common.frozen(common.Transformer(V, 16, 1, 2, 8)) for _ in range(2))
    teacher.head.weight.mul_(6)
    prompts, answers = torch.zeros(1, 2, dtype=torch.long), torch.tensor([[1, 2, 3, 4]])
    cfg = gkd.Config(steps=150, batch=16, device="cpu", points=1)
    found = {}
    for lmbda in (0.0, 1.0):
        student, _ = gkd.distil(cfg, f"l{lmbda}", start, teacher, prompts, answers, 6, lmbda, 0.0, 1e-2, lambda model: 0.0)
        own = common.generate(student, prompts.repeat(200, 1), 4, 6)
        p, q = (common.completion_logits(model, prompts.repeat(200, 1), own) for model in (teacher, student))
        found[lmbda] = common.masked_mean(common.forward_kl(p, q), common.answer_mask(own, 6)).item()
    assert found[1.0] < 0.3 * found[0.0]


@pytest.mark.parametrize("start_acc, steps", [(0.0, 19), (1.0, 40)])
def test_the_start_is_trained_until_the_asked_share_is_right(monkeypatch, tmp_path, start_acc, steps):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path))
    cfg = gkd.Config(data="arithmetic", terms=2, batch=4, device="cpu", start_acc=start_acc, start_steps=40)
    arithmetic = common.domain(cfg, "arithmetic")
    task, updates, original = arithmetic.Sums(2, 3, "any"), [], common.update
    monkeypatch.setattr(common, "update", lambda *a, **k: (updates.append(1), original(*a, **k)))
    net = common.Transformer(arithmetic.TOKENS, 8, 1, 2, task.prompt_length + task.answer_length)
    student = gkd.fine_tuned(cfg, net, task, arithmetic.EOS, data=arithmetic.KEY)
    assert len(updates) == steps and not any(p.requires_grad for p in student.parameters())


def test_cross_entropy_is_the_mean_over_texts_of_the_means_over_tokens(logits):
    student, mask = logits[1], torch.arange(L) < torch.tensor([[1], [3], [5]])
    tokens = torch.randint(V, (B, L))
    log_p = student.log_softmax(-1).gather(2, tokens[..., None])[..., 0]
    expected = -sum(log_p[b, :n].mean() for b, n in enumerate((1, 3, 5))) / B
    torch.testing.assert_close(gkd.cross_entropy_loss(student, tokens, mask), expected)
