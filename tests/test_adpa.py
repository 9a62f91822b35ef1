"""adpa.py: the advantage, its top-k form and clamp, the loss and its gradient, DCKD, the objectives of the arms."""
import math

import pytest
import torch
from conftest import load_method

import common

adpa = load_method("adpa")
B, L, V = 3, 4, 6


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return torch.randn(3, B, L, V, dtype=torch.float64) * 1.5         # pi_dpo, pi_ref, student


def test_advantage_is_the_log_ratio_dpo_over_ref(logits):
    dpo, ref, _ = logits
    found = adpa.advantage(dpo, ref)
    torch.testing.assert_close(found.exp() * ref.softmax(-1), dpo.softmax(-1))
    assert adpa.advantage(dpo, dpo).abs().max() == 0


def test_advantage_of_the_optimal_policy_is_the_reward_over_beta_up_to_a_constant(logits):
    """pi_dpo = pi_ref exp(r / beta) / Z: differences of A between tokens are those of r / beta."""
    reward, ref, _ = logits
    found = adpa.advantage((ref.log_softmax(-1) + reward / 0.1), ref, floor=1e-300)
    torch.testing.assert_close(found.diff(dim=-1), reward.diff(dim=-1) / 0.1)


def test_expected_advantage_of_pi_dpo_is_its_kl_from_pi_ref(logits):
    dpo, ref, _ = logits
    mask = torch.ones(B, L, dtype=torch.bool)
    kl = common.forward_kl(dpo, ref).mean()
    torch.testing.assert_close(adpa.advantage_loss(dpo, adpa.advantage(dpo, ref), mask), -kl)
    assert adpa.advantage_loss(ref, adpa.advantage(dpo, ref), mask) > 0


def test_advantage_carries_no_gradient(logits):
    dpo, ref, _ = (x.clone().requires_grad_(True) for x in logits)
    assert not adpa.advantage(dpo, ref).requires_grad


def test_top_k_by_hand():
    """pi_dpo's two likeliest are 0 and 1; 1 is not among pi_ref's, which counts as pi_dpo(1) itself: A = 0."""
    dpo = torch.tensor([[[0.6, 0.25, 0.1, 0.05]]]).log()
    ref = torch.tensor([[[0.4, 0.1, 0.2, 0.3]]]).log()
    expected = torch.tensor([[[math.log(0.6 / 0.4), 0.0, 0.0, 0.0]]])
    torch.testing.assert_close(adpa.advantage(dpo, ref, top_k=2), expected)
    torch.testing.assert_close(adpa.advantage(dpo, ref, top_k=4), (dpo - ref))


def test_floor_bounds_the_advantage():
    dpo, ref = torch.tensor([[[0.0, -100.0]]]), torch.tensor([[[-100.0, 0.0]]])
    assert adpa.advantage(dpo, ref).flatten().tolist() == pytest.approx([-math.log(1e-7), math.log(1e-7)], rel=1e-5)


def test_clamp_cannot_tell_bad_from_neutral():
    a = torch.tensor([-5.0, -0.1, 0.0, 0.4, 1.0, 7.0], dtype=torch.float64)
    assert adpa.clamped(a).tolist() == pytest.approx([0, 0, 0, 0.4, 1, 1], abs=1e-7)


def test_loss_is_the_masked_mean_of_the_expected_advantage(logits):
    dpo, ref, student = logits
    mask = torch.arange(L) < torch.tensor([[1], [4], [2]])
    a = adpa.advantage(dpo, ref)
    by_hand = [sum(student[b, t].softmax(-1)[v] * a[b, t, v] for v in range(V)) for b, t in mask.nonzero().tolist()]
    torch.testing.assert_close(adpa.advantage_loss(student, a, mask), -torch.stack(by_hand).mean())


def test_gradient_is_the_exact_policy_gradient(logits):
    """d/dz_v of - sum_a pi A is - pi_v (A_v - E_pi A): probability moves to tokens better than the student's mean. A
    constant added to A at a state changes nothing."""
    dpo, ref, student = logits
    student = student.clone().requires_grad_(True)
    mask, a = torch.ones(B, L, dtype=torch.bool), adpa.advantage(dpo, ref)
    grad, = torch.autograd.grad(adpa.advantage_loss(student, a, mask), student)
    pi = student.detach().softmax(-1)
    torch.testing.assert_close(grad, -pi * (a - (pi * a).sum(-1, keepdim=True)) / (B * L))
    shifted, = torch.autograd.grad(adpa.advantage_loss(student, a + 3.0, mask), student)
    torch.testing.assert_close(shifted, grad)


def test_masked_tokens_and_the_advantage_get_no_gradient(logits):
    dpo, _, student = (x.clone().requires_grad_(True) for x in logits)
    mask = torch.arange(L).expand(B, L) < 2
    (adpa.advantage_loss(student, dpo, mask) + adpa.token_kl(dpo, student, mask)).backward()
    assert dpo.grad is None
    assert student.grad[:, 2:].abs().max() == 0 and student.grad[:, :2].abs().min() > 0


def test_token_kl_has_the_teacher_first(logits):
    dpo, _, student = logits
    mask = torch.ones(B, L, dtype=torch.bool)
    expected = torch.nn.functional.kl_div(student.log_softmax(-1), dpo.softmax(-1), reduction="sum") / (B * L)
    torch.testing.assert_close(adpa.token_kl(dpo, student, mask), expected)


@pytest.fixture
def small():
    """A student, pi_ref, pi_dpo and eight pairs."""
    torch.manual_seed(1)
    nets = [common.Transformer(V, 8, 1, 2, 7).eval() for _ in range(3)]
    pairs = [torch.randint(V, (8, n)) for n in (3, L, L)]
    return nets, pairs


def test_dpo_objective_at_its_reference_is_log_two(small):
    (student, _, _), pairs = small
    index = torch.tensor([0, 5])
    loss = adpa.dpo_objective(student, pairs, 0.1)(student, index, *(x[index] for x in pairs))["dpo"]
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)


def test_dpo_objective_prefers_the_chosen(small):
    (student, ref, _), pairs = small
    index = torch.arange(8)
    margins = []
    for mine in (student, ref):
        logits = adpa.logits_of(mine, *pairs)
        margins.append([common.token_log_probs(z, y).sum(1) for z, y in zip(logits, pairs[1:])])
    (cw, cl), (rw, rl) = margins
    expected = -(0.3 * ((cw - rw) - (cl - rl))).sigmoid().log().mean()
    found = adpa.dpo_objective(ref, pairs, 0.3)(student, index, *pairs)["dpo"]
    torch.testing.assert_close(found, expected)
    assert found.requires_grad


@pytest.mark.parametrize("both", [False, True])
def test_kd_objective_uses_one_or_both_responses(small, both):
    (student, _, dpo), pairs = small
    index = torch.tensor([1, 2, 7])
    losses = adpa.kd_objective(dpo, pairs, 2.0, both)(student, index, *(x[index] for x in pairs))
    kl = [common.forward_kl(common.completion_logits(dpo, pairs[0], y)[index],
                            common.completion_logits(student, pairs[0], y)[index]).mean() for y in pairs[1:]]
    torch.testing.assert_close(losses["kl"], 2.0 * (kl[0] + kl[1] if both else kl[0]))
    nll = -common.token_log_probs(common.completion_logits(student, pairs[0], pairs[1]), pairs[1])[index].mean()
    torch.testing.assert_close(losses["sft"], nll)


def test_adpa_objective_looks_at_own_states_and_never_at_the_rejected(small):
    (student, ref, dpo), pairs = small
    states, index = torch.randint(V, (8, L)), torch.tensor([3, 4])
    (on_dpo,), (on_ref,), (on_student,) = (adpa.logits_of(m, pairs[0], states) for m in (dpo, ref, student))
    a = adpa.advantage(on_dpo, on_ref)
    objective = adpa.adpa_objective(states, a, 3.0)
    prompts, chosen, rejected = (x[index] for x in pairs)
    losses = objective(student, index, prompts, chosen, rejected)
    expected = -3.0 * (on_student.softmax(-1) * a)[index].sum(-1).mean()
    torch.testing.assert_close(losses["advantage"], expected.detach(), check_stride=False)
    again = objective(student, index, prompts, chosen, (rejected + 1) % V)
    assert all(torch.equal(losses[k], again[k]) for k in losses)
    nll = -common.token_log_probs(common.completion_logits(student, pairs[0], pairs[1]), pairs[1])[index].mean()
    torch.testing.assert_close(losses["sft"], nll)


def test_repeated_steps_without_sft_put_all_on_the_best_token(logits):
    """Nothing in the advantage term itself keeps the student spread out."""
    dpo, ref, student = logits
    a, student = adpa.advantage(dpo, ref), student.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([student], 0.5)
    for _ in range(200):
        common.update(optimizer, adpa.advantage_loss(student, a, torch.ones(B, L, dtype=torch.bool)))
    assert student.softmax(-1).amax(-1).min() > 0.95
    assert torch.equal(student.argmax(-1), a.argmax(-1))
