"""language.py against closed forms and brute force."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import common

V, EOS = 5, 4


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = common.Transformer(V, 16, 2, 2, 12).eval()
    net.head.weight.data.mul_(8)        # far from uniform
    return net


def test_cached_sampling_has_the_law_of_the_model(model):
    """Frequencies of all two-token completions against their probabilities, by enumeration."""
    prompt, n = torch.tensor([[1, 2, 0]]), 20_000
    torch.manual_seed(1)
    drawn = common.generate(model, prompt.repeat(n, 1), 2, EOS, temperature=0.7)
    pairs = torch.tensor(list(itertools.product(range(V), range(V))))
    logits = common.completion_logits(model, prompt.repeat(len(pairs), 1), pairs) / 0.7
    mask = common.answer_mask(pairs, EOS)
    p = common.sequence_log_probs(logits, pairs, mask).exp()
    p = torch.where((pairs[:, 0] == EOS) & (pairs[:, 1] != EOS), 0.0, p)       # what follows EOS is EOS
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    share = (drawn[:, None] == pairs).all(2).float().mean(0)
    assert (share - p).abs().max() < 4 * (0.25 / n) ** 0.5


def test_greedy_sampling_is_the_argmax_of_the_uncached_model(model):
    prompts = torch.randint(4, (6, 3))
    out = common.generate(model, prompts, 7, EOS, temperature=0, pad=3)
    logits = common.completion_logits(model, prompts, out)
    mask = common.answer_mask(out, EOS)
    assert (logits.argmax(-1) == out)[mask].all()
    assert (out[~mask] == 3).all()


def test_answer_mask_keeps_the_first_end_and_drops_the_rest():
    completions = torch.tensor([[0, EOS, 1, EOS], [EOS, EOS, 0, 0], [0, 1, 2, 3]])
    assert common.answer_mask(completions, EOS).int().tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]


def test_masked_mean():
    values, mask = torch.tensor([[1.0, 2, 9], [5, 9, 9]]), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    assert common.masked_mean(values, mask).item() == pytest.approx(8 / 3)
    assert common.masked_mean(values, mask, by_sequence=True).item() == pytest.approx((1.5 + 5) / 2)
    assert common.masked_mean(values, mask & False).item() == 0


def test_completion_logits_do_not_see_the_token_that_they_predict(model):
    prompts, completions = torch.randint(4, (1, 3)), torch.randint(4, (1, 5))
    other = completions.clone()
    other[0, 2] = (other[0, 2] + 1) % 4
    a, b = (common.completion_logits(model, prompts, c)[0] for c in (completions, other))
    assert torch.allclose(a[:3], b[:3], atol=1e-6) and not torch.allclose(a[3], b[3], atol=1e-4)


def test_divergences_against_torch_distributions():
    z, w = torch.randn(7, 3, 6, dtype=torch.double), torch.randn(7, 3, 6, dtype=torch.double)
    p, q = (torch.distributions.Categorical(logits=x) for x in (z, w))
    kl = torch.distributions.kl_divergence
    assert torch.allclose(common.forward_kl(z, w), kl(p, q))
    assert torch.allclose(common.reverse_kl(z, w), kl(q, p))
    assert torch.allclose(common.entropy(z), p.entropy())
    for beta in (0.1, 0.5, 0.9):
        m = torch.distributions.Categorical(probs=beta * p.probs + (1 - beta) * q.probs)
        assert torch.allclose(common.jensen_shannon(z, w, beta), beta * kl(p, m) + (1 - beta) * kl(q, m))
    assert torch.allclose(common.jensen_shannon(z, w, 1e-5) / 1e-5, kl(p, q), rtol=1e-3)
    assert torch.allclose(common.jensen_shannon(z, w, 1 - 1e-5) / 1e-5, kl(q, p), rtol=1e-3)
    assert torch.allclose(common.total_variation(z, w), 1 - torch.minimum(p.probs, q.probs).sum(-1))
    for divergence in (common.forward_kl, common.reverse_kl, common.total_variation):
        assert divergence(z, z + 3).abs().max() < 1e-12


def test_group_advantages():
    rewards = torch.tensor([[0.0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]])
    a = common.group_advantages(rewards)
    assert a.sum(1).abs().max() < 1e-6 and (a[1] == 0).all()
    assert a[0, 2].item() == pytest.approx(0.5 / math.sqrt(1 / 3), rel=1e-4)
    assert common.group_advantages(rewards, scale=False)[2, 3].item() == pytest.approx(0.75)
    assert (common.group_advantages(torch.ones(3, 1)) == 0).all()


def test_clipped_policy_loss_stops_where_ppo_stops():
    log_p = torch.tensor([[0.0, 0.5, -0.5, 0.5, -0.5]], requires_grad=True)
    advantage = torch.tensor([[1.0, 1, 1, -1, -1]])
    loss = common.clipped_policy_loss(log_p, torch.zeros(1, 5), advantage, 0.2, 0.28)
    up, down = math.exp(0.5), math.exp(-0.5)
    assert torch.allclose(loss, torch.tensor([[-1, -1.28, -down, up, 0.8]]))
    loss.sum().backward()       # no gradient where the ratio is beyond the clip on the good side of the advantage
    assert torch.allclose(log_p.grad, torch.tensor([[-1, 0, -down, up, 0]]))


def test_dpo_loss():
    policy = torch.tensor([-3.0, -5.0], requires_grad=True)
    loss = common.dpo_loss(policy[:1], policy[1:], torch.tensor([-4.0]), torch.tensor([-4.0]), beta=0.5)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)))
    loss.sum().backward()
    assert torch.allclose(policy.grad, torch.tensor([-1.0, 1]) * 0.5 * torch.sigmoid(torch.tensor(-1.0)))
    same = common.dpo_loss(policy[:1], policy[1:], policy[:1], policy[1:])
    assert same.item() == pytest.approx(math.log(2))
    policy.grad = None
    same.sum().backward()       # the reference carries no gradient, or the two would cancel
    assert torch.allclose(policy.grad, torch.tensor([-0.05, 0.05]))


def test_log_probs_sum_to_the_cross_entropy():
    logits, tokens = torch.randn(3, 4, V), torch.randint(V, (3, 4))
    mask = torch.ones(3, 4, dtype=torch.bool)
    mean = -common.sequence_log_probs(logits, tokens, mask).sum() / 12
    assert mean.item() == pytest.approx(F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).item(), rel=1e-6)
