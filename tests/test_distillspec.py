"""DistillSpec: the law of speculative decoding by enumeration and chi-square, its counts, losses and gradients."""
import itertools

import pytest
import torch
from conftest import load_method
from scipy.stats import chi2

import common

spec = load_method("distillspec")
V, EOS = 4, 3


def table(seed, sharp=2.0):
    """A Markov model: tokens (B, n) -> logits (B, n, V) that depend on the last token alone."""
    logits = sharp * torch.randn(V, V, generator=torch.Generator().manual_seed(seed), dtype=torch.double)

    def model(tokens):
        return logits[tokens.clamp_max(V - 1)]      # V stands for an end that never comes
    return model, logits.softmax(-1)


def enough(found, expected, n):
    """p-value of a chi-square test of counts found/n against probabilities."""
    cells = expected * n > 5
    rest = torch.stack([found[~cells].sum(), n * expected[~cells].sum()])
    statistic = ((found[cells] - n * expected[cells]).square() / (n * expected[cells])).sum()
    if rest[1] > 5:
        statistic = statistic + (rest[0] - rest[1]).square() / rest[1]
    return chi2.sf(statistic.item(), int(cells.sum()) - (rest[1] <= 5).item())


def decoded_law_fits(gamma, length=3, n=20_000, **options):
    """p-value of the completions of a fixed prompt against the exact law of the target."""
    (target, p), (draft, _) = table(0), table(1)
    torch.manual_seed(gamma)
    out = spec.speculative_decode(target, draft, torch.zeros(n, 1, dtype=torch.long), length, EOS, gamma, **options)[0]
    completions = torch.tensor([c for c in itertools.product(range(V), repeat=length)
                                if all(b == EOS for a, b in zip(c, c[1:]) if a == EOS)])
    law = torch.ones(len(completions), dtype=torch.double)
    before = torch.zeros(len(completions), dtype=torch.long)
    for token in completions.T:
        law *= torch.where(before == EOS, 1.0, p[before, token])
        before = token
    assert law.sum().item() == pytest.approx(1)
    found = (out[:, None] == completions).all(2).sum(0).double()
    assert found.sum() == n
    return enough(found, law, n)


@pytest.mark.parametrize("gamma", [1, 2, 5])
def test_what_comes_out_has_exactly_the_law_of_the_target(gamma):
    assert decoded_law_fits(gamma) > 1e-3


def test_the_chi_square_test_notices_a_draw_from_p_instead_of_the_residual():
    assert decoded_law_fits(2, residual=False) < 1e-12


def test_one_step_law_by_enumeration():
    """min(p, q) + P(rejection) residual = p for every token, the identity behind verify(), from its own residual."""
    torch.manual_seed(0)
    p, q = torch.rand(2, V, dtype=torch.double).softmax(-1)
    n = 200_000
    drafted = torch.multinomial(q, n, replacement=True)[:, None]
    accepted, token = spec.verify(p.expand(n, 2, V), q.expand(n, 1, V), drafted)
    assert accepted.double().mean().item() == pytest.approx(torch.minimum(p, q).sum().item(), abs=0.005)
    first = torch.where(accepted == 1, drafted[:, 0], token)
    assert enough(torch.bincount(first, minlength=V).double(), p, n) > 1e-3
    rejected = torch.bincount(token[accepted == 0], minlength=V).double()
    residual = (p - q).clamp_min(0)
    assert enough(rejected, residual / residual.sum(), (accepted == 0).sum().item()) > 1e-3


def test_equal_models_accept_everything_and_disjoint_ones_nothing():
    p = torch.tensor([0.5, 0.5, 0, 0]).expand(100, 3, V)
    q = torch.tensor([0, 0, 0.5, 0.5]).expand(100, 2, V)
    same, token = spec.verify(p, p[:, :2], torch.randint(2, (100, 2)))
    assert (same == 2).all() and (token < 2).all()
    none, token = spec.verify(p, q, torch.randint(2, 4, (100, 2)))
    assert (none == 0).all() and (token < 2).all()


@pytest.mark.parametrize("gamma", [1, 3])
def test_tokens_a_call_and_acceptance_against_the_product_of_kernels(gamma):
    """E[tokens of the first block] = 1 + sum_i P(first i accepted), with K(s, v) = min(p, q) as a matrix."""
    (target, p), (draft, q) = table(2, 1.0), table(3, 1.0)
    kernel, state, expected = torch.minimum(p, q), torch.eye(V, dtype=torch.double)[0], 1.0
    for _ in range(gamma):
        state = state @ kernel
        expected += state.sum().item()
    torch.manual_seed(gamma)
    n = 20_000
    prompts = torch.zeros(n, 1, dtype=torch.long)       # no token is an end, and only the first block fits
    _, calls, tested, accepted = spec.speculative_decode(target, draft, prompts, gamma + 1, V, gamma)
    one = calls == 1
    assert one.double().mean().item() == pytest.approx(state.sum().item(), abs=0.02)     # all of the block accepted
    assert (accepted[one] == gamma).all() and (tested[one] == gamma).all()
    out = spec.speculative_decode(target, draft, prompts, 1, V, gamma)
    assert (out[2] == 1).all() and out[3].double().mean().item() == pytest.approx(kernel[0].sum().item(), abs=0.02)
    emitted = 1 + (torch.rand(n, gamma) < 0).sum(1)     # from verify alone
    tokens, qs, ps = prompts, [], [p[prompts[:, 0]]]
    for _ in range(gamma):
        qs.append(q[tokens[:, -1]])
        tokens = torch.cat([tokens, torch.multinomial(qs[-1], 1)], 1)
        ps.append(p[tokens[:, -1]])
    emitted = 1 + spec.verify(torch.stack(ps, 1), torch.stack(qs, 1), tokens[:, 1:])[0]
    assert emitted.double().mean().item() == pytest.approx(expected, abs=0.03)


@pytest.fixture(scope="module")
def networks():
    """A target, a draft and prompts: tiny random transformers, far from uniform."""
    torch.manual_seed(0)
    target, draft = (common.Transformer(6, 8, 1, 2, 24).eval().requires_grad_(False) for _ in range(2))
    for net in (target, draft):
        net.head.weight.data.mul_(8)
    return target, draft, torch.randint(5, (12, 3))


def test_greedy_decoding_is_that_of_the_target(networks):
    target, draft, prompts = networks
    out, calls, tested, accepted = spec.speculative_decode(target, draft, prompts, 9, 5, 4, temperature=0)
    assert torch.equal(out, common.generate(target, prompts, 9, 5, temperature=0))
    size = common.answer_mask(out, 5).sum(1)
    assert (size >= calls).all() and (size <= 5 * calls).all()
    assert (accepted <= tested).all() and (tested <= size).all() and (size <= accepted + calls).all()


def test_the_draft_of_itself_needs_the_fewest_calls(networks):
    target, _, prompts = networks
    _, calls, tested, accepted = spec.speculative_decode(target, target, prompts, 9, 99, 2)
    assert torch.equal(calls, torch.full((12,), 3)) and torch.equal(tested, accepted)
    assert (tested == 6).all()      # 9 tokens: three blocks of two drafted tokens and one of the target


def test_nothing_counts_behind_the_end():
    def model(tokens):      # 0 1 2 3 3 3 ...
        return 50.0 * torch.eye(V)[(tokens + 1).clamp_max(EOS)]
    prompts = torch.zeros(1, 1, dtype=torch.long)
    out, calls, tested, accepted = spec.speculative_decode(model, model, prompts, 8, EOS, 5)
    assert out.tolist() == [[1, 2] + [EOS] * 6]
    assert (calls.item(), tested.item(), accepted.item()) == (1, 3, 3)


def logits(seed):
    return torch.randn(3, 5, V, generator=torch.Generator().manual_seed(seed), dtype=torch.double, requires_grad=True)


@pytest.mark.parametrize("name", spec.DIVERGENCES)
def test_losses_by_hand_and_their_gradients(name):
    z_p, z_q, mask = logits(0), logits(1), torch.rand(3, 5) < 0.7
    p, q = (z.detach() / 0.7 for z in (z_p, z_q))
    p, q = p.softmax(-1), q.softmax(-1)
    m = (p + q) / 2
    by_hand = {"FKL": p * (p / q).log(), "RKL": q * (q / p).log(), "TVD": (p - q).abs() / 2,
               "JSD": (p * (p / m).log() + q * (q / m).log()) / 2}[name].sum(-1)[mask].mean()
    loss = spec.distillation_loss(spec.DIVERGENCES[name], z_p, z_q, mask, temperature=0.7)
    assert loss.item() == pytest.approx(by_hand.item())
    loss.backward()
    assert z_p.grad is None and (z_q.grad[~mask] == 0).all() and (z_q.grad[mask].abs().sum(1) > 0).all()
    same = spec.distillation_loss(spec.DIVERGENCES[name], z_p, z_p, mask)
    assert abs(same.item()) < 1e-12


def test_total_variation_is_one_minus_the_acceptance_rate():
    z_p, z_q, mask = logits(2).detach(), logits(3).detach(), torch.ones(3, 5, dtype=torch.bool)
    accepted = torch.minimum(z_p.softmax(-1), z_q.softmax(-1)).sum(-1).mean().item()
    assert 1 - spec.distillation_loss(spec.DIVERGENCES["TVD"], z_p, z_q, mask).item() == pytest.approx(accepted)
    by_place, mean = spec.overlap(z_p, z_q, mask)
    assert mean == pytest.approx(accepted) == by_place.mean().item() and by_place.shape == (5,)


def test_total_variation_has_its_subgradient():
    """d/dz of 0.5 sum |p - q| = 0.5 q (s - E_q[s]) with s = sign(q - p)."""
    z_p, z_q = logits(4), logits(5)
    spec.distillation_loss(spec.DIVERGENCES["TVD"], z_p, z_q, torch.ones(3, 5, dtype=torch.bool)).backward()
    p, q = z_p.detach().softmax(-1), z_q.detach().softmax(-1)
    s = (q - p).sign()
    assert torch.allclose(z_q.grad, 0.5 * q * (s - (q * s).sum(-1, keepdim=True)) / 15)


def test_cross_entropy_is_forward_kl_to_a_one_hot_target():
    z, tokens, mask = logits(6), torch.randint(V, (3, 5)), torch.ones(3, 5, dtype=torch.bool)
    hard = 1e3 * torch.eye(V, dtype=torch.double)[tokens]
    assert spec.cross_entropy_loss(z, tokens, mask).item() == pytest.approx(
        spec.distillation_loss(common.forward_kl, hard, z, mask).item())


def test_pair_law_is_what_the_model_samples(networks):
    target, _, prompts = networks
    law = spec.pair_law(target, prompts[:1], 6)
    assert law.sum().item() == pytest.approx(1, abs=1e-5)
    torch.manual_seed(0)
    shares = spec.pair_shares(common.generate(target, prompts[:1].repeat(20_000, 1), 2, 99), 6)
    assert enough(20_000 * shares.double(), law.double(), 20_000) > 1e-3


def test_on_policy_training_reads_no_answers_and_leaves_both_models_alone(networks, monkeypatch):
    target, draft, prompts = networks
    cfg = spec.Config(steps=3, batch=4)
    before = [p.clone() for net in (target, draft) for p in net.parameters()]
    written = []
    generate = common.generate
    monkeypatch.setattr(common, "generate", lambda *a: written.append(generate(*a)) or written[-1])

    def weights(name, answers, **options):
        net = spec.train(cfg, name, target, draft, prompts, answers, 5, "FKL", **options)
        return torch.cat([p.flatten() for p in net.parameters()])
    zeros, ones = torch.zeros(12, 6, dtype=torch.long), torch.ones(12, 6, dtype=torch.long)
    assert torch.equal(weights("a", zeros, own=1.0), weights("b", ones, own=1.0)) and len(written) == 6
    assert not torch.equal(weights("c", zeros), weights("d", ones)) and len(written) == 6
    assert all(torch.equal(a, b) for a, b in zip(before, [p for net in (target, draft) for p in net.parameters()]))
