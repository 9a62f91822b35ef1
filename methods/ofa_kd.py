"""OFA-KD - One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation
Paper: Hao et al., NeurIPS 2023, arXiv:2310.19444
Code: Hao840/OFAKD (distillers/ofa.py, distillers/utils.py)
Family: classification. Distils: the logits of a classifier into every stage of one of another architecture.

Features of a CNN, a ViT and an MLP differ at every depth (by centred kernel alignment, CKA), so to match them hands
over what belongs to an architecture. OFA-KD gives each stage i of the student an exit: a head h_i from its features
F_i to logits, dropped in the end. Exits and output learn from the teacher's logits alone. Where it is sure, the true
class gets more weight: with p, q the softmax of teacher and z, m the label's onehot and eps >= 1

    OFA(z) = -sum_c [(p_c + m_c)^eps - m_c] log q_c,     L = CE(s, y) + OFA(s) + sum_i OFA(h_i(F_i)).

eps = 1 is soft cross-entropy at temperature 1. This is the official code, followed here; in the paper's equation only
the true class is raised to eps (its gamma), the others keep p_c: target_weights(..., paper=True).

The miniature: 36 glyphs, an MLP of four stages as student of a ResNet, the pair of unlike architectures, and of a
wider MLP; on CIFAR the student is a ViT. Exits as in the code: separable convolutions that halve the map for each
stage still to come (dense layers in an MLP), or transformer blocks (no merging of patches). FitNet: hints at all.

    python methods/ofa_kd.py                        # 45 s on 2 CPU cores; own labelled images: --data my.npz
    python methods/ofa_kd.py --data cifar100 --amp  # ResNet to ViT; meant for a GPU, time not measured
"""
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common


@dataclass
class Config(common.Config):
    PRESETS: ClassVar[dict] = {
        "cifar": dict(student="vit", student_width=96, teacher_width=64, teacher_depth=2, like_width=192, views=0,
                      shift=4, flip=True, batch=128, labels=50_000, lr=1e-3, exit_lr=1e-3, teacher_lr=1e-3,
                      steps=60_000, teacher_steps=60_000, like_steps=60_000),
        "smoke": dict(student_width=8, teacher_width=4, like_width=8, like_steps=3, views=1)}

    data: Annotated[str, "labelled images: " + common.DATA_HELP] = "glyphs36"
    steps: Annotated[int, "optimiser steps of every student (paper: 300 epochs on CIFAR-100)"] = 700
    batch: Annotated[int, "images a step (paper: 128 on CIFAR-100)"] = 64
    eps: Annotated[float, "exponent of the arms 'ofa' (code: 1 on CIFAR-100, 1.5 on ImageNet)"] = 1.0
    kd_temperature: Annotated[float, "T of the arms 'kd'", common.between(0.01)] = 2.0
    kd_alpha: Annotated[float, "weight of the soft term of 'kd', 1 - it of the hard one", common.between(0, 1)] = 0.5
    hint_weight: Annotated[float, "weight of FitNet's hints (code: 1)"] = 0.01
    like_hint_weight: Annotated[float, "the same with the teacher of the student's architecture"] = 1.0
    lr: Annotated[float, "learning rate of students without exits (paper: 5e-4, SGD 0.05 for CNNs)"] = 8e-3
    exit_lr: Annotated[float, "learning rate of students with exits"] = 6e-3
    weight_decay: Annotated[float, "AdamW's, for all students (paper: 0.05 for others than CNNs)"] = 0.05
    stages: Annotated[int, "stages of all networks (paper: 4)"] = 4
    student: Annotated[Literal["mlp", "resnet", "vit"], "architecture of the student and of its like"] = "mlp"
    student_width: Annotated[int, "width of the student (ResNet: of the first stage; ViT: a multiple of 4)"] = 64
    teacher: Annotated[Literal["mlp", "resnet", "vit"], "architecture of the teacher that is unlike"] = "resnet"
    teacher_width: Annotated[int, "its width"] = 16
    like_width: Annotated[int, "width of the teacher of the student's architecture"] = 256
    patch: Annotated[int, "side of a ViT's tokens in pixels"] = 4
    teacher_depth: Annotated[int, "blocks in each stage of a teacher"] = 1
    teacher_steps: Annotated[int, "optimiser steps of the teacher"] = 300
    like_steps: Annotated[int, "optimiser steps of the teacher of the student's architecture"] = 600
    teacher_lr: Annotated[float, "learning rate of both teachers"] = 1.5e-3
    labels: Annotated[int, "images that the student learns from"] = 720
    views: Annotated[int, "copies of each image; 0: fresh ones, teacher in every step", common.between(0)] = 4
    shift: Annotated[int, "largest shift in pixels, for teachers and students", common.between(0)] = 1
    flip: Annotated[bool, "mirror half of the images"] = False


# ------------------------------------------------------------------------------------------- the objective

def target_weights(teacher_logits, labels, eps, paper=False):
    """(B, C) weights of -log q_c: (p_c + m_c)^eps - m_c as in the code, so (1 + p_y)^eps - 1 for the label and p_c^eps
    for the others; with paper=True p_c for the others. No gradient. teacher_logits (B, C), labels (B,), eps >= 1."""
    p = teacher_logits.detach().softmax(1)
    m = F.one_hot(labels, p.shape[1]).to(p)
    enhanced = (p + m) ** eps - m
    return torch.where(m.bool(), enhanced, p) if paper else enhanced


def ofa_loss(logits, teacher_logits, labels, eps=1.0, paper=False):
    """OFA(z), averaged over the batch; ofa_loss of the code at its default temperature 1. logits z (B, C) of the
    output or an exit carry gradient. m is subtracted since the label's own cross-entropy is a term of ofa_total."""
    return -(target_weights(teacher_logits, labels, eps, paper) * logits.log_softmax(1)).sum(1).mean()


def ofa_total(logits, exits, teacher_logits, labels, eps=1.0):
    """CE(s, y) + OFA(s) + sum_i OFA(z_i), weights 1 as in the code; logits s (B, C), exits: list of the z_i (B, C)."""
    return F.cross_entropy(logits, labels) + sum(ofa_loss(z, teacher_logits, labels, eps) for z in [logits, *exits])


def kd_loss(logits, teacher_logits, labels, temperature, alpha):
    """alpha T^2 KL(teacher || student) at temperature T + (1 - alpha) cross-entropy (Hinton et al. 2014)."""
    log_q, log_p = ((z / temperature).log_softmax(1) for z in (logits, teacher_logits.detach()))
    soft = temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return alpha * soft + (1 - alpha) * F.cross_entropy(logits, labels)


def hint_loss(mapped, target):
    """Squared error of maps (B, C, H, W), (B, C, H', W'), both averaged to the smaller grid. No gradient to target."""
    size = [min(a, b) for a, b in zip(mapped.shape[2:], target.shape[2:])]
    return F.mse_loss(F.adaptive_avg_pool2d(mapped, size), F.adaptive_avg_pool2d(target.detach(), size))


@torch.no_grad()
def cka(x, y):
    """Linear CKA of features (N, ...) and (N, ...) of the same N images, in [0, 1] (Kornblith et al. 2019)."""
    x, y = (z.flatten(1).double() - z.flatten(1).double().mean(0) for z in (x, y))
    x, y = x @ x.T, y @ y.T
    return ((x * y).sum() / (x.norm() * y.norm())).item()


class Staged(nn.Module):
    """A classifier in stages. stages() gives the maps (B, widths[i], H_i, W_i) after each, classify() the logits."""

    def __init__(self, kind, stem, parts, widths, classes):
        super().__init__()
        self.kind, self.stem, self.parts, self.widths = kind, stem, nn.ModuleList(parts), widths
        norm = nn.LayerNorm(widths[-1]) if kind == "vit" else nn.Identity()
        self.head = nn.Sequential(norm, nn.Linear(widths[-1], classes))

    def stages(self, x):
        x = self.stem(x)
        return [x := part(x) for part in self.parts]

    def classify(self, maps):
        return self.head(maps[-1].mean((2, 3)))

    def forward(self, x):
        return self.classify(self.stages(x))


class Blocks(nn.Module):
    """Pre-norm transformer blocks over a map (B, width, H, W) of H W tokens; size (H, W): with a learned position."""

    def __init__(self, width, depth, size=None):
        super().__init__()
        self.position = nn.Parameter(0.02 * torch.randn(1, width, *size)) if size else 0.0
        self.blocks = nn.Sequential(*[nn.TransformerEncoderLayer(
            width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True) for _ in range(depth)])

    def forward(self, x):
        tokens = (x + self.position).flatten(2).transpose(1, 2)
        return self.blocks(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


def separable(a, b):
    """Halve a feature map: depthwise and 1x1 convolution twice, the first with stride 2 (SepConv in the code)."""
    return nn.Sequential(nn.Conv2d(a, a, 3, 2, 1, groups=a, bias=False), nn.Conv2d(a, a, 1, bias=False),
                         nn.BatchNorm2d(a), nn.ReLU(), nn.Conv2d(a, a, 3, 1, 1, groups=a, bias=False),
                         nn.Conv2d(a, b, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())


def dense(a, b):
    """separable() on maps of one pixel, where a depthwise convolution, left out, could only scale a channel."""
    layers = [m for c in (a, b) for m in (nn.Linear(a, c, bias=False), nn.BatchNorm1d(c), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Unflatten(1, (b, 1, 1)))


def make_exits(student, teacher_width, classes):
    """A head for each stage of a student, from its map to logits. teacher_width: channels of its last map."""
    n, last, exits = len(student.widths), max(student.widths[-1], teacher_width), nn.ModuleList()
    for i, width in enumerate(student.widths, 1):
        if student.kind == "vit":
            blocks, last = [Blocks(width, max(n - i, 1))], width
        else:
            sizes, halve = [width << k for k in range(n - i)] + [last], dense if student.kind == "mlp" else separable
            blocks = [halve(a, b) for a, b in zip(sizes, sizes[1:])] or [nn.Conv2d(width, last, 1)]
        exits.append(nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, classes)))
    for module in exits.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
    return exits


def make_network(cfg, data, kind, width, depth):
    """kind: as in Config; width of its first stage, depth of each stage."""
    (channels, *size), stages, widths = data.shape, range(cfg.stages), [width] * cfg.stages
    if kind == "mlp":       # maps of one pixel
        stem, parts, sizes = nn.Identity(), [], [math.prod(data.shape)] + [width] * (depth * cfg.stages)
        for i in range(0, depth * cfg.stages, depth):
            layers = [m for a in sizes[i:i + depth] for m in (nn.Linear(a, width), nn.ReLU())]
            parts.append(nn.Sequential(nn.Flatten(), *layers, nn.Unflatten(1, (width, 1, 1))))
    elif kind == "resnet":
        body, widths = common.ResNet(channels, 1, width, (depth,) * cfg.stages).body, [width << i for i in stages]
        stem, parts = body[:3], [body[3 + i * depth:3 + (i + 1) * depth] for i in stages]
    else:
        if size[0] % cfg.patch or size[1] % cfg.patch or width % 4:
            raise common.UserError(f"--patch {cfg.patch} must divide the images' sides {size}, and 4 a ViT's width")
        stem, grid = nn.Conv2d(channels, width, cfg.patch, cfg.patch), [n // cfg.patch for n in size]
        parts = [Blocks(width, depth, None if i else grid) for i in stages]
    return cfg.place(Staged(kind, stem, parts, widths, data.n_classes))


def view_source(cfg, data, images, labels, teacher):
    """A function that returns a batch: images, labels, the teacher's logits and the maps of all its stages."""
    def ask(x):
        with torch.no_grad(), cfg.autocast():       # the teacher, in eval mode, sees the same view of the image
            maps = teacher.stages(x)
            return teacher.classify(maps).float(), *maps
    answers = [torch.cat(a) for a in zip(*(ask(data.normal(x)) for x in images.split(500)))] if cfg.views else []

    def draw_batch():
        pick = torch.randint(len(images), (cfg.batch,), device=cfg.dev)
        x = data.normal(images[pick])
        x = x if cfg.views else common.shift_and_flip(x, cfg.shift, cfg.flip)
        return x, labels[pick], *([a[pick] for a in answers] or ask(x))
    return draw_batch


def fit(cfg, name, modules, batch_loss, steps, lr):
    """Train all parameters of nn.ModuleList modules on batch_loss(), which draws a batch and returns a scalar."""
    optimizer = torch.optim.AdamW(modules.parameters(), lr, weight_decay=cfg.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps + 1, pct_start=0.1)
    progress = common.loop(cfg, name, steps, modules=modules, optimizer=optimizer, schedule=schedule)
    for _ in progress:
        with cfg.autocast():
            loss = batch_loss()
        common.update(optimizer, loss, clip=5.0)
        schedule.step()
        progress.losses(loss=loss)


def train_teacher(cfg, data, name, kind, width, steps):
    net = make_network(cfg, data, kind, width, cfg.teacher_depth)

    def batch_loss():
        pick = torch.randint(len(data.train), (cfg.batch,), device=cfg.dev)
        x = common.shift_and_flip(data.normal(data.train[pick]), cfg.shift, cfg.flip)
        return F.cross_entropy(net(x).float(), data.train_labels[pick])
    return common.trained(cfg, f"ofa-{kind}", net, data=data.key, train=lambda: fit(
        cfg, name, nn.ModuleList([net]), batch_loss, steps, cfg.teacher_lr), settings=(
            steps, cfg.batch, cfg.teacher_lr, cfg.weight_decay, cfg.shift, cfg.flip, cfg.patch))


def train_student(cfg, name, data, teacher, views, method, knob=0):
    """method: "ofa" (knob: eps), "fitnet" (knob: weight of the hints), "ce" or "kd", these also "... on exits"."""
    with common.seeded(cfg.seed + 1):       # every student starts from the same weights
        student, helpers = make_network(cfg, data, cfg.student, cfg.student_width, 1), []
        if exits := method == "ofa" or method.endswith("on exits"):
            helpers = make_exits(student, teacher.widths[-1], data.n_classes)
        elif method == "fitnet":
            helpers = [nn.Conv2d(a, b, 1, bias=False) for a, b in zip(student.widths, teacher.widths)]
        helpers = nn.ModuleList(helpers).to(cfg.dev)        # dropped in the end

    def batch_loss():
        x, y, t, *teacher_maps = views()
        maps = student.stages(x)
        s, helped = student.classify(maps).float(), [h(m).float() for h, m in zip(helpers, maps)]
        if method == "ofa":
            return ofa_total(s, helped, t, y, knob)
        if method.startswith("kd"):
            return sum(kd_loss(z, t, y, cfg.kd_temperature, cfg.kd_alpha) for z in [s, *helped])
        if method.startswith("ce"):
            return sum(F.cross_entropy(z, y) for z in [s, *helped])
        return F.cross_entropy(s, y) + knob * sum(hint_loss(m, f.float()) for m, f in zip(helped, teacher_maps))
    fit(cfg, name, nn.ModuleList([student, helpers]), batch_loss, cfg.steps, cfg.exit_lr if exits else cfg.lr)
    return student.eval()


# ------------------------------------------------------------------------------------------- the experiment

def run(cfg, log):
    data = common.load_images(cfg)
    index = torch.randperm(len(data.train)).to(cfg.dev)[:cfg.labels]
    images, labels = data.train[index], data.train_labels[index].repeat(max(1, cfg.views))
    if cfg.views:
        images = torch.cat([common.shift_and_flip(images, cfg.shift, cfg.flip) for _ in range(cfg.views)])
    asked = {"teacher": (cfg.teacher, cfg.teacher_width, cfg.teacher_steps),
             "teacher, like": (cfg.student, cfg.like_width, cfg.like_steps)}
    teachers = {name: train_teacher(cfg, data, name, *settings) for name, settings in asked.items()}
    arms = {"": {"ce": 0, "ce on exits": 0, "kd": 0, "kd on exits": 0,
                 "fitnet": cfg.hint_weight, "ofa": cfg.eps, "ofa eps=1.5": 1.5},
            ", like": {"kd": 0, "fitnet": cfg.like_hint_weight, "ofa": cfg.eps}}
    students = {}
    for pair, teacher in zip(arms, teachers.values()):
        views = view_source(cfg, data, images, labels, teacher)
        for arm, knob in arms[pair].items():
            students[arm + pair] = train_student(cfg, arm + pair, data, teacher, views, arm.split(" eps")[0], knob)
    with torch.no_grad():       # how alike the stages are to those of the student without a teacher
        plain, *maps = (net.stages(data.normal(data.test[:300])) for net in (students["ce"], *teachers.values()))
    tables = {name: torch.tensor([[cka(a, b) for b in m] for a in plain]) for name, m in zip(teachers, maps)}
    for name, net in {**students, **teachers}.items():
        alike = dict(cka=tables[name].mean()) if name in tables else {}
        log(name, **common.classification(common.predict(net, data), data.test_labels), **alike)
    panels = []
    for pair, (teacher, table) in zip(arms, tables.items()):
        bars = {arm: log.arms[arm + pair]["acc"] for arm in arms[pair]}
        panels += [(f"CKA: student's stages (down), {teacher}", dict(heat=torch.kron(table, torch.ones(40, 40)))),
                   (f"students of: {teacher}", dict(bars=bars, x="test accuracy"))]
    log.picture(panels, columns=2, title=f"OFA-KD on {cfg.data}: distilled as logits at every stage of the student")


CLAIMS = [
    common.Claim("ofa", ">", "fitnet", metric="acc", margin=0.05, scale="difference",
                 says="from a ResNet to an MLP, OFA-KD is worth at least 5 points more than hints (FitNet)"),
    common.Claim("ofa", ">", "kd", metric="acc", scale="difference", margin=0.0,
                 says="from a ResNet to an MLP, OFA-KD is more accurate than tuned KD"),
    common.Claim("ofa", ">", "ce on exits", metric="acc", margin=0.0, scale="difference",
                 says="the exits need the teacher: OFA-KD is more accurate than the same exits with labels"),
    common.Claim("ofa, like", ">", "fitnet, like", metric="acc", margin=0.02, scale="difference",
                 says="from MLP to MLP, too, OFA-KD is worth at least 2 points more than hints"),
    common.Claim("teacher, like", ">", "teacher", metric="cka", margin=1.1,
                 says="the student's stages resemble an MLP's more than a ResNet's (CKA)"),
]

NOTES = """\
At first (3 stages, no shifts) KD and OFA-KD tied. Second round, seeds 140 to 162: 4 stages, shifts, width 32 to 96, T
1 to 8, alpha 0.5, 0.9, rates 3.5e-3 to 1.6e-2, hints 0.003 to 1, eps 1 to 1.5; confirmed on 170 to 172 and, with a
lower rate for exits, 180 to 182 (2 and 4 points over KD; margins then: labelled exits 0.02 to 0, hints 0.02 to 0.05).
The exits matter more than the loss: KD's at T = 2 on them is better still, and after 1500 steps KD has 0.857, OFA-KD
0.868 (2 seeds). ViTs need more training (students 34 % with hints, 22 % with OFA-KD). CIFAR: --smoke only."""

if __name__ == "__main__":
    common.main(run, Config, CLAIMS)
