"""GLNN: the direction and the gradient of the soft term, its weights, the cut score, the kept state, what training sees."""
import pytest
import torch
import torch.nn.functional as F
from conftest import load_method

import common

glnn = load_method("glnn")
graphs = glnn.graphs


def logits(seed=0, n=6, classes=4):
    generator = torch.Generator().manual_seed(seed)
    pair = 2 * torch.randn(2, n, classes, generator=generator, dtype=torch.float64)
    return tuple(x.clone().requires_grad_() for x in pair)


def test_soft_term_is_kl_from_the_teacher_averaged_over_nodes():
    s, t = logits()
    log_s, log_z = s.log_softmax(1), t.log_softmax(1)
    by_hand = sum((log_z[v, k].exp() * (log_z[v, k] - log_s[v, k])) for v in range(6) for k in range(4)) / 6
    torch.testing.assert_close(glnn.soft_label_loss(s, log_z), by_hand)
    reverse = (log_s.exp() * (log_s - log_z)).sum(1).mean()
    assert (by_hand - reverse).abs() > 0.01     # so the direction is tested


def test_gradient_is_s_minus_z_and_does_not_reach_the_teacher():
    s, t = logits()
    glnn.soft_label_loss(s, t.log_softmax(1)).backward()
    torch.testing.assert_close(s.grad, (s.softmax(1) - t.softmax(1)).detach() / 6)
    assert t.grad is None


def test_certain_teachers_are_labels_and_a_perfect_student_has_no_loss():
    s, t = logits()
    labels = torch.arange(6) % 4
    certain = (1e3 * F.one_hot(labels, 4)).double().log_softmax(1)
    torch.testing.assert_close(glnn.soft_label_loss(s, certain), F.cross_entropy(s, labels))
    assert glnn.soft_label_loss(t, t.log_softmax(1)).abs() < 1e-12
    shifted = t + torch.arange(6)[:, None]      # logits matter up to a constant a node
    assert glnn.soft_label_loss(shifted, t.log_softmax(1)).abs() < 1e-12


def test_lamb_weighs_the_labels_and_their_gradient():
    s, t = logits()
    labelled, labels = s[:3], torch.tensor([1, 0, 3])
    hard, soft = F.cross_entropy(labelled, labels), glnn.soft_label_loss(s, t.log_softmax(1))
    for lamb in (0.0, 0.3, 1.0):
        torch.testing.assert_close(glnn.glnn_loss(labelled, labels, s, t.log_softmax(1), lamb), lamb * hard + (1 - lamb) * soft)
    parts = torch.autograd.grad(glnn.glnn_loss(s, torch.arange(6) % 4, t, t.log_softmax(1).detach(), 1.0), [s, t])
    assert parts[0].abs().sum() > 0 and not parts[1].any()      # lamb = 1: an MLP on the labels


def test_cut_score_is_the_trace_formula():
    edges = torch.tensor([[0, 0, 1, 2, 4], [1, 2, 2, 3, 5]])
    s = logits()[0].softmax(1).detach()
    a = torch.zeros(6, 6, dtype=torch.float64)
    a[edges[0], edges[1]] = a[edges[1], edges[0]] = 1
    expected = torch.trace(s.T @ a @ s) / torch.trace(s.T @ a.sum(1).diag() @ s)
    torch.testing.assert_close(glnn.min_cut_score(s, edges), expected)


def test_cut_score_is_the_share_of_edges_that_certain_predictions_keep():
    edges = torch.tensor([[0, 0, 1, 2, 3], [1, 2, 2, 3, 4]])
    s = F.one_hot(torch.tensor([0, 0, 1, 1, 1]), 2).float()
    assert glnn.min_cut_score(s, edges) == pytest.approx(3 / 5)       # these edges keep, 0-2 and 1-2 do not
    assert glnn.min_cut_score(torch.full((5, 2), 0.5), edges) == 1


def test_the_best_state_is_kept_and_a_tie_goes_to_the_later():
    net, best, best_acc = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1), torch.zeros(())
    for acc, weight, kept in ((0.5, 1.0, 1.0), (0.4, 2.0, 1.0), (0.5, 3.0, 3.0), (0.6, 4.0, 4.0), (0.1, 5.0, 4.0)):
        torch.nn.init.constant_(net.weight, weight)
        glnn.keep_best(net, best, best_acc, torch.tensor(acc))
        assert (best.weight == kept).all()
    assert best_acc == pytest.approx(0.6) and best.weight.requires_grad and best.weight is not net.weight


@pytest.fixture(scope="module")
def small():
    cfg = glnn.Config(steps=20, teacher_steps=20, batch=64, width=16, device="cpu")
    with common.seeded(0):
        data = graphs.block_model(nodes=400, train=5, val=10)
        seen, observed, hidden = graphs.hide(data, 0.2)
    return cfg, data, graphs.propagation(seen, 400), observed, hidden


def test_teacher_sees_neither_hidden_nodes_nor_labels_outside_train_and_val(small):
    cfg, data, adjacency, _, hidden = small
    with common.seeded(1):
        teacher = glnn.train_teacher(cfg, data, adjacency)
    other = graphs.Graph(**{k: v.clone() for k, v in vars(data).items()})
    other.x[hidden] = torch.rand(len(hidden), 200)
    other.y[other.test] = (other.y[other.test] + 1) % 5
    with common.seeded(1):
        again = glnn.train_teacher(cfg, other, adjacency)
    for a, b in zip(teacher.parameters(), again.parameters()):
        torch.testing.assert_close(a, b)
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.training


def test_students_see_only_the_nodes_they_are_given(small):
    cfg, data, _, observed, hidden = small
    log_probs = torch.randn(400, 5, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    changed = log_probs.clone()
    changed[hidden] = torch.randn(len(hidden), 5).log_softmax(1)

    def train(targets, nodes, lamb):
        return glnn.train_student(cfg, "student", data, targets, nodes, lamb, 0.1, 1e-4)(data.x)
    assert torch.equal(train(log_probs, observed, 0.0), train(changed, observed, 0.0))
    assert not torch.equal(train(log_probs, torch.arange(400), 0.0), train(changed, torch.arange(400), 0.0))
    mlp = train(log_probs, data.train, 1.0)
    assert torch.equal(mlp, train(log_probs.flip(0), data.train, 1.0))        # lamb = 1 ignores the teacher
    with pytest.MonkeyPatch.context() as patch:         # lamb = 0 ignores the labels of the training nodes
        free = train(log_probs, observed, 0.0)
        patch.setattr(data, "y", data.y.index_fill(0, data.train, 0))
        assert torch.equal(train(log_probs, observed, 0.0), free)
        assert not torch.equal(train(log_probs, data.train, 1.0), mlp)
