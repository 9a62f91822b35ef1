"""FF-G2M: both edge losses by hand, their limits, where gradients flow, the gaps, what the students are given."""
import pytest
import torch
import torch.nn.functional as F
from conftest import load_method

import common

ff = load_method("ff_g2m")
graphs = ff.graphs
EDGES = torch.tensor([[0, 0, 1, 2, 3], [1, 2, 2, 3, 4]])       # node 5 is isolated
BOTH, LOOPS = graphs.directed(EDGES), graphs.directed(EDGES, 6)


def logits(seed=0):
    generator = torch.Generator().manual_seed(seed)
    pair = 2 * torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    return tuple(x.clone().requires_grad_() for x in pair)


def kl(p, q):
    return sum(a * (a.log() - b.log()) for a, b in zip(p, q))


def test_low_frequency_loss_is_the_students_node_against_the_teachers_neighbour():
    z, h = logits()
    one = torch.tensor([[2], [4]])
    torch.testing.assert_close(ff.low_frequency_loss(z, h.log_softmax(1), one), kl(h[4].softmax(0), z[2].softmax(0)))
    by_hand = sum(kl(h[j].softmax(0), z[i].softmax(0)) for i, j in LOOPS.T.tolist()) / 16
    torch.testing.assert_close(ff.low_frequency_loss(z, h.log_softmax(1), LOOPS), by_hand)


def test_its_target_is_the_mean_of_the_neighbourhood_weighted_by_degree():
    z, h = logits()
    gradient, = torch.autograd.grad(ff.low_frequency_loss(z, h.log_softmax(1), LOOPS), z)
    mean = graphs.propagation(EDGES, 6, "mean").double() @ h.softmax(1)
    size = torch.tensor([3, 3, 4, 3, 2, 1])[:, None]        # degree + 1
    torch.testing.assert_close(gradient, size * (z.softmax(1) - mean) / 16)


def test_on_self_loops_alone_it_is_the_loss_of_glnn():
    z, h = logits()
    found = ff.low_frequency_loss(z, h.log_softmax(1), torch.arange(6).expand(2, -1))
    torch.testing.assert_close(found, F.kl_div(z.log_softmax(1), h.softmax(1), reduction="batchmean"))


def test_high_frequency_loss_by_hand():
    z, h = logits()
    tau = 1.3
    by_hand = sum(kl(((h[i] - h[j]).abs() / tau).softmax(0), ((z[i] - z[j]).abs() / tau).softmax(0))
                  for i, j in BOTH.T.tolist()) / 10
    torch.testing.assert_close(ff.high_frequency_loss(z, h, BOTH, tau), by_hand)
    torch.testing.assert_close(ff.high_frequency_loss(z, h, EDGES, tau), by_hand)       # symmetric in the ends


def test_differences_have_no_sign_and_lose_a_common_field_but_not_a_nodes_own():
    z, h = logits()
    before = ff.high_frequency_loss(z, h, EDGES, 1.5)
    common_field = torch.randn(4, dtype=torch.float64)
    torch.testing.assert_close(ff.high_frequency_loss(common_field - z, h, EDGES, 1.5), before)
    own = torch.arange(6)[:, None]
    assert (ff.high_frequency_loss(z + own, h, EDGES, 1.5) - before).abs() > 1e-3
    torch.testing.assert_close(ff.edge_differences(3 * z, EDGES, 4.5), ff.edge_differences(z, EDGES, 1.5))


def test_high_frequency_gradient_reaches_both_ends_and_nothing_else():
    z, h = logits()
    ff.high_frequency_loss(z, h, EDGES[:, :1], 1.5).backward()
    assert h.grad is None
    torch.testing.assert_close(z.grad[0], -z.grad[1])
    assert z.grad[0].abs().sum() > 1e-3 and not z.grad[2:].any()
    p, q = (ff.edge_differences(x.detach(), EDGES[:, :1], 1.5).exp()[0] for x in (z, h))
    torch.testing.assert_close(z.grad[0], (z[0] - z[1]).detach().sign() * (p - q) / 1.5)


def test_self_loops_give_no_difference_and_no_gradient():
    z, h = logits()
    loss = ff.high_frequency_loss(z, h, torch.arange(6).expand(2, -1), 1.5)
    assert loss == 0 and not torch.autograd.grad(loss, z)[0].any()
    torch.testing.assert_close(ff.high_frequency_loss(z, h, LOOPS, 1.5) * 16, ff.high_frequency_loss(z, h, BOTH, 1.5) * 10)


def test_no_gradient_reaches_the_teacher_and_a_perfect_student_has_no_loss():
    z, h = logits()
    ff.low_frequency_loss(z, h.log_softmax(1), LOOPS).backward()
    assert h.grad is None
    assert ff.high_frequency_loss(h, h, BOTH, 1.5).abs() < 1e-12
    same = h[:1].expand(6, -1)      # all nodes alike: then the low-frequency loss can vanish as well
    assert ff.low_frequency_loss(same, same.log_softmax(1), LOOPS).abs() < 1e-12
    assert ff.low_frequency_loss(h, h.log_softmax(1), LOOPS) > 0.1


def test_low_frequency_gap_looks_at_neighbourhood_means_up_to_scale():
    z, h = (x.detach() for x in logits())
    average, nodes = graphs.propagation(EDGES, 6, "mean").double(), torch.tensor([0, 5])
    def cosine(a, b):
        return (a @ b / a.norm() / b.norm()).item()
    expected = 1 - (cosine(z[:3].mean(0), h[:3].mean(0)) + cosine(z[5], h[5])) / 2
    assert ff.low_frequency_gap(z, h, average, nodes).item() == pytest.approx(expected)
    assert ff.low_frequency_gap(7 * h, h, average, nodes).abs() < 1e-12


def test_arms_get_their_terms_and_no_hidden_node(monkeypatch):
    """run() hands each arm its loss, in the numbers of the observed nodes, and the terms have their weights."""
    cfg = ff.Config(device="cpu", width=8, teacher_steps=5, lamb=0.3)
    cfg.context.state = None
    losses = {}

    def note(cfg, name, data, observed, loss, *_):
        losses[name] = loss
        note.data, note.observed = data, observed
        return lambda x: torch.randn(len(x), data.classes)
    monkeypatch.setattr(ff, "train_student", note)
    log = common.Log(cfg, None)
    with common.seeded(0):
        ff.run(cfg, log)
    data, observed = note.data, note.observed
    with common.seeded(0):      # the teacher's targets again
        graph = graphs.block_model()
        seen, again, _ = graphs.hide(graph, cfg.hidden_share)
        teacher = ff.train_teacher(cfg, graph, graphs.propagation(seen, 1500))
    assert graph.key == data.key and torch.equal(observed, again)
    h, z = teacher(data.x, graphs.propagation(seen, 1500)), torch.randn(1500, 5)
    hard = F.cross_entropy(z[data.train], data.y[data.train])
    loops, both = observed.expand(2, -1), graphs.directed(seen)
    node = ff.low_frequency_loss(z, h.log_softmax(1), loops)
    low = ff.low_frequency_loss(z, h.log_softmax(1), torch.cat([both, loops], 1))
    high = ff.high_frequency_loss(z, h, both, cfg.tau)
    expected = {"MLP": hard, "GLNN": 0.3 * hard + 0.7 * node, "LFD only": 0.3 * hard + 0.7 * low,
                "HFD only": 0.3 * hard + 0.7 * high, "FF-G2M": 0.3 * hard + 0.7 * (low + high)}
    assert set(losses) == set(expected)
    for arm, value in expected.items():
        torch.testing.assert_close(sum(losses[arm](z[observed]).values()), value)
    assert log.arms["FF-G2M"]["neighbours"] == 0 < log.arms["GCN (teacher)"]["neighbours"]
