"""srpo.py: siblings, routing, the SDPO loss against SDPO's own formulas, the entropy weight, what carries gradient."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import load_method

import common
import toy_data.arithmetic as arithmetic

srpo = load_method("srpo")
B, L, V = 6, 5, 7


@pytest.fixture
def logits():
    torch.manual_seed(0)
    teacher, student = torch.randn(2, B, L, V, dtype=torch.float64) * 2
    return teacher.requires_grad_(True), student.requires_grad_(True)


@pytest.fixture
def tokens(logits):
    """Sampled tokens, their log-probabilities under the student, and a ragged mask."""
    y = torch.randint(V, (B, L))
    return y, common.token_log_probs(logits[1], y), torch.arange(L) < torch.tensor([[5], [3], [1], [4], [2], [5]])


def test_siblings_by_hand():
    """The first right rollout other than oneself; none in a group without success or with one's own alone."""
    c = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0], [1, 1, 1, 1]]).bool()
    informed, place = srpo.siblings(c)
    assert informed.tolist() == [[True] * 4, [False] * 4, [True, True, False, True], [True] * 4]
    assert place[0].tolist() == [1, 3, 1, 1] and place[2, [0, 1, 3]].tolist() == [2, 2, 2]
    assert place[3].tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_sdpo_loss_is_the_generalised_divergence(logits, tokens, alpha):
    """Written out with torch's kl_div(input, target) = KL(target || exp(input))."""
    q, p = (x.log_softmax(-1) for x in logits)
    kl = lambda a, b: F.kl_div(b, a, reduction="none", log_target=True).sum(-1)
    m = (alpha * q.exp() + (1 - alpha) * p.exp()).log()
    expected = kl(q, p) if alpha == 0 else kl(p, q) if alpha == 1 else alpha * kl(q, m) + (1 - alpha) * kl(p, m)
    torch.testing.assert_close(srpo.sdpo_loss(*logits, tokens[1], tokens[1], alpha), expected)


def test_sdpo_ratio_is_detached_and_clipped_above(logits, tokens):
    _, log_p, _ = tokens
    plain = srpo.sdpo_loss(*logits, log_p, log_p, 0.5)
    for shift, factor in ((math.log(1.5), 1.5), (math.log(0.1), 0.1), (5.0, 2.0), (500.0, 2.0)):
        found = srpo.sdpo_loss(*logits, log_p, log_p - shift, 0.5)
        torch.testing.assert_close(found, factor * plain)
        gradient, = torch.autograd.grad(found.sum(), logits[1], retain_graph=True)
        expected, = torch.autograd.grad(factor * plain.sum(), logits[1], retain_graph=True)
        torch.testing.assert_close(gradient, expected)      # the ratio itself adds none


def test_teacher_has_no_gradient_and_none_is_left_when_it_is_the_student(logits, tokens):
    teacher, student = logits
    mask, everything = tokens[2], torch.ones(B, dtype=torch.bool)
    weight = srpo.entropy_weight(teacher, mask, 1.0)
    assert not weight.requires_grad
    loss = srpo.sdpo_loss(teacher, student, tokens[1], tokens[1], 0.5) * weight
    srpo.routed_loss(torch.zeros(B, L), loss, ~everything, everything, mask).backward()
    assert teacher.grad is None and student.grad[mask].abs().amin() > 0 and student.grad[~mask].abs().max() == 0
    for alpha in (0.0, 0.5, 1.0):
        same = srpo.sdpo_loss(student.detach(), student, tokens[1], tokens[1], alpha)
        assert same.abs().max() < 1e-12
        gradient, = torch.autograd.grad(same.sum(), student, retain_graph=True)
        assert gradient.abs().max() < 1e-12


def test_entropy_weight_by_hand():
    """Uniform over 4 (H = log 4) and certain (H = 0): exp(-beta H) = 4^-beta and 1, over their mean on the mask."""
    teacher = torch.tensor([[[0.0, 0.0, 0.0, 0.0], [0.0, -99.0, -99.0, -99.0], [0.0, 0.0, -99.0, -99.0]]])
    mask = torch.tensor([[True, True, False]])
    for beta in (0.0, 1.0, 2.0):
        mean = (1 + 4**-beta) / 2
        expected = torch.tensor([[4**-beta / mean, 1 / mean, 2**-beta / mean]])
        torch.testing.assert_close(srpo.entropy_weight(teacher, mask, beta), expected)


def test_entropy_weight_is_normalised_over_the_batch(logits, tokens):
    """Not within a sequence: a text of an unsure teacher weighs less as a whole."""
    teacher = torch.cat([logits[0][:3] * 0.1, logits[0][3:] * 5])
    weight = srpo.entropy_weight(teacher, tokens[2], 1.0)
    assert weight[tokens[2]].mean().item() == pytest.approx(1)
    assert weight[:3][tokens[2][:3]].max() < weight[3:][tokens[2][3:]].min()


def test_routed_loss_has_one_denominator(tokens):
    mask, (policy, distillation) = tokens[2], torch.randn(2, B, L)
    c = torch.tensor([1, 0, 0, 1, 0, 1]).bool()
    found = srpo.routed_loss(policy, distillation, c, ~c, mask)
    total = sum((policy if c[b] else distillation)[b, t] for b in range(B) for t in range(L) if mask[b, t])
    torch.testing.assert_close(found, total / mask.sum())
    # with one side alone: its own token mean, as in GRPO and in SDPO
    torch.testing.assert_close(srpo.routed_loss(policy, distillation, c & False, ~c, mask),
                               distillation[~c][mask[~c]].mean())
    torch.testing.assert_close(srpo.routed_loss(policy, distillation, c | True, c & False, mask), policy[mask].mean())
    assert srpo.routed_loss(policy, distillation, c & False, c & False, mask) == 0


def test_routes_of_srpo_share_out_all_rollouts():
    c = torch.rand(50, 8, generator=torch.Generator().manual_seed(0)) < 0.3
    m, _ = srpo.siblings(c)
    to_policy, to_distillation = srpo.ARMS["SRPO"]["route"](c, m)
    assert (to_policy ^ to_distillation).all() and torch.equal(to_distillation, ~c & m)
    assert to_policy[~c.any(1)].all() and to_policy[c.all(1)].all()     # without success, without failure
    for arm, expected in {"GRPO": (c | True, c & False), "SDPO": (c & False, m), "SDPO, wrong only": (c & False, m & ~c),
                          "SDPO, right only": (c & False, m & c), "mixed advantage": (c | True, c & False)}.items():
        found = srpo.ARMS[arm]["route"](c, m)
        assert all(torch.equal(a, b) for a, b in zip(found, expected)), arm


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_groups_that_are_all_wrong_or_all_right_give_no_gradient(logits, tokens, reward):
    """In SRPO as in GRPO: they go to GRPO, and their advantages are 0."""
    (teacher, student), (_, log_p, mask) = logits, tokens
    c = torch.full((2, B // 2), bool(reward))
    advantage = common.group_advantages(c.double()).flatten()[:, None]
    to_policy, to_distillation = (z.flatten() for z in srpo.routed(c, srpo.siblings(c)[0]))
    policy = common.clipped_policy_loss(log_p, log_p.detach(), advantage, 0.2, 0.28)
    distillation = srpo.sdpo_loss(teacher, student, log_p, log_p, 0.5)
    srpo.routed_loss(policy, distillation, to_policy, to_distillation, mask).backward()
    assert student.grad.abs().max() == 0


def test_mixed_advantage(logits, tokens):
    y, log_p, _ = tokens
    advantage, informed = torch.randn(B, 1, dtype=torch.float64), torch.tensor([1, 0, 1, 0, 1, 1]).bool()
    found = srpo.mixed_advantage(advantage, logits[0], log_p, y, informed, 0.9)
    assert not found.requires_grad
    log_q = logits[0].log_softmax(-1).gather(2, y[..., None])[..., 0]
    torch.testing.assert_close(found[1], (0.9 * advantage[1]).expand(L))
    torch.testing.assert_close(found[0], (0.9 * advantage[0] + 0.1 * (log_q[0] - log_p[0])).detach())
    torch.testing.assert_close(srpo.mixed_advantage(advantage, logits[0], log_p, y, informed, 1.0),
                               advantage.expand(B, L))


@pytest.fixture
def sheets():
    torch.manual_seed(0)
    return srpo.Sheets(srpo.Config(products=2, doubtful=0.5, mistaken=1.0), arithmetic)


def test_verifier_takes_digits_and_letters(sheets):
    """7 * 4 = 28, 3 * 8 = 24: 8 and 4, or i and e."""
    x = arithmetic.encode("C7438=").expand(7, -1)
    y = torch.stack([arithmetic.encode(t) for t in ("84.", "8e.", "ie.", "48.", "8.4", "841", ".4.")])
    assert sheets.correct(x, y).tolist() == [True, True, True, False, False, False, False]


def test_warm_up_texts(sheets):
    """Right wherever a solution stands in the prompt; else wrong exactly on the doubtful products, always alike."""
    seen = set()
    for _ in range(20):
        x, y = sheets.texts(64)
        informed = x.shape[1] > sheets.prompt_length
        seen.add(informed)
        problem = x[:, :sheets.prompt_length]
        if informed:
            assert sheets.correct(problem, x[:, sheets.prompt_length:-1]).all() and sheets.correct(problem, y).all()
            same = (x[:, sheets.prompt_length:-1] >= sheets.letter) == (y >= sheets.letter)
            assert 0.85 < same[:, :-1].float().mean() < 1      # 0.9 copied, half of the rest alike by chance
        else:
            right, place = sheets.values(problem)
            value = torch.where(y >= sheets.letter, y - sheets.letter, y)[:, :-1]
            assert torch.equal(value != right, sheets.doubtful[place])
            assert torch.equal(value[value != right], sheets.wrong[place][value != right])
    assert seen == {True, False}
