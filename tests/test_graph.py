"""The domain of graphs: block models, splits, hidden nodes, propagation, counts of inference, graphs from files."""
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import inline

import common
from toy_data import graph


def model(seed=0, **options):
    with common.seeded(seed):
        return graph.block_model(**options)


@pytest.mark.parametrize("homophily", [0.2, 0.75, 1.0])
@pytest.mark.parametrize("degree", [5.0, 12.0])
def test_block_model_has_the_degree_and_homophily_asked_for(homophily, degree):
    g = model(nodes=4000, degree=degree, homophily=homophily)
    same = (g.y[g.edges[0]] == g.y[g.edges[1]]).float().mean().item()
    assert same == pytest.approx(homophily, abs=0.02)
    assert 2 * g.edges.shape[1] / 4000 == pytest.approx(degree, rel=0.03)
    assert torch.equal(torch.bincount(g.y), torch.full((5,), 800))


def test_edges_are_simple():
    edges = torch.tensor([[3, 1, 2, 2, 0], [1, 3, 2, 0, 2]])
    assert graph.simple(edges, 4).tolist() == [[0, 1], [2, 3]]
    g = model(nodes=60, degree=20.0, train=3, val=3)        # dense: many repeats are drawn
    assert (g.edges[0] < g.edges[1]).all() and g.edges.unique(dim=1).shape == g.edges.shape


def test_a_block_model_is_a_function_of_the_seed():
    assert model(3).key == model(3).key != model(4).key
    changed = copy.copy(model(3))
    changed.val = changed.val[1:]
    assert changed.key != model(3).key


def test_class_words_are_more_frequent_by_their_rate():
    y = torch.arange(20_000) % 2
    with common.seeded(0):
        x = graph.words_of(y, words=40, class_words=10, base=0.1, rate=0.4)
    for c in range(2):
        frequency = x[y == c].mean(0).sort()[0]
        torch.testing.assert_close(frequency, torch.tensor([0.1] * 30 + [0.4] * 10), rtol=0, atol=0.025)


def test_noise_mixes_from_the_features_to_none_of_them():
    g = model()
    with common.seeded(1):
        assert torch.equal(graph.noisy(g.x, 0.0), g.x)
        half, pure = graph.noisy(g.x, 0.5), graph.noisy(g.x, 1.0)

    def correlation(a):
        return torch.corrcoef(torch.stack([a.flatten(), g.x.flatten()]))[0, 1].item()
    assert correlation(half) == pytest.approx(0.5**0.5, abs=0.01) and correlation(pure) == pytest.approx(0, abs=0.01)
    assert pure.mean() == pytest.approx(g.x.mean().item(), abs=0.01) and pure.std() == pytest.approx(g.x.std().item(), abs=0.01)


def test_split_takes_so_many_of_each_class_and_leaves_unknown_labels_out():
    y = torch.cat([torch.arange(3).repeat_interleave(30), torch.full((10,), -1)])
    with common.seeded(0):
        train, val, test = graph.split(y, 4, 6)
    assert torch.equal(torch.bincount(y[train]), torch.full((3,), 4)) and torch.equal(torch.bincount(y[val]), torch.full((3,), 6))
    assert sorted(torch.cat([train, val, test]).tolist()) == list(range(90))
    for counts, said in (((25, 6), "class 0 has 30"), ((20, 10), "left to test")):
        with pytest.raises(common.UserError, match=said):
            graph.split(y, *counts)


def test_hidden_nodes_have_no_edges_and_do_not_reach_the_others():
    g = model(nodes=300, train=5, val=5)
    with common.seeded(0):
        seen, observed, hidden = graph.hide(g, 0.2)
    assert len(hidden) == 50 and torch.isin(hidden, g.test).all()
    assert sorted(torch.cat([observed, hidden]).tolist()) == list(range(300))
    assert not torch.isin(seen, hidden).any()
    kept = ~torch.isin(g.edges, hidden).any(0)
    assert torch.equal(seen, g.edges[:, kept])
    net, adjacency, x = common.GCN(200, 8, 5), graph.propagation(seen, 300), g.x.clone()
    before = net(x, adjacency)
    x[hidden] += 1
    after = net(x, adjacency)
    torch.testing.assert_close(after[observed], before[observed])
    torch.testing.assert_close(after[hidden], net.layers[0](x[hidden]).relu() @ net.head.weight.T + net.head.bias)


@pytest.mark.parametrize("kind", ["symmetric", "mean"])
def test_propagation_is_the_dense_formula(kind):
    edges = torch.tensor([[0, 1, 1], [1, 2, 3]])        # node 4 is isolated
    a = torch.eye(5)
    a[edges[0], edges[1]] = a[edges[1], edges[0]] = 1
    d = torch.diag(a.sum(1))
    dense = d.inverse() @ a if kind == "mean" else d.inverse().sqrt() @ a @ d.inverse().sqrt()
    torch.testing.assert_close(graph.propagation(edges, 5, kind).to_dense(), dense)


def test_gcn_is_the_formula_in_value_and_gradient_and_an_mlp_without_a_graph():
    g = model(nodes=100, train=2, val=2)
    net, adjacency = common.GCN(200, 16, 5, depth=3), graph.propagation(g.edges, 100)
    with torch.no_grad():
        for layer in (*net.layers, net.head):
            layer.bias.normal_()
    weights = [(layer.weight, layer.bias) for layer in (*net.layers, net.head)]
    for matrix in (adjacency.to_dense(), torch.eye(100)):
        h = g.x
        for i, (w, b) in enumerate(weights):
            h = matrix @ h @ w.T + b
            h = h.relu() if i < 2 else h
        found = net(g.x, adjacency) if matrix is not None and matrix[0, 0] < 1 else net(g.x)
        torch.testing.assert_close(found, h, rtol=1e-4, atol=1e-4)
        gradients = [torch.autograd.grad(F.cross_entropy(z, g.y), net.layers[0].weight)[0] for z in (found, h)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert net.hidden(g.x, adjacency).shape == (100, 16)


def test_counts_of_inference_by_hand():
    path = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]])       # 0 - 1 - 2 - 3 - 4
    assert graph.inference_cost([7, 3, 2]) == dict(neighbours=0.0, macs=7 * 3 + 3 * 2)
    middle = graph.inference_cost([7, 3, 2], path, torch.tensor([2]))
    assert middle["neighbours"] == 4
    # layer 2: sum of 3 hidden vectors of 3, then 3 x 2, or 3 products of 3 x 2 and a sum of 3 vectors of 2: 9 + 6 < 18 + 6
    # layer 1 at nodes 1, 2, 3, each with 3 terms: 5 products of 7 x 3 and 9 sums of 3, or 9 sums of 7 and 3 products
    assert middle["macs"] == min(9 + 6, 18 + 6) + min(5 * 21 + 9 * 3, 9 * 7 + 3 * 21)
    assert graph.inference_cost([7, 3, 2], path, torch.tensor([0]))["neighbours"] == 2
    assert graph.inference_cost([7, 3, 2], path, torch.tensor([0, 2]))["neighbours"] == 3
    assert graph.inference_cost([7, 3, 2], path, torch.tensor([9]))["neighbours"] == 0      # no edge at all
    assert graph.inference_cost([7, 3], path, torch.tensor([1]))["neighbours"] == 2


def test_layout_puts_a_node_between_the_classes_around_it():
    g = model()
    places = graph.layout(g.edges, g.y)
    assert places.shape == (1500, 2) and places.norm(dim=1).max() <= 1.0001
    centre = torch.stack([places[g.y == c].mean(0) for c in range(5)])
    assert (torch.cdist(places, centre).argmin(1) == g.y).float().mean() > 0.9


# ------------------------------------------------------------------------------------------- files

GOOD = dict(x_data=np.ones(6, np.float32), x_indices=np.array([0, 2, 1, 2, 0, 1]), x_indptr=np.array([0, 2, 3, 4, 4, 5, 6]),
            x_shape=np.array([6, 3]), edges=np.array([[0, 1, 2, 4], [1, 0, 2, 5]]), labels=np.array([0, 1, 0, 1, -1, 0]),
            train_idx=np.array([0, 1]), val_idx=np.array([2]), test_idx=np.array([3, 5]))


def saved(tmp_path, **changes):
    np.savez(tmp_path / "mine.npz", **{k: v for k, v in (GOOD | changes).items() if v is not None})
    return str(tmp_path / "mine.npz")


def test_a_good_file_is_read(tmp_path):
    g = graph.read(saved(tmp_path))
    assert g.x.tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0]]
    assert g.edges.tolist() == [[0, 4], [1, 5]] and g.classes == 2 and g.y.tolist() == [0, 1, 0, 1, -1, 0]
    assert (g.train.tolist(), g.val.tolist(), g.test.tolist()) == ([0, 1], [2], [3, 5])


@pytest.mark.parametrize("changes, said", [
    *[({key: None}, f"no array '{key}'") for key in GOOD],
    *[({key: GOOD[key][:0]}, f"'{key}' is empty") for key in ("x_data", "x_indices", "labels", "train_idx", "val_idx", "test_idx")],
    (dict(edges=np.zeros((2, 0), int)), "'edges' is empty"),
    (dict(edges=np.ones((2, 3), int)), "self-loops only"),
    (dict(edges=np.zeros((4, 2), int)), "must be (2, E), got (4, 2)"),
    (dict(edges=np.zeros(4, int)), "1 dimensions"),
    (dict(edges=np.array([[0], [6]])), "'edges' must lie in 0..5, found 0..6"),
    (dict(edges=np.array([[0], [-1]])), "found -1..0"),
    (dict(edges=np.array([[0.0], [1.0]])), "integers are needed"),
    (dict(labels=GOOD["labels"] - 1), "'labels' must lie in -1..5, found -2..0"),
    (dict(labels=GOOD["labels"] + 9), "found 8..10"),
    (dict(labels=GOOD["labels"][:4]), "4 labels for 6 nodes"),
    (dict(labels=GOOD["labels"][:, None]), "2 dimensions"),
    (dict(train_idx=np.array([0, 6])), "'train_idx' must lie in 0..5"),
    (dict(train_idx=np.array([0, 4])), "'train_idx' holds node 4, whose label is unknown"),
    (dict(train_idx=np.array([0, 0])), "'train_idx' holds a node twice"),
    (dict(test_idx=np.array([3, 2])), "'test_idx' holds a node twice or one that is in another split"),
    (dict(test_idx=np.array([3])), "at least 2"),
    (dict(x_shape=np.array([6, 2])), "'x_indices' must lie in 0..1"),
    (dict(x_shape=np.array([7, 3])), "'x_indptr' must rise from 0 to 6 in 8 numbers"),
    (dict(x_shape=np.array([6, 3, 1])), "the two numbers N, F"),
    (dict(x_shape=np.array([2**30, 2**30])), "too many"),
    (dict(x_indptr=np.array([0, 2, 1, 4, 4, 5, 6])), "'x_indptr' must rise"),
    (dict(x_indptr=np.array([0, 2, 3, 4, 4, 5, 5])), "'x_indptr' must rise"),
    (dict(x_indices=GOOD["x_indices"][:5]), "5 x_indices for 6 x_data"),
    (dict(x_data=np.full(6, np.nan, np.float32)), "NaN"),
    (dict(x_data=np.array(list("abcdef"))), "numbers are needed"),
])
def test_bad_files_are_refused_in_one_line(changes, said, tmp_path):
    path = saved(tmp_path, **changes)
    with pytest.raises(common.UserError) as error:
        graph.read(path)
    assert said in str(error.value) and path in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["glnn", "ff_g2m"])
def test_scripts_refuse_other_data_in_one_line(name, tmp_path):
    for data, said in (("no_such_graph", "no such graph (possible: graph"), ("shapes", "no array 'x_shape'"),
                       (saved(tmp_path, labels=None), "no array 'labels'")):
        done = inline(name, "--smoke", "--out", tmp_path, "--data", data)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and said in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["glnn", "ff_g2m"])
def test_scripts_run_on_a_graph_from_a_file(name, tmp_path):
    done = inline(name, "--smoke", "--threads", "1", "--out", tmp_path, "--data", saved(tmp_path))
    assert done.returncode == 0, done.stderr


def test_cora():
    if common.find_data("cora") is None:
        pytest.skip("cora.npz is not in the folder $DISTILL_DATA")
    g = graph.read("cora")
    assert g.x.shape == (2708, 1433) and g.edges.shape == (2, 5278) and g.classes == 7
    assert (len(g.train), len(g.val), len(g.test)) == (140, 500, 1000)
    assert torch.equal(torch.bincount(g.y[g.train]), torch.full((7,), 20))
    assert ((g.y[g.edges[0]] == g.y[g.edges[1]]).float().mean() - 0.81).abs() < 0.005      # its known edge homophily
    assert g.x.sum() == 49216
