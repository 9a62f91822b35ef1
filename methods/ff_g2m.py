"""FF-G2M - Extracting Low-/High-Frequency Knowledge from Graph Neural Networks and Injecting it into MLPs
Paper: Lirong Wu et al., AAAI 2023, arXiv:2305.10758
Code: LirongWu/FF-G2M (src/train_and_eval.py:train_mini_batch, src/models.py:Model)
Family: graph. Distils: what a graph neural network says of nodes and of edges into an MLP.

Copying each node's own soft label (GLNN) carries over what varies slowly along edges; how a node differs from its
neighbours, the high frequencies of the graph, drowns in it. FF-G2M distils both parts, edge by edge. With logits h of
the teacher and z of the MLP, E the edges in both directions and E+ the same with a self-loop for each node,

    low:   L_LFD = 1/|E+| sum_{(i,j) in E+} KL( softmax(h_j) || softmax(z_i) ),
    high:  L_HFD = 1/|E|  sum_{(i,j) in E}  KL( softmax(|h_i - h_j| / tau) || softmax(|z_i - z_j| / tau) ),

    L = lambda CE(labelled) + (1 - lambda) (L_LFD + L_HFD).

L_LFD makes a node's target the mean of its neighbourhood's; L_HFD says in which classes two neighbours differ most,
whatever the sign. GLNN is L_LFD on the self-loops alone; all arms here have the same lambda, network, and
full-batch steps.

The miniature is a block model with bags of words and homophily 0.75: a quarter of the edges joins two classes. As
in the inductive setting a fifth of the test nodes is hidden with its edges, and the gaps are measured at hidden
nodes: hf_gap is L_HFD on their edges, none of which was trained on; lf_gap is 1 - cosine between the mean logits of
the neighbourhood, student's and teacher's. The same on training edges ends in _seen. A student that finds no
difference between any two nodes is the floor that a gap must beat. Departure: the state with the best validation
accuracy is kept, without the official stop after 50 epochs.

Cora, public split, GCN of three layers: accuracy in % of one seed, and the gaps. The paper's figures are for width
512 and with all test nodes observed, quoted second-hand. The gaps behave as claimed; the gain in accuracy over GLNN
was not seen here, where neither width nor lambda was tuned.

                              acc_tran  acc_ind   the paper     hf_gap  hf_gap_seen
        GCN (teacher)           79.0      79.5       81.7
        MLP                     59.4      56.5       59.6        1.37      1.40
        GLNN                    79.0      71.0    about 82.2     0.70      0.50
        LFD only                79.4      70.5                   0.62      0.58
        FF-G2M                  78.5      71.0    about 84.1     0.40      0.20
        no differences                                           0.58      0.60

    python methods/ff_g2m.py                            # 16 s of CPU time
    python methods/ff_g2m.py --data cora                # $DISTILL_DATA/cora.npz; 100 s of CPU time
    python methods/ff_g2m.py --data my.npz              # own graph; --help names the arrays
"""
import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

graphs = common.domain(common.Config(data="graph"), "graph")       # toy_data/graph.py


@dataclass
class Config(common.Config):
    PRESETS: ClassVar[dict] = {
        "cora": dict(depth=3, lamb=0.4, dropout=0.6, weight_decay=5e-4, label_dropout=0.6, label_weight_decay=5e-4),
        "smoke": dict(width=16)}

    data: Annotated[str, graphs.DATA_HELP] = "graph"
    steps: Annotated[int, "full-batch steps of every student (paper: up to 500)"] = 300
    width: Annotated[int, "hidden width of teacher and students (paper: 128 to 2048)"] = 128
    depth: Annotated[int, "layers of teacher and students (paper: 2 or 3)"] = 2
    lamb: Annotated[float, "lambda, weight of the labels in every distilled arm (paper: 0 to 0.5)",
                    common.between(0, 1)] = 0.1
    tau: Annotated[float, "temperature of the differences (paper: 1 to 1.5)", common.between(0.01)] = 1.5
    hidden_share: Annotated[float, "share of the test nodes that is hidden (paper: 0.2)",
                            common.between(0, 0.9)] = 0.2
    lr: Annotated[float, "learning rate of all students (paper: 0.01)"] = 0.01
    dropout: Annotated[float, "of the distilled students (paper: 0.3 to 0.6)", common.between(0, 0.99)] = 0.7
    weight_decay: Annotated[float, "of the distilled students (paper: 0.0005)"] = 2e-3
    label_dropout: Annotated[float, "of the MLP on labels (paper: as the others)", common.between(0, 0.99)] = 0.1
    label_weight_decay: Annotated[float, "of the MLP on labels (paper: as the others)"] = 0.05
    teacher_steps: Annotated[int, "full-batch steps of the teacher (paper: up to 500)"] = 200
    teacher_lr: Annotated[float, "learning rate of the teacher (paper: 0.01)"] = 0.01
    teacher_dropout: Annotated[float, "of the teacher (paper: 0.3 to 0.6)", common.between(0, 0.99)] = 0.5
    teacher_weight_decay: Annotated[float, "of the teacher (paper: 0.0005)"] = 5e-4


# ------------------------------------------------------------------------------------------- the objective

def low_frequency_loss(student_logits, teacher_log_probs, edges):
    """L_LFD: mean over edges (i, j) of KL(teacher at j || student at i).

    student_logits (N, K), with gradient; teacher_log_probs (N, K), without; edges (2, E) int64, both directions and
    self-loops. With the self-loops alone it is GLNN's loss.
    """
    source, neighbour = edges
    log_s = F.log_softmax(student_logits, 1)
    return F.kl_div(log_s[source], teacher_log_probs.detach()[neighbour], reduction="batchmean", log_target=True)


def edge_differences(logits, edges, tau):
    """log softmax(|h_i - h_j| / tau) (E, K): the classes in which the two ends of an edge differ. logits (N, K),
    edges (2, E), tau > 0."""
    return F.log_softmax((logits[edges[0]] - logits[edges[1]]).abs() / tau, 1)


def high_frequency_loss(student_logits, teacher_logits, edges, tau):
    """L_HFD: mean over edges of KL(teacher's differences || student's), on logits (N, K).

    Gradient to the student's logits at both ends of an edge, none to the teacher. edges (2, E) without self-loops,
    which give 0 and only dilute the mean; one direction of each gives the same value as both. A number added to all
    logits of one node changes the result.
    """
    log_t = edge_differences(teacher_logits.detach(), edges, tau)
    return F.kl_div(edge_differences(student_logits, edges, tau), log_t, reduction="batchmean", log_target=True)


def low_frequency_gap(student_logits, teacher_logits, adjacency, nodes):
    """Mean over `nodes` of 1 - cosine between the means of the two logits (N, K) over the neighbourhood; adjacency:
    D^-1 (A + I)."""
    student, teacher = adjacency @ student_logits, adjacency @ teacher_logits
    return 1 - F.cosine_similarity(student[nodes], teacher[nodes]).mean()


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
    """A GCN on the observed part of the graph; its best state by validation accuracy, frozen."""
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
    return common.trained(cfg, "ff_g2m-teacher", best, train, data=data.key,
                          edges=common.digest(adjacency.indices().tolist()), steps=cfg.teacher_steps,
                          lr=cfg.teacher_lr, decay=cfg.teacher_weight_decay)


def train_student(cfg, name, data, observed, loss, dropout, weight_decay):
    """An MLP on the observed nodes. loss(logits (len(observed), K)) -> {term: scalar}, which are added."""
    with common.seeded(cfg.seed + 1):       # every student starts from the same weights
        student = network(cfg, data, dropout)
    best, best_acc = copy.deepcopy(student), torch.zeros((), device=cfg.dev)
    optimizer = torch.optim.Adam(student.parameters(), cfg.lr, weight_decay=weight_decay)
    x, x_val, y_val = data.x[observed], data.x[data.val], data.y[data.val]
    progress = common.loop(cfg, name, student=student, best=best, best_acc=best_acc, optimizer=optimizer)
    for _ in progress:
        with cfg.autocast():
            logits = student.train()(x).float()         # no graph here
        terms = loss(logits)
        common.update(optimizer, sum(terms.values()))
        progress.losses(**terms)
        with torch.no_grad():
            keep_best(student, best, best_acc, accuracy(student.eval()(x_val), y_val))
    return best.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------- the experiment

def run(cfg, log):
    data = (graphs.block_model() if cfg.data == "graph" else graphs.read(cfg.data)).to(cfg.dev)
    n = len(data.x)
    seen, observed, hidden = graphs.hide(data, cfg.hidden_share)
    shown = data.test[~torch.isin(data.test, hidden)]
    teacher = train_teacher(cfg, data, graphs.propagation(seen, n))
    before = teacher(data.x, graphs.propagation(seen, n))           # hidden nodes are isolated
    after = teacher(data.x, graphs.propagation(data.edges, n))      # they have arrived with their edges

    place = torch.zeros(n, dtype=torch.long, device=cfg.dev)        # number of a node among the observed ones
    place[observed] = torch.arange(len(observed), device=cfg.dev)
    both, with_loops = (graphs.directed(place[seen], loops) for loops in (0, len(observed)))
    loops = torch.arange(len(observed), device=cfg.dev).expand(2, -1)
    train, labels = place[data.train], data.y[data.train]
    targets, log_probs = before[observed], before[observed].log_softmax(1)

    def low(z, edges=with_loops):
        return dict(low=(1 - cfg.lamb) * low_frequency_loss(z, log_probs, edges))

    def high(z):
        return dict(high=(1 - cfg.lamb) * high_frequency_loss(z, targets, both, cfg.tau))

    def hard(z, weight=cfg.lamb):
        return dict(hard=weight * F.cross_entropy(z[train], labels))

    arms = {"GLNN": lambda z: hard(z) | low(z, loops), "LFD only": lambda z: hard(z) | low(z),
            "HFD only": lambda z: hard(z) | high(z), "FF-G2M": lambda z: hard(z) | low(z) | high(z)}

    sizes = [data.x.shape[1]] + [cfg.width] * (cfg.depth - 1) + [data.classes]
    unseen = torch.isin(data.edges, hidden).any(0)
    average = graphs.propagation(data.edges, n, "mean")
    at_hidden = torch.cat([hidden, data.edges[:, unseen].flatten()]).unique()       # and their neighbours
    answers, differences = {}, {}

    def record(arm, z, **metrics):
        tran, ind = (accuracy(z[nodes], data.y[nodes]).item() for nodes in (shown, hidden))
        share = len(hidden) / len(data.test)
        log(arm, acc=(1 - share) * tran + share * ind, acc_tran=tran, acc_ind=ind, **metrics)
        answers[arm], differences[arm] = z.argmax(1), edge_differences(z, data.edges[:, unseen], cfg.tau).exp()

    def student(arm, loss, dropout=cfg.dropout, weight_decay=cfg.weight_decay):
        z = train_student(cfg, arm, data, observed, loss, dropout, weight_decay)(data.x)
        record(arm, z, hf_gap=high_frequency_loss(z, after, data.edges[:, unseen], cfg.tau).item(),
               hf_gap_seen=high_frequency_loss(z, before, seen, cfg.tau).item(),
               lf_gap=low_frequency_gap(z, after, average, at_hidden).item(),
               lf_gap_seen=low_frequency_gap(z, before, graphs.propagation(seen, n, "mean"), observed).item(),
               **graphs.inference_cost(sizes))

    record("GCN (teacher)", before.index_copy(0, hidden, after[hidden]),
           **graphs.inference_cost(sizes, data.edges, data.test))
    flat = torch.zeros_like(after)
    log("no differences (floor)", hf_gap=high_frequency_loss(flat, after, data.edges[:, unseen], cfg.tau).item(),
        hf_gap_seen=high_frequency_loss(flat, before, seen, cfg.tau).item())
    student("MLP", lambda z: hard(z, 1.0), cfg.label_dropout, cfg.label_weight_decay)
    for arm, loss in arms.items():
        student(arm, loss)
    draw(cfg, log, data, answers, differences, unseen)


def draw(cfg, log, data, answers, differences, unseen, rows=60):
    left, right = data.y[data.edges[:, unseen]]
    cross = ((left != right) & (left >= 0) & (right >= 0)).nonzero().flatten()
    order = cross[(left[cross].minimum(right[cross]) * data.classes + left[cross].maximum(right[cross])).argsort()]
    order = order[torch.linspace(0, len(order) - 1, min(rows, len(order))).long().to(cfg.dev)]

    def heat(p):
        return {"heat": p[order].cpu()}
    places = graphs.layout(data.edges, data.y)[data.test]
    panels = [(f"predicted: {arm}", (places, answers[arm][data.test])) for arm in ("GCN (teacher)", "GLNN", "FF-G2M")]
    if len(order):
        panels += [(f"where ends differ (edge x class): {arm.split()[0]}", heat(differences[arm]))
                   for arm in ("GCN (teacher)", "GLNN", "FF-G2M")]
    log.picture(panels, columns=3, title=f"FF-G2M on {cfg.data}: above, test nodes; below, edges of never-seen nodes "
                                         "between two classes")


CLAIMS = [
    common.Claim("FF-G2M", "<", "GLNN", metric="hf_gap", margin=0.8,
                 says="at nodes never seen, at least a fifth closer than GLNN to the teacher's edge differences"),
    common.Claim("FF-G2M", "<", "no differences (floor)", metric="hf_gap", margin=0.9,
                 says="and a tenth closer than a student whose neighbours do not differ at all"),
    common.Claim("FF-G2M", ">", "GLNN", metric="acc", margin=-0.005, scale="difference",
                 says="its accuracy is not below GLNN's by more than half a point"),
    common.Claim("FF-G2M", ">", "MLP", metric="acc", margin=0.1, scale="difference",
                 says="and at least 10 points above that of an MLP on the labels"),
    common.Claim("FF-G2M", ">", "LFD only", metric="acc", margin=-0.02, scale="difference",
                 says="with the high-frequency term it stays within 2 points of the low-frequency term alone"),
    common.Claim("FF-G2M", ">", "HFD only", metric="acc", margin=0.05, scale="difference",
                 says="differences along edges alone do not name the classes: without LFD at least 5 points are lost"),
    common.Claim("FF-G2M", "<", "LFD only", metric="hf_gap", margin=0.95,
                 says="the high-frequency term closes the gap along unseen edges further than LFD alone"),
]

NOTES = """Tuned on seeds 100 and 101 (four pairs of dropout and weight decay for the distilled arms together,
chosen by the accuracy of GLNN; the MLP's are those found for the script glnn), confirmed on 110 to 112; seeds 0 to
4 were run once. UNDECIDED: whether the gap on unseen edges is a tenth below that of a student that finds no
differences. On seeds 2 to 4 it is (0.146 to 0.165 against 0.192 to 0.209), as on the tuning seeds; on 0 and 1 the
teacher's best validation state is an early one whose logits differ little along any edge (floor 0.03 and 0.02), and
FF-G2M is no nearer than the floor. So the larger part of the gain over GLNN on unseen edges is that GLNN is sure of
differences that are not there: its gap is above the floor on every seed. On training edges FF-G2M is clearly below
it (0.074, floor 0.138). Most of the accuracy comes from the low-frequency term: LFD alone is 0.3 points better than
both terms, within the claimed 2 points; on nodes never seen GLNN is the best of all (70.1 %, LFD 68.7, FF-G2M
67.9), so the gain in accuracy is one on observed nodes. hf_gap shrinks with regularisation in all arms (GLNN 0.23
to 0.35, FF-G2M 0.155 to 0.17 on seeds 100, 101)."""

if __name__ == "__main__":
    common.main(run, Config, CLAIMS)
