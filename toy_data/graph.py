"""Graphs whose nodes have features and labels: stochastic block models made on the fly, real graphs from a file.

    graph = block_model(1500, classes=5, degree=5.0, homophily=0.75)    # with a split: graph.train, .val, .test
    seen, observed, hidden = hide(graph, 0.2)                           # inductive: a fifth of the test nodes unseen
    adjacency = propagation(seen, len(graph.x))                         # what common.GCN multiplies with
    inference_cost([200, 128, 5], graph.edges, graph.test)              # counts of one prediction: GCN 200-128-5

A node keeps its number everywhere; hide() gives the edges among the observed nodes, and a hidden node is isolated in
them. Edges are (2, E) int64, undirected, each once with the smaller number first, no self-loops; propagation() adds
those. Random numbers come from torch's global stream on the CPU; all else works on the device of its tensors.
"""
import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.sparse
import torch

import common

FORMAT = ("x_data, x_indices, x_indptr, x_shape (features of the nodes in CSR form), edges (2, E), labels (N,) with "
          "-1 where unknown, train_idx, val_idx, test_idx")
DATA_HELP = ("'graph', a toy block model, or a graph in a .npz file, named by its path or by its name in the folder "
             f"$DISTILL_DATA, with the arrays {FORMAT}")


@dataclass
class Graph:
    """x (N, F) float32; y (N,) int64, -1 where unknown; edges (2, E); train, val, test: numbers of nodes, int64."""
    x: torch.Tensor
    y: torch.Tensor
    edges: torch.Tensor
    train: torch.Tensor
    val: torch.Tensor
    test: torch.Tensor

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.y.max()) + 1

    @property
    def key(self) -> str:
        """A hash of everything in it, a part of the key of cached teachers."""
        return common.digest(*(hashlib.sha256(t.cpu().numpy().tobytes()).hexdigest() for t in vars(self).values()))

    def to(self, device: torch.device | str) -> "Graph":
        """The same graph on a device."""
        return Graph(*(t.to(device) for t in vars(self).values()))


# ---------------------------------------------------------------------------------------------- block models

def block_edges(y: torch.Tensor, degree: float, homophily: float) -> torch.Tensor:
    """Random edges among nodes of equally likely classes y (N,): about N degree / 2 of them, a share `homophily` of
    which joins nodes of one class. Repeated edges and self-loops are dropped, so sparse graphs keep almost all."""
    n, classes = len(y), int(y.max()) + 1
    count = round(n * degree / 2)
    members = [(y == c).nonzero().flatten() for c in range(classes)]
    size = torch.tensor([len(m) for m in members])
    table = torch.nn.utils.rnn.pad_sequence(members, batch_first=True)
    source = torch.randint(n, (count,))
    other = (y[source] + torch.randint(1, max(2, classes), (count,))) % classes
    target_class = torch.where(torch.rand(count) < homophily, y[source], other)
    target = table[target_class, (torch.rand(count) * size[target_class]).long()]
    return simple(torch.stack([source, target]), n)


def simple(edges: torch.Tensor, n: int) -> torch.Tensor:
    """Edges (2, E) in any order and direction as undirected ones, each once, without self-loops."""
    low, high = edges.amin(0), edges.amax(0)
    code = torch.unique((low * n + high)[low != high])
    return torch.stack([code // n, code % n])


def words_of(y: torch.Tensor, words: int, class_words: int, base: float, rate: float) -> torch.Tensor:
    """Bags of words (N, words) of 0 and 1: each class has `class_words` words of its own choice, which occur with
    probability `rate`, all others with `base`. Classes may share words."""
    own = torch.rand(int(y.max()) + 1, words).argsort(1)[:, :class_words]
    probability = torch.full((len(own), words), base).scatter_(1, own, rate)
    return torch.bernoulli(probability[y])


def noisy(x: torch.Tensor, share: float) -> torch.Tensor:
    """(1 - share) x + share * Gaussian noise with the mean and standard deviation of x; share in [0, 1]."""
    return (1 - share) * x + share * (x.mean() + x.std() * torch.randn(x.shape).to(x.device))


def split(y: torch.Tensor, train: int, val: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A random split of the labelled nodes: `train` and `val` nodes of each class, and the rest to test.
    common.UserError if a class has fewer than train + val nodes or nothing is left to test."""
    order = torch.randperm(len(y)).to(y.device)
    rank = torch.full_like(y, train + val)
    for c in range(int(y.max()) + 1):
        members = order[y[order] == c]
        if len(members) < train + val:
            raise common.UserError(f"class {c} has {len(members)} labelled nodes; {train} to train and {val} to "
                                   "validate are asked for")
        rank[members] = torch.arange(len(members), device=y.device)
    known = y >= 0
    parts = known & (rank < train), known & (rank >= train) & (rank < train + val), known & (rank >= train + val)
    if not parts[2].any():
        raise common.UserError(f"no node is left to test after {train} to train and {val} to validate a class")
    return tuple(part.nonzero().flatten() for part in parts)


def block_model(nodes: int = 1500, classes: int = 5, degree: float = 5.0, homophily: float = 0.75, words: int = 200,
                class_words: int = 30, base: float = 0.03, rate: float = 0.13, noise: float = 0.0, train: int = 20,
                val: int = 30) -> Graph:
    """A stochastic block model with bags of words. degree: mean number of neighbours; homophily: share of the edges
    within a class; noise: see noisy(); train, val: labelled nodes a class; the rest: see words_of()."""
    y = torch.arange(nodes)[torch.randperm(nodes)] % classes
    x = words_of(y, words, class_words, base, rate)
    return Graph(noisy(x, noise) if noise else x, y, block_edges(y, degree, homophily), *split(y, train, val))


# ---------------------------------------------------------------------------------------------- using a graph

def hide(graph: Graph, share: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inductive setting: a share of the test nodes is not there during training. Returns the edges among the
    others (2, E'), the numbers of the observed nodes and those of the hidden ones, at least one of each kind of test
    node."""
    count = min(max(1, round(share * len(graph.test))), len(graph.test) - 1)
    hidden = graph.test[torch.randperm(len(graph.test)).to(graph.test.device)[:count]].sort()[0]
    observed = torch.ones(len(graph.x), dtype=torch.bool, device=hidden.device)
    observed[hidden] = False
    return graph.edges[:, observed[graph.edges].all(0)], observed.nonzero().flatten(), hidden


def directed(edges: torch.Tensor, loops: int = 0) -> torch.Tensor:
    """Both directions of undirected edges, (2, 2E); with loops=N one self-loop a node as well, (2, 2E + N)."""
    own = torch.arange(loops, device=edges.device).expand(2, -1)
    return torch.cat([edges, edges.flip(0), own], 1)


def propagation(edges: torch.Tensor, nodes: int, kind: Literal["symmetric", "mean"] = "symmetric") -> torch.Tensor:
    """The sparse (N, N) matrix of a graph convolution, with self-loops: "symmetric" D^-1/2 (A + I) D^-1/2 of a GCN, or
    "mean" D^-1 (A + I), GraphSAGE's "gcn" aggregator; D counts the self-loop."""
    both = directed(edges, nodes)
    degree = torch.bincount(both[0], minlength=nodes).float()
    value = 1 / degree[both[0]] if kind == "mean" else (degree[both[0]] * degree[both[1]]).rsqrt()
    return torch.sparse_coo_tensor(both, value, (nodes, nodes), check_invariants=False).coalesce()


def inference_cost(sizes: list[int], edges: torch.Tensor | None = None, nodes: torch.Tensor | None = None):
    """What one prediction costs, in counts: dict(neighbours=..., macs=...), the mean over `nodes` taken one by one.

    sizes: width of the input, the hidden layers and the output. Without edges an MLP; with edges a GCN of these sizes,
    which must fetch the features of all nodes within len(sizes) - 1 hops (neighbours: how many beside the node's own).
    macs: multiply-adds on dense features, each layer computed only where the next one needs it and in the cheaper of
    the two orders, product with the weights or sum over the neighbours first.
    """
    if edges is None:
        return dict(neighbours=0.0, macs=float(sum(a * b for a, b in zip(sizes, sizes[1:]))))
    both, n = directed(edges, 1 + max(int(edges.max()), int(nodes.max()))).cpu().numpy(), len(nodes)
    size = both.max() + 1
    one_hop = scipy.sparse.csr_matrix((np.ones(both.shape[1], np.float32), both), (size, size))
    balls = [scipy.sparse.csr_matrix((np.ones(n, np.float32), (np.arange(n), nodes.cpu().numpy())), (n, size))]
    for _ in sizes[1:]:
        ball = balls[-1] @ one_hop
        ball.data[:] = 1
        balls.append(ball)
    reached = [ball.sum() / n for ball in balls]                                # nodes within 0, 1, 2, ... hops
    summed = [(ball @ one_hop.sum(1)).sum() / n for ball in balls]              # terms in the sums at these nodes
    macs = 0.0
    for hops, (a, b) in enumerate(zip(sizes[-2::-1], sizes[:0:-1])):            # from the last layer to the first
        macs += min(reached[hops + 1] * a * b + summed[hops] * b, summed[hops] * a + reached[hops] * a * b)
    return dict(neighbours=float(reached[-1] - 1), macs=float(macs))


def layout(edges: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Places (N, 2) for a picture: the classes on a circle, each node at the mean of its neighbourhood's classes."""
    classes = int(y.max()) + 1
    angle = 2 * torch.pi * torch.arange(classes, device=y.device) / classes
    corner = torch.cat([torch.stack([angle.cos(), angle.sin()], 1), torch.zeros(1, 2, device=y.device)])   # -1: centre
    adjacency = propagation(edges, len(y), "mean")
    return adjacency @ (adjacency @ corner[y])


# ---------------------------------------------------------------------------------------------- graphs from files

def integers(found: dict, key: str, name: str, low: int, high: int, dims: int = 1) -> torch.Tensor:
    """found[key] as int64, checked: integers in low..high-1."""
    array = common.check_array(found, key, (dims,), name)
    if found[key].dtype.kind not in "iu":
        raise common.UserError(f"{name}: '{key}' has type {found[key].dtype}, integers are needed")
    array = array.to(torch.int64)
    if array.min() < low or array.max() >= high:
        raise common.UserError(f"{name}: '{key}' must lie in {low}..{high - 1}, "
                               f"found {int(array.min())}..{int(array.max())}")
    return array


def read(name: str) -> Graph:
    """The graph of a .npz file in the form FORMAT, found by common.find_data. common.UserError, in one line, for what
    is missing, empty, misshapen or out of range, for an unlabelled node in a split and for splits that overlap."""
    if common.find_data(name) is None:
        raise common.UserError(f"--data {name}: no such graph (possible: graph, a name in the folder $DISTILL_DATA, "
                               "or a .npz file)")
    found = common.read_npz(name)
    x = features(found, name)
    nodes = len(x)
    edges = integers(found, "edges", name, 0, nodes, dims=2)
    if len(edges) != 2:
        raise common.UserError(f"{name}: 'edges' must be (2, E), got {tuple(edges.shape)}")
    edges = simple(edges, nodes)
    if not edges.numel():
        raise common.UserError(f"{name}: 'edges' holds self-loops only")
    y = integers(found, "labels", name, -1, nodes)
    if len(y) != nodes:
        raise common.UserError(f"{name}: {len(y)} labels for {nodes} nodes")
    used = torch.zeros(nodes, dtype=torch.bool)
    parts = []
    for key in ("train_idx", "val_idx", "test_idx"):
        part = integers(found, key, name, 0, nodes)
        if (y[part] < 0).any():
            raise common.UserError(f"{name}: '{key}' holds node {int(part[y[part] < 0][0])}, "
                                   "whose label is unknown (-1)")
        if used[part].any() or len(part.unique()) < len(part):
            raise common.UserError(f"{name}: '{key}' holds a node twice or one that is in another split")
        used[part] = True
        parts.append(part)
    if len(parts[2]) < 2:
        raise common.UserError(f"{name}: 'test_idx' holds 1 node, at least 2 are needed")
    return Graph(x, y, edges, *parts)


def features(found: dict, name: str) -> torch.Tensor:
    """The dense (N, F) float32 matrix of the CSR arrays x_data, x_indices, x_indptr and x_shape, checked."""
    shape = integers(found, "x_shape", name, 1, 2**31).tolist()
    if len(shape) != 2:
        raise common.UserError(f"{name}: 'x_shape' must be the two numbers N, F, got {shape}")
    if shape[0] * shape[1] > 2**29:
        raise common.UserError(f"{name}: {shape[0]} nodes with {shape[1]} features each are too many for "
                               "dense features")
    value = common.check_array(found, "x_data", (1,), name).float()
    column = integers(found, "x_indices", name, 0, shape[1])
    start = integers(found, "x_indptr", name, 0, len(value) + 1)
    if len(column) != len(value):
        raise common.UserError(f"{name}: {len(column)} x_indices for {len(value)} x_data")
    if len(start) != shape[0] + 1 or start[0] != 0 or start[-1] != len(value) or (start.diff() < 0).any():
        raise common.UserError(f"{name}: 'x_indptr' must rise from 0 to {len(value)} in {shape[0] + 1} numbers, "
                               f"got {len(start)} from {int(start[0])} to {int(start[-1])}")
    row = torch.repeat_interleave(torch.arange(shape[0]), start.diff())
    return torch.zeros(shape).index_put_((row, column), value, accumulate=True)
