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

The miniature: 36 glyphs, an MLP as student of a ResNet, the pair of unlike architectures, and of a wider MLP; on CIFAR
the student is a ViT. Exits as in the code: separable convolutions that halve the map for each stage still to come (an
MLP has 1x1 maps), or transformer blocks (no merging of patches). FitNet: hints at all stages by 1x1 convolutions.

    python methods/ofa_kd.py                        # 60 s of CPU time; own labelled images: --data my.npz
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
        "cifar": dict(stages=4, shift=4, student_shift=4, flip=True, batch=128, labels=50_000, steps=60_000, lr=1e-3,
                      teacher_steps=60_000, student="vit", student_width=96, teacher_width=64, like_width=192,
                      teacher_depth=2, teacher_lr=1e-3),
        "smoke": dict(teacher_batch=16, student_width=8, teacher_width=4, like_width=8)}

    data: Annotated[str, "labelled images: " + common.DATA_HELP] = "glyphs36"
    steps: Annotated[int, "optimiser steps of every student (paper: 300 epochs on CIFAR-100)"] = 500
    batch: Annotated[int, "images a step of the student (paper: 128 on CIFAR-100)"] = 64
    eps: Annotated[float, "exponent of the arms 'ofa' (code: 1 on CIFAR-100, 1.5 on ImageNet)"] = 1.2
    kd_temperature: Annotated[float, "T of the arms 'kd'", common.between(0.01)] = 2.0
    kd_alpha: Annotated[float, "weight of the soft term of 'kd', 1 - it of the hard one", common.between(0, 1)] = 0.5
    hint_weight: Annotated[float, "weight of FitNet's hints (code: 1)"] = 0.1
    lr: Annotated[float, "learning rate of all students (paper: SGD 0.05 for CNNs, AdamW 5e-4 for others)"] = 8e-3
    weight_decay: Annotated[float, "AdamW's, for all students (paper: 0.05 for others than CNNs)"] = 0.05
    stages: Annotated[int, "stages of all networks (paper: 4)"] = 3
    student: Annotated[Literal["mlp", "resnet", "vit"], "architecture of the student and of its like"] = "mlp"
    student_width: Annotated[int, "width of the student (ResNet: of the first stage; ViT: a multiple of 4)"] = 64
    teacher: Annotated[Literal["mlp", "resnet", "vit"], "architecture of the teacher that is unlike"] = "resnet"
    teacher_width: Annotated[int, "its width"] = 16
    like_width: Annotated[int, "width of the teacher of the student's architecture"] = 256
    patch: Annotated[int, "side of a ViT's tokens in pixels"] = 4
    teacher_depth: Annotated[int, "blocks in each stage of a teacher"] = 1
    teacher_steps: Annotated[int, "optimiser steps of both teachers"] = 300
    teacher_batch: Annotated[int, "images a step of both teachers"] = 64
    teacher_lr: Annotated[float, "learning rate of both teachers"] = 1.5e-3
    labels: Annotated[int, "images that the student learns from"] = 720
    shift: Annotated[int, "largest shift in pixels of the teachers' images", common.between(0)] = 1
    student_shift: Annotated[int, "the same of the student's", common.between(0)] = 0
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

    def __init__(self, stem, parts, widths, classes, tokens=False):
        super().__init__()
        self.stem, self.parts, self.widths, self.tokens = stem, nn.ModuleList(parts), widths, tokens
        norm = [nn.LayerNorm(widths[-1])] if tokens else []
        self.head = nn.Sequential(*norm, nn.Linear(widths[-1], classes))

    def stages(self, x):
        x = self.stem(x)
        return [x := part(x) for part in self.parts]

    def classify(self, maps):
        return self.head(maps[-1].mean((2, 3)))

    def forward(self, x):
        return self.classify(self.stages(x))


class Patches(nn.Module):
    """Images (B, C, H, W) to embedded patches with a learned position, as a map (B, width, H/patch, W/patch)."""

    def __init__(self, channels, width, patch, size):
        super().__init__()
        self.embed = nn.Conv2d(channels, width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, width, size[0] // patch, size[1] // patch))

    def forward(self, x):
        return self.embed(x) + self.position


class Blocks(nn.Module):
    """Pre-norm transformer blocks of four heads over a map (B, width, H, W), seen as H W tokens."""

    def __init__(self, width, depth):
        super().__init__()
        self.blocks = nn.Sequential(*[nn.TransformerEncoderLayer(
            width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True) for _ in range(depth)])

    def forward(self, x):
        return self.blocks(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])


def separable(a, b):
    """Halve a feature map: depthwise and 1x1 convolution twice, the first with stride 2 (SepConv in the code)."""
    return nn.Sequential(nn.Conv2d(a, a, 3, 2, 1, groups=a, bias=False), nn.Conv2d(a, a, 1, bias=False),
                         nn.BatchNorm2d(a), nn.ReLU(), nn.Conv2d(a, a, 3, 1, 1, groups=a, bias=False),
                         nn.Conv2d(a, b, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())


def make_exits(student, teacher_width, classes):
    """A head for each stage of a student, from its map to logits. teacher_width: channels of its last map."""
    n, last, exits = len(student.widths), max(student.widths[-1], teacher_width), nn.ModuleList()
    for i, width in enumerate(student.widths, 1):
        if student.tokens:
            blocks, last = [Blocks(width, max(n - i, 1))], width
        else:
            sizes = [width << k for k in range(n - i)] + [last]
            blocks = [separable(a, b) for a, b in zip(sizes, sizes[1:])] or [nn.Conv2d(width, last, 1)]
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
    if kind == "mlp":       # 1x1 convolutions of 1x1 maps
        sizes = [math.prod(data.shape)] + [width] * depth * cfg.stages
        layers = [nn.Sequential(nn.Conv2d(a, b, 1), nn.ReLU()) for a, b in zip(sizes, sizes[1:])]
        stem, parts = nn.Sequential(nn.Flatten(), nn.Unflatten(1, (sizes[0], 1, 1))), [
            nn.Sequential(*layers[i * depth:(i + 1) * depth]) for i in stages]
    elif kind == "resnet":
        body, widths = common.ResNet(channels, 1, width, (depth,) * cfg.stages).body, [width << i for i in stages]
        stem, parts = body[:3], [body[3 + i * depth:3 + (i + 1) * depth] for i in stages]
    else:
        if size[0] % cfg.patch or size[1] % cfg.patch or width % 4:
            raise common.UserError(f"--patch {cfg.patch} must divide the images' sides {size}, and 4 a ViT's width")
        stem, parts = Patches(channels, width, cfg.patch, size), [Blocks(width, depth) for _ in stages]
    return cfg.place(Staged(stem, parts, widths, data.n_classes, tokens=kind == "vit"))


def augmented(x, shift, flip):
    """Images (B, C, H, W) moved by up to `shift` pixels either way, the border repeated, and perhaps mirrored."""
    b, c, h, w = x.shape
    dy, dx = torch.randint(-shift, shift + 1, (2, b, 1), device=x.device)
    rows = (torch.arange(h, device=x.device) + dy).clamp(0, h - 1).view(b, 1, h, 1)
    columns = (torch.arange(w, device=x.device) + dx).clamp(0, w - 1)
    if flip:
        columns = torch.where(torch.rand(b, 1, device=x.device) < 0.5, columns, columns.flip(1))
    return x.gather(2, rows.expand(b, c, h, w)).gather(3, columns.view(b, 1, 1, w).expand(b, c, h, w))


def fit(cfg, name, modules, data, index, loss_of, steps, batch, lr, shift):
    """Train all parameters of nn.ModuleList modules on loss_of(images, labels), images being data.train[index]."""
    optimizer = torch.optim.AdamW(modules.parameters(), lr, weight_decay=cfg.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps + 1, pct_start=0.1)
    progress = common.loop(cfg, name, steps, modules=modules, optimizer=optimizer, schedule=schedule)
    for _ in progress:
        pick = index[torch.randint(len(index), (batch,), device=cfg.dev)]
        with cfg.autocast():
            loss = loss_of(augmented(data.normal(data.train[pick]), shift, cfg.flip), data.train_labels[pick])
        common.update(optimizer, loss, clip=5.0)
        schedule.step()
        progress.losses(loss=loss)


def train_teacher(cfg, data, name, kind, width):
    net = make_network(cfg, data, kind, width, cfg.teacher_depth)
    everything, key = torch.arange(len(data.train), device=cfg.dev), (cfg.weight_decay, cfg.flip, cfg.patch)
    settings = cfg.teacher_steps, cfg.teacher_batch, cfg.teacher_lr, cfg.shift
    return common.trained(cfg, f"ofa-{kind}", net, data=data.key, settings=settings + key,
                          train=lambda: fit(cfg, name, nn.ModuleList([net]), data, everything,
                                            lambda x, y: F.cross_entropy(net(x).float(), y), *settings))


def train_student(cfg, name, data, index, teacher, method, eps=1.0):
    """method: "ce", "kd", "fitnet", "ce on exits" or "ofa". Its helpers, exits or hints' regressors, are dropped."""
    with common.seeded(cfg.seed + 1):       # every student starts from the same weights
        student, helpers = make_network(cfg, data, cfg.student, cfg.student_width, 1), []
        if method in ("ofa", "ce on exits"):
            helpers = make_exits(student, teacher.widths[-1], data.n_classes)
        elif method == "fitnet":
            helpers = [nn.Conv2d(a, b, 1, bias=False) for a, b in zip(student.widths, teacher.widths)]
        helpers = nn.ModuleList(helpers).to(cfg.dev)

    def loss_of(x, y):
        with torch.no_grad():       # the teacher, in eval mode, sees the same view of the image
            teacher_maps = teacher.stages(x)
            t = teacher.classify(teacher_maps).float()
        maps = student.stages(x)
        s, helped = student.classify(maps).float(), [helper(m).float() for helper, m in zip(helpers, maps)]
        if method == "ofa":
            return ofa_total(s, helped, t, y, eps)
        if method == "kd":
            return kd_loss(s, t, y, cfg.kd_temperature, cfg.kd_alpha)
        if method == "ce on exits":
            return F.cross_entropy(s, y) + sum(F.cross_entropy(z, y) for z in helped)
        hints = sum(hint_loss(m, f.float()) for m, f in zip(helped, teacher_maps))      # 0 for "ce"
        return F.cross_entropy(s, y) + cfg.hint_weight * hints
    modules = nn.ModuleList([student, helpers])
    fit(cfg, name, modules, data, index, loss_of, cfg.steps, cfg.batch, cfg.lr, cfg.student_shift)
    return student.eval()


# ------------------------------------------------------------------------------------------- the experiment

def run(cfg, log):
    data = common.load_images(cfg)
    for part in ("train", "train_labels", "test", "test_labels") if cfg.smoke else ():
        setattr(data, part, getattr(data, part)[:200])
    index = torch.randperm(len(data.train)).to(cfg.dev)[:cfg.labels]
    probe = data.normal(data.test[:300])
    teachers = {"teacher": train_teacher(cfg, data, "teacher", cfg.teacher, cfg.teacher_width),
                "teacher, like": train_teacher(cfg, data, "teacher, like", cfg.student, cfg.like_width)}
    arms = {"ce": ("teacher", "ce", 1.0), "ce on exits": ("teacher", "ce on exits", 1.0)}       # they ignore it
    arms |= {teacher.replace("teacher", method): (teacher, method, cfg.eps)
             for teacher in teachers for method in ("kd", "fitnet", "ofa")}
    arms["ofa eps=1"] = "teacher", "ofa", 1.0
    students = {name: train_student(cfg, name, data, index, teachers[teacher], method, eps)
                for name, (teacher, method, eps) in arms.items()}
    with torch.no_grad():       # how alike the stages are to those of the student without a teacher
        plain = students["ce"].stages(probe)
        tables = {kind: torch.tensor([[cka(a, b) for b in net.stages(probe)] for a in plain])
                  for kind, net in teachers.items()}
    for name, net in {**students, **teachers}.items():
        extra = dict(cka=tables[name].mean()) if name in tables else {}
        log(name, **common.classification(common.predict(net, data), data.test_labels), **extra)
    draw(cfg, log, tables)


def draw(cfg, log, tables):
    panels = []
    for teacher, table in tables.items():
        names = ["ce", "ce on exits", *(teacher.replace("teacher", method) for method in ("kd", "fitnet", "ofa"))]
        bars = {name: ([i, i + 0.8], [log.arms[name]["acc"]] * 2) for i, name in enumerate(names)}
        panels += [(f"CKA: student's stages (down), {teacher}",
                    dict(heat=table.repeat_interleave(40, 0).repeat_interleave(40, 1))),
                   (f"students of: {teacher}", dict(curves=bars, x="method", y="test accuracy"))]
    log.picture(panels, columns=2, title=f"OFA-KD on {cfg.data}: distilled as logits at every stage of the student")


CLAIMS = [
    common.Claim("ofa", ">", "fitnet", metric="acc", margin=0.02, scale="difference",
                 says="from a ResNet to an MLP, OFA-KD is worth at least 2 points more than hints (FitNet)"),
    common.Claim("ofa", ">", "kd", metric="acc", scale="difference", margin=0.0,
                 says="from a ResNet to an MLP, OFA-KD is more accurate than tuned KD"),
    common.Claim("ofa", ">", "ce on exits", metric="acc", margin=0.02, scale="difference",
                 says="the exits need the teacher: OFA-KD is at least 2 points ahead of the same exits with labels"),
    common.Claim("ofa, like", ">", "fitnet, like", metric="acc", margin=0.02, scale="difference",
                 says="from MLP to MLP, too, OFA-KD is worth at least 2 points more than hints"),
    common.Claim("teacher, like", ">", "teacher", metric="cka", margin=1.1,
                 says="the student's stages resemble an MLP's more than a ResNet's (CKA)"),
]

NOTES = """\
Tuned on seeds 100 to 112 (rates 3e-3 to 2e-2, 720 to 3600 images, T 1 to 8, hint weights 0.03 to 5, eps 1 to 2). There
KD or FitNet led with all images or batch norm in the student, KD with a surer ResNet. ViTs need more training: 34 % as
student with hints, 22 % with OFA-KD. Against KD at T = 2 OFA-KD only lowers nll and ece. CIFAR: --smoke only."""

if __name__ == "__main__":
    common.main(run, Config, CLAIMS)
