"""CEED-VLA: Jacobi decoding against greedy decoding, the consistency loss's stop-gradient, mixed labels."""
import pytest
import torch
import torch.nn.functional as F
from conftest import load_method

import common

ceed = load_method("ceed_vla")


@pytest.fixture(scope="module")
def policy():
    """An untrained policy with large weights, so that its answers depend on the tokens before."""
    torch.manual_seed(0)
    net = ceed.Policy(16, 2, 7, 8, 6)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(4)
    context = torch.randn(40, 8), torch.randint(2, (40,))
    return lambda tokens: net(*context, tokens)


def successor(tokens):
    """A model whose token is the one before plus one, mod 7, the first being 3: settles one token an iteration."""
    before = F.pad(tokens[:, :-1], (1, 0), value=2)
    return F.one_hot((before + 1) % 7, 7).float()


def test_policy_is_causal():
    torch.manual_seed(0)
    net = ceed.Policy(16, 2, 7, 8, 6)
    tokens, context = torch.randint(7, (1, 6)), (torch.randn(1, 8), torch.tensor([1]))
    for i in range(6):
        other = tokens.clone()
        other[0, i] = (other[0, i] + 1) % 7
        changed = (net(*context, other) - net(*context, tokens)).abs().amax(2)[0] > 1e-7
        assert changed.tolist() == [False] * (i + 1) + [True] * (5 - i)


def test_fixed_point_is_greedy_decoding_from_any_start(policy):
    expected, forwards = ceed.greedy(policy, torch.zeros(40, 6, dtype=torch.long))
    assert (forwards == 6).all()
    assert torch.unique(expected, dim=0).shape[0] > 20, "the contexts should matter"
    for seed in range(3):
        torch.manual_seed(seed)
        states, forwards = ceed.jacobi(policy, torch.randint(7, (40, 6)))
        assert torch.equal(states[:, -1], expected)
        assert forwards.min() >= 2 and forwards.max() <= 7
        assert forwards.unique().numel() > 1, "rows converge after different numbers of forwards"


def test_every_iteration_settles_one_more_token(policy):
    states, _ = ceed.jacobi(policy, torch.randint(7, (40, 6)))
    for j in range(states.shape[1]):
        assert torch.equal(states[:, j, :j], states[:, -1, :j])


def test_forwards_count_the_confirming_pass():
    """The chain 3456... from all zeros needs n iterations and one more; from its answer one; half right: the rest."""
    answer = torch.tensor([[3, 4, 5, 6, 0]])
    assert ceed.jacobi(successor, torch.full((1, 5), 2))[1].item() == 6
    assert ceed.jacobi(successor, answer)[1].item() == 1
    half = torch.tensor([[3, 4, 5, 2, 2]])
    states, forwards = ceed.jacobi(successor, torch.cat([answer, half]))
    assert forwards.tolist() == [1, 3] and torch.equal(states[:, -1], answer.expand(2, 5))
    assert states[1].tolist() == [[3, 4, 5, 2, 2], [3, 4, 5, 6, 3], [3, 4, 5, 6, 0], [3, 4, 5, 6, 0]]


def test_early_exit_is_a_prefix_of_the_trajectory(policy):
    start = torch.randint(7, (40, 6))
    states, forwards = ceed.jacobi(policy, start)
    for e in (1, 2, 4):
        short, count = ceed.jacobi(policy, start, e)
        assert torch.equal(short, states[:, :e + 1])
        assert torch.equal(count, forwards.clamp_max(e))
    assert torch.equal(ceed.jacobi(policy, start, 100)[0], states)


def test_consistency_loss_is_the_forward_kl_with_a_fixed_target():
    torch.manual_seed(0)
    state, fixed = (torch.randn(4, 6, 7, requires_grad=True) for _ in range(2))
    loss = ceed.consistency_loss(state, fixed)
    p, q = torch.distributions.Categorical(logits=fixed), torch.distributions.Categorical(logits=state)
    assert loss.item() == pytest.approx(torch.distributions.kl_divergence(p, q).sum().item() / 4, rel=1e-5)
    loss.backward()
    assert fixed.grad is None
    assert torch.allclose(state.grad, (state.softmax(-1) - fixed.softmax(-1)).detach() / 4, atol=1e-6)


def test_consistency_loss_starts_behind_the_first_difference():
    torch.manual_seed(0)
    net, context = ceed.Policy(16, 2, 7, 8, 6), (torch.randn(1, 8), torch.tensor([0]))
    fixed = torch.randint(7, (1, 6))
    state = fixed.clone()
    state[0, 3] = (state[0, 3] + 1) % 7
    logits, target = net(*context, state), net(*context, fixed)
    assert ceed.consistency_loss(logits[:, :4], target[:, :4]).item() == pytest.approx(0, abs=1e-6)
    assert ceed.consistency_loss(logits, target).item() > 1e-6
    assert ceed.consistency_loss(target, target).item() == 0


def test_autoregressive_loss_is_the_log_likelihood_of_the_chunk():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 6, 7), torch.randint(7, (3, 6))
    expected = -torch.distributions.Categorical(logits=logits).log_prob(labels).sum(1).mean()
    assert ceed.autoregressive_loss(logits, labels).item() == pytest.approx(expected.item(), rel=1e-5)


def test_mixed_labels_replace_whole_chunks_beyond_the_threshold():
    fixed = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    truth = torch.tensor([[0, 0, 0, 8], [4, 4, 4, 4], [0, 0, 0, 1]])
    labels, replaced = ceed.mixed_labels(fixed, truth, lambda t: t.view(3, 2, 2) / 4, 0.5)
    assert replaced.tolist() == [False, True, False]        # mean distances 0.5, 1 and 0.06; 0.5 is not beyond 0.5
    assert torch.equal(labels, torch.where(replaced[:, None], truth, fixed))


def test_states_are_drawn_from_before_the_fixed_point():
    torch.manual_seed(0)
    trajectories = torch.arange(5).view(1, 5, 1).expand(3000, 5, 2).clone()
    trajectories[:1000, 2:] = 2         # fixed after two
    trajectories[1000:2000] = 0         # the start is the fixed point
    lengths = torch.tensor([2, 0, 4]).repeat_interleave(1000)
    drawn = ceed.unsettled_state(trajectories, lengths)[:, 0].view(3, 1000)
    assert drawn[0].unique().tolist() == [0, 1] and drawn[1].unique().tolist() == [0]
    assert drawn[2].unique().tolist() == [0, 1, 2, 3]
    assert (torch.bincount(drawn[2]) - 250).abs().max() < 60


def test_supervised_arm_never_sees_a_trajectory_and_the_target_is_the_student(monkeypatch):
    """Without consistency a broken trajectory does no harm; with it the target comes from the student on Y*."""
    torch.manual_seed(0)
    cfg = ceed.Config(steps=2, batch=4)
    net, contexts = ceed.Policy(16, 2, 7, 8, 6), (torch.randn(8, 8), torch.randint(2, (8,)))
    labels, nothing = torch.randint(7, (8, 6)), torch.empty(0)
    student = ceed.distil(cfg, "a", net, contexts, nothing, torch.zeros(8), labels, False)
    assert any((a != b).any() for a, b in zip(student.parameters(), net.parameters()))

    seen = []
    monkeypatch.setattr(ceed, "consistency_loss", lambda a, b: seen.append((a, b)) or a.sum() * 0)
    trajectories = torch.randint(7, (8, 3, 6))
    ceed.distil(cfg, "b", net, contexts, trajectories, torch.full((8,), 2), labels)
    assert len(seen) == 2 and all(a.requires_grad and not b.requires_grad for a, b in seen)
    with common.seeded(10007):
        pick = torch.randint(8, (4,))
    with torch.no_grad():
        expected = net(*(c[pick] for c in contexts), trajectories[pick, -1])
    assert torch.allclose(seen[0][1], expected, atol=1e-6)
