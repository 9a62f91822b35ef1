"""GLNN - Graph-less Neural Networks: Teaching Old MLPs New Tricks via Distillation
Paper: Shichang Zhang et al., ICLR 2022, arXiv:2110.08727
Code: snap-research/graphless-neural-networks (train_and_eval.py, train.conf.yaml)
Family: graph. Distils: a graph neural network into an MLP that needs no graph.

A GNN of L layers must fetch all nodes within L hops of the one it predicts. An MLP on the node's own features fetches
nothing, but learns little from a few labels. GLNN trains the GNN once and then an MLP to give the GNN's probabilities
z_v on all observed nodes V, most of which have no label:

    L = lambda / |V_L| sum_{v in V_L} CE(y_v, s_v) + (1 - lambda) / |V| sum_{v in V} KL(z_v || s_v),    s_v = MLP(x_v).

The graph acts through z alone, during training alone. lambda = 0 in nearly all of the paper's results. Observed test
nodes are in V with their features, never with their labels; so part of the accuracy on them (acc_tran) is memorised
answers of the teacher, and what the MLP knows of nodes that nobody had seen (acc_ind) is less than what a GNN knows.
acc covers both kinds, as the paper's "production" setting: a fifth of the test nodes is hidden from all training.

The miniature is a block model with bags of words, 20 labels a class, and a GCN as teacher. As in the paper the student
has the teacher's depth and width: here it is the very same network without the graph. Departures: one joint loss and
one optimiser step where the official code alternates passes over V_L and V, so that lambda = 0 costs no idle steps of
weight decay; batches drawn with replacement; no early stop, but the state with the best validation accuracy is kept.
cut is the paper's diagnostic of how far predictions follow the graph, here without the self-loops that the official
graphs hold. It is also high where probabilities are flat, so agreement is the same score of the predicted classes.

Cora in %, means of three random splits with a GraphSAGE teacher (--data cora --split random --aggregator mean
--teacher-dropout 0 --teacher-weight-decay 5e-4), the paper's of ten on the largest component, and one run with a GCN
on the public split. On the random splits acc of GLNN is 2.2, 2.4 and 4.7 below its teacher's, the paper's 1.0.

                       GraphSAGE: acc, acc_tran, acc_ind    the paper             GCN: acc, acc_tran, acc_ind
        teacher        78.8  78.9  78.7                     79.29  78.78  81.33   81.9  81.9  82.0
        MLP            59.5  59.5  59.4                     58.98  58.95  59.09   57.2  57.2  57.0
        GLNN           75.8  77.0  70.8                     78.28  79.39  73.82   80.7  82.1  75.0

    python methods/glnn.py                              # 16 s of CPU time
    python methods/glnn.py --data cora                  # $DISTILL_DATA/cora.npz; 80 s of CPU time
    python methods/glnn.py --data my.npz                # own graph; --help names the arrays
"""
import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

graphs = common.domain(common.Config(data="graph"), "graph")       # toy_data/graph.py


@dataclass
class Config(common.Config):
    PRESETS: ClassVar[dict] = {
        "cora": dict(steps=1000, teacher_dropout=0.8, teacher_weight_decay=1e-3, dropout=0.6, weight_decay=5e-3,
                     label_dropout=0.6, label_weight_decay=5e-3, distil_counts=(500, 1000)),
        "smoke": dict(width=16, distil_counts=(200,))}

    data: Annotated[str, graphs.DATA_HELP] = "graph"
    split: Annotated[Literal["file", "random"], "of a graph from a file: its own, or a new one for each seed with 20 "
                     "labels a class to train, 30 to validate and the rest to test (paper, on Cora)"] = "file"
    steps: Annotated[int, "optimiser steps of every student"] = 600
    batch: Annotated[int, "nodes a step of the soft term (paper: 512)"] = 512
    width: Annotated[int, "hidden width of teacher and students (paper: 128)"] = 128
    depth: Annotated[int, "layers of teacher and students (paper: 2)"] = 2
    lamb: Annotated[float, "lambda, weight of the labels in GLNN (paper: 0)", common.between(0, 1)] = 0.0
    hidden_share: Annotated[float, "share of the test nodes that is hidden (paper: 0.2)", common.between(0, 0.9)] = 0.2
    lr: Annotated[float, "learning rate of all students (paper: 0.01)"] = 0.01
    dropout: Annotated[float, "of the distilled students (paper: 0.1 to 0.6)", common.between(0, 0.99)] = 0.3
    weight_decay: Annotated[float, "of the distilled students (paper: 0 to 0.005)"] = 1e-3
    label_dropout: Annotated[float, "of the MLP on labels (paper: as GLNN)", common.between(0, 0.99)] = 0.1
    label_weight_decay: Annotated[float, "of the MLP on labels (paper: as GLNN)"] = 0.05
    aggregator: Annotated[Literal["symmetric", "mean"], "teacher: a GCN, or GraphSAGE with its 'gcn' aggregator "
                          "(paper: mainly the latter)"] = "symmetric"
    teacher_steps: Annotated[int, "full-batch steps of the teacher (paper: up to 200)"] = 200
    teacher_lr: Annotated[float, "learning rate of the teacher (paper: 0.01)"] = 0.01
    teacher_dropout: Annotated[float, "of the teacher (paper: GCN 0.8, SAGE 0)", common.between(0, 0.99)] = 0.5
    teacher_weight_decay: Annotated[float, "of the teacher (paper: GCN 0.001, SAGE 0.0005)"] = 5e-4
    distil_counts: Annotated[tuple[int, ...],
                             "numbers of nodes in the soft term between labelled and all, for the curve"] = (250, 600)


# ------------------------------------------------------------------------------------------- the objective

def soft_label_loss(student_logits, teacher_log_probs):
    """1/B sum_v KL(z_v || s_v): the teacher's probabilities z weigh the difference of the logarithms (section 4).

    student_logits (B, K), with gradient; teacher_log_probs log z (B, K), without.
    """
    log_s = F.log_softmax(student_logits, 1)
    return F.kl_div(log_s, teacher_log_probs.detach(), reduction="batchmean", log_target=True)


def glnn_loss(logits_labelled, labels, logits_all, teacher_log_probs, lamb):
    """lamb CE on labelled nodes + (1 - lamb) KL on any nodes; gradient to both logits, (B_L, K) and (B, K).

    labels (B_L,) int64, teacher_log_probs (B, K), lamb in [0, 1]. lamb = 1 is an MLP on labels.
    """
    hard = F.cross_entropy(logits_labelled, labels)
    return lamb * hard + (1 - lamb) * soft_label_loss(logits_all, teacher_log_probs)


def min_cut_score(probabilities, edges):
    """Tr(S^T A S) / Tr(S^T D S) in [0, 1] for S (N, K), the predicted probabilities, and undirected edges (2, E), each
    once: near 1 where neighbours get the same prediction (section 5.4). Also 1 for S that is the same everywhere."""
    left, right = probabilities[edges[0]], probabilities[edges[1]]
    return 2 * (left * right).sum() / (left.square().sum() + right.square().sum())


# ------------------------------------------------------------------------------------------- training

def keep_best(net, best, best_acc, acc):
    """Copy net into best where acc, a tensor, is at least best_acc: a tie goes to the later. No wait for a GPU."""
    better = acc >= best_acc
    best_acc.copy_(torch.where(better, acc, best_acc))
    with torch.no_grad():
        for b, p in zip(best.parameters(), net.parameters()):
            b.copy_(torch.where(better, p, b))


def accuracy(logits, y):
    """Share of right answers, a tensor. logits (N, K), y (N,)."""
    return (logits.argmax(1) == y).float().mean()


def network(cfg, data, dropout):
    """A GCN, or without an adjacency an MLP of the same shape."""
    return cfg.place(common.GCN(data.x.shape[1], cfg.width, data.classes, cfg.depth, dropout))


def train_teacher(cfg, data, adjacency):
    """A GNN on the observed part of the graph; its best state by validation accuracy, frozen."""
    best = network(cfg, data, cfg.teacher_dropout)

    def train():
        net, best_acc = copy.deepcopy(best), torch.zeros((), device=cfg.dev)
        optimizer = torch.optim.Adam(net.parameters(), cfg.teacher_lr, weight_decay=cfg.teacher_weight_decay)
        progress = common.loop(cfg, "teacher", cfg.teacher_steps, net=net, best=best, best_acc=best_acc,
                               optimizer=optimizer)
        for _ in progress:
            with cfg.autocast():
                logits = net.train()(data.x, adjacency).float()
            loss = F.cross_entropy(logits[data.train], data.y[data.train])
            common.update(optimizer, loss)
            progress.losses(ce=loss)
            with torch.no_grad():
                acc = accuracy(net.eval()(data.x, adjacency)[data.val], data.y[data.val])
            keep_best(net, best, best_acc, acc)
    return common.trained(cfg, "glnn-teacher", best, train, data=data.key,
                          edges=common.digest(adjacency.indices().tolist()), kind=cfg.aggregator,
                          steps=cfg.teacher_steps, lr=cfg.teacher_lr, decay=cfg.teacher_weight_decay)


def train_student(cfg, name, data, teacher_log_probs, nodes, lamb, dropout, weight_decay):
    """An MLP on the labels (lamb = 1), on the teacher's probabilities of `nodes` (lamb = 0), or on both."""
    with common.seeded(cfg.seed + 1):       # every student starts from the same weights
        student = network(cfg, data, dropout)
    best, best_acc = copy.deepcopy(student), torch.zeros((), device=cfg.dev)
    optimizer = torch.optim.Adam(student.parameters(), cfg.lr, weight_decay=weight_decay)
    progress = common.loop(cfg, name, student=student, best=best, best_acc=best_acc, optimizer=optimizer)
    for _ in progress:
        pick = nodes[torch.randint(len(nodes), (cfg.batch if lamb < 1 else 1,)).to(cfg.dev)]
        with cfg.autocast():
            logits = student.train()(data.x[torch.cat([data.train, pick])]).float()     # no graph here
        labelled, others = logits[:len(data.train)], logits[len(data.train):]
        loss = glnn_loss(labelled, data.y[data.train], others, teacher_log_probs[pick], lamb)
        common.update(optimizer, loss)
        progress.losses(loss=loss)
        with torch.no_grad():
            keep_best(student, best, best_acc, accuracy(student.eval()(data.x[data.val]), data.y[data.val]))
    return best.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------- the experiment

def load(cfg):
    """The toy graph, or that of a file with its own split or a random one."""
    if cfg.data == "graph":
        return graphs.block_model().to(cfg.dev)
    data = graphs.read(cfg.data)
    if cfg.split == "random":
        data.train, data.val, data.test = graphs.split(data.y, 20, 30)
    return data.to(cfg.dev)


def run(cfg, log):
    data = load(cfg)
    seen, observed, hidden = graphs.hide(data, cfg.hidden_share)
    shown = data.test[~torch.isin(data.test, hidden)]
    whole = graphs.propagation(data.edges, len(data.x), cfg.aggregator)
    part = graphs.propagation(seen, len(data.x), cfg.aggregator)        # hidden nodes are isolated
    teacher = train_teacher(cfg, data, part)
    teacher_logits = teacher(data.x, part)
    teacher_log_probs = teacher_logits.log_softmax(1)

    sizes = [data.x.shape[1]] + [cfg.width] * (cfg.depth - 1) + [data.classes]
    predictions = {}

    def record(arm, logits, **cost):
        tran, ind = (accuracy(logits[nodes], data.y[nodes]).item() for nodes in (shown, hidden))
        share = len(hidden) / len(data.test)
        log(arm, acc=(1 - share) * tran + share * ind, acc_tran=tran, acc_ind=ind,
            cut=min_cut_score(logits.softmax(1), data.edges).item(),
            agreement=min_cut_score(F.one_hot(logits.argmax(1), data.classes).float(), data.edges).item(), **cost)
        predictions[arm] = logits.argmax(1)
        return tran, ind

    # nodes that arrive after training are predicted with the whole graph, the others with what the teacher had seen
    logits = teacher_logits.index_copy(0, hidden, teacher(data.x, whole)[hidden])
    teacher_acc = record("GCN (teacher)", logits, **graphs.inference_cost(sizes, data.edges, data.test))

    def student(arm, nodes, lamb, dropout=cfg.dropout, weight_decay=cfg.weight_decay):
        net = train_student(cfg, arm, data, teacher_log_probs, nodes, lamb, dropout, weight_decay)
        return record(arm, net(data.x), **graphs.inference_cost(sizes))

    mlp_acc = student("MLP", data.train, 1.0, cfg.label_dropout, cfg.label_weight_decay)
    rest = observed[~torch.isin(observed, data.train)]
    rest = rest[torch.randperm(len(rest)).to(cfg.dev)]
    arms = {len(data.train): "GLNN, labelled nodes only"}
    arms |= {n: f"GLNN, {n} nodes" for n in cfg.distil_counts if len(data.train) < n < len(observed)}
    arms[len(observed)] = "GLNN"
    found = [student(arm, torch.cat([data.train, rest])[:n], cfg.lamb) for n, arm in arms.items()]
    draw(cfg, log, data, predictions, list(arms), found, teacher_acc, mlp_acc)


def draw(cfg, log, data, predictions, counts, found, teacher_acc, mlp_acc):
    places = graphs.layout(data.edges, data.y)[data.test]
    panels = [("true classes of the test nodes", (places, data.y[data.test]))]
    panels += [(f"predicted: {arm}", (places, predictions[arm][data.test]))
               for arm in ("MLP", "GCN (teacher)", "GLNN")]
    for i, kind in enumerate(("seen without label", "never seen")):
        curves = {"GLNN": (counts, [acc[i] for acc in found])}
        curves |= {name: (counts, [acc[i]] * len(counts)) for name, acc in (("GCN", teacher_acc), ("MLP", mlp_acc))}
        panels.append((f"test nodes {kind}", dict(curves=curves, x="nodes in the soft term", y="accuracy")))
    log.picture(panels, columns=3, title=f"GLNN on {cfg.data}: what a GCN knows in an MLP that sees no graph")


CLAIMS = [
    common.Claim("GLNN", ">", "MLP", metric="acc_tran", margin=0.08, scale="difference",
                 says="on test nodes seen without label, GLNN is at least 8 points better than an MLP on the labels"),
    common.Claim("GLNN", ">", "GCN (teacher)", metric="acc_tran", margin=-0.03, scale="difference",
                 says="there it stays within 3 points of its teacher, which uses the graph"),
    common.Claim("GLNN", ">", "MLP", metric="acc_ind", margin=0.04, scale="difference",
                 says="on nodes never seen in training, GLNN is at least 4 points better than the MLP"),
    common.Claim("GLNN", ">", "GLNN, labelled nodes only", metric="acc_tran", margin=0.04, scale="difference",
                 says="at least 4 points come from distilling on nodes that have no label"),
    common.Claim("GLNN", ">", "MLP", metric="agreement", margin=1.3,
                 says="it gives one class to both ends of 30 % more edges than the MLP, though it sees no edge"),
    common.Claim("GLNN", "<", "GCN (teacher)", metric="macs", margin=0.25,
                 says="a prediction takes less than a quarter of the teacher's multiply-adds, and no neighbours"),
]

NOTES = """Tuned on seeds 100 to 102 (dropout and weight decay of the MLP and of GLNN, 12 settings each), confirmed
on 110 to 112; seeds 0 to 4 were run once. The MLP wants strong weight decay (57.6 % at 0.05, 54 % at the paper's
0.005). The claim on the cut was made one on agreement before seeds 0 to 4: the MLP so regularised is unsure of
everything, which raises its cut (0.76) to GLNN's. The parity with the teacher is transductive: there the student
has seen the very features that it is tested on with the teacher's answer, and with 600 of the 1,250 observed nodes
distilled it is gone; on nodes never seen GLNN stays 24 points behind the GCN. Choosing the state by 150 validation
nodes is noisy (it cost one tuning seed 6 points). macs counts predictions one by one; for a whole graph at once a
GCN computes hardly more than the MLP."""

if __name__ == "__main__":
    common.main(run, Config, CLAIMS)
