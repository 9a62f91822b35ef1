"""CEED-VLA - CEED-VLA: Consistency Vision-Language-Action Model with Early-Exit Decoding
Paper: Wenxuan Song et al., arXiv 2025, arXiv:2506.13725
Code: OpenHelix-Team/CEED-VLA (prismatic/extern/hf/modeling_prismatic.py: Jacobi decoding alone, no training)
Family: llm-inference. Distils: the converged Jacobi decoding of a policy with action tokens into its early iterations.

A vision-language-action model writes a chunk of actions as n tokens, one a forward. Jacobi decoding starts from
random tokens and predicts all n at once from those before them, again and again,

    y_i^(j+1) = argmax_y P(y | Y^(j)_{<i}, x)   for all i,      until Y^(j+1) = Y^(j) = Y*,

the greedy answer, after n iterations at most. A model trained on right prefixes settles little more than one token an
iteration. CEED-VLA fine-tunes a copy Q of it on the model's own trajectories {Y^(0), ..., Y*}: from any state Y it
shall predict what it predicts from the fixed point,

    L = L_C + omega L_AR,      L_C = sum_i KL( sg[Q(. | Y*_{<i}, x)] || Q(. | Y_{<i}, x) ),
                               L_AR = - sum_i log Q(y~_i | Y~_{<i}, x).

The labels are mixed: Y~ is Y*, but the demonstrated chunk where the actions of Y* are further than delta_max from it.
Decoding stops early, after a fixed number of iterations: late ones hardly change the motion.

In the miniature a point has to reach the one of two goals that an instruction names, past an obstacle; five actions of
two coordinates are 10 tokens of 21 bins. The policy is a causal transformer behind an embedding of the scene.
The teacher's demonstrator mixed up the goals where the right one lies at the right edge: errors that mixed labels can
mend. Trajectories converge here, none is left out. The training was not released: omega, delta_max and the distance
are ours, L_C is CLLM's. Cost is counted in forwards, the one that confirms the fixed point too, without a cache.

    python methods/ceed_vla.py                  # 50 s of CPU time
    python methods/ceed_vla.py --task arm       # an arm of two joints
"""
import copy
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
    PRESETS: ClassVar[dict] = {"smoke": dict(demos=200, episodes=20, width=16, exits=(1, 2))}

    data: Annotated[str, "the domain: control"] = "control"
    task: Annotated[Literal["point", "arm"], "what is moved"] = "point"
    steps: Annotated[int, "fine-tuning steps of every arm"] = 300
    batch: Annotated[int, "contexts a step"] = 128
    chunk: Annotated[int, "actions of a chunk, each of two tokens (paper: 3 to 10, of seven tokens)"] = 5
    bins: Annotated[int, "tokens an action coordinate (paper: 256)", common.between(2)] = 21
    demos: Annotated[int, "demonstrated chunks, of the teacher and again of the fine-tuning"] = 6500
    flaw: Annotated[float, "the teacher's operator mixes up the goals where x of the right one is larger"] = 0.5
    width: Annotated[int, "width of the transformer, a multiple of 4"] = 32
    depth: Annotated[int, "its blocks"] = 2
    reach: Annotated[float, "longest move a step and coordinate; the world is 2 wide"] = 0.25
    detour: Annotated[float, "angle of the detour, to the left or right, that opens a demonstrated chunk"] = 0.8
    teacher_steps: Annotated[int, "behaviour cloning steps of the teacher"] = 1000
    teacher_lr: Annotated[float, "its peak learning rate"] = 4e-3
    lr: Annotated[float, "initial learning rate of the fine-tuning, falls as a cosine"] = 2e-3
    omega: Annotated[float, "weight of L_AR (CLLM: 1 to 10)"] = 1.0
    delta_max: Annotated[float, "mean distance an action coordinate beyond which Y* is not trusted"] = 0.5
    exits: Annotated[tuple[int, ...], "numbers of forwards after which the curves exit"] = (1, 2, 3, 4)
    early_exit: Annotated[int, "forwards a chunk of the arms with early exit"] = 2
    episodes: Annotated[int, "closed-loop episodes of every evaluation"] = 400
    chunks: Annotated[int, "chunks of an episode at most"] = 3


# ------------------------------------------------------------------------------------------- decoding

@torch.no_grad()
def jacobi(model, start, exit_after=None):
    """Jacobi decoding: all states Y^(0) = start, Y^(1), ... as (B, J + 1, n) int64 and the forwards of each row (B,).

    model(tokens (B, n)) -> logits (B, n, V), causal: position i depends on tokens[:, :i] alone. start (B, n): any
    tokens. A row counts forwards until one has changed nothing; the last state is then its fixed point Y*, which is
    the greedy decoding, after n + 1 forwards at most. exit_after: stop after that many forwards, converged or not."""
    states, most = [start], start.shape[1] + 1
    open_ = torch.ones(len(start), dtype=torch.bool, device=start.device)
    forwards = torch.zeros(len(start), device=start.device)
    for _ in range(min(exit_after or most, most)):
        states.append(model(states[-1]).argmax(-1))
        forwards += open_
        open_ = open_ & (states[-1] != states[-2]).any(1)
        if not open_.any():
            break
    return torch.stack(states, 1), forwards


@torch.no_grad()
def greedy(model, start):
    """One token a forward: (B, n) tokens and the forwards of each row (B,), n. The contents of start do not matter."""
    tokens = start.clone()
    for i in range(start.shape[1]):
        tokens[:, i] = model(tokens)[:, i].argmax(-1)
    return tokens, torch.full((len(start),), float(start.shape[1]), device=start.device)


# ------------------------------------------------------------------------------------------- the objective

def consistency_loss(logits_state, logits_fixed):
    """L_C: KL( sg[Q(. | Y*)] || Q(. | Y) ), summed over the tokens, averaged over the batch.

    logits_state, logits_fixed (B, n, V): the student's on a state of the trajectory and on the fixed point. Gradient
    through logits_state alone. Tokens behind an equal prefix contribute 0."""
    log_p, log_q = logits_fixed.detach().log_softmax(-1), logits_state.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum((1, 2)).mean()


def autoregressive_loss(logits, labels):
    """L_AR: - log Q(labels), summed over the tokens, averaged over the batch. logits (B, n, V), computed on the labels
    (B, n) themselves."""
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1).mean()


def mixed_labels(fixed, truth, to_actions, delta_max):
    """Y~ (B, n), and which rows of it are the ground truth (B,) bool: those whose fixed point is too far from it.

    fixed, truth (B, n) int64; to_actions(tokens) -> (B, ...) real actions. The distance is the mean absolute
    difference of all action coordinates of a chunk, so that a chunk is kept or replaced as a whole."""
    deviation = (to_actions(fixed) - to_actions(truth)).abs().flatten(1).mean(1)
    replaced = deviation > delta_max
    return torch.where(replaced[:, None], truth, fixed), replaced


def unsettled_state(trajectories, lengths):
    """One state (B, n) of each trajectory, uniform among those before the fixed point. trajectories (B, J + 1, n),
    padded with the fixed point; lengths (B,): states before it; with 0 the start is drawn."""
    which = (torch.rand(len(lengths), device=lengths.device) * lengths).long()
    return trajectories[torch.arange(len(lengths), device=lengths.device), which]


# ------------------------------------------------------------------------------------------- training

class Policy(nn.Module):
    """policy(states (B, 8), instruction (B,), tokens (B, n)) -> logits (B, n, bins), token i from those before it."""

    def __init__(self, width, depth, bins, numbers, length):
        super().__init__()
        self.prompt = nn.Sequential(nn.Linear(numbers + 2, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width),
                                    nn.SiLU(), nn.Linear(4 * width, width))
        self.language = common.Transformer(bins, width, depth, 4, length)

    def forward(self, states, instruction, tokens):
        prompt = self.prompt(torch.cat([states, F.one_hot(instruction, 2)], 1))
        return self.language(embeds=torch.cat([prompt[:, None], self.language.token(tokens[:, :-1])], 1))


def train_teacher(cfg, task, net, states, instruction, tokens):
    """Behaviour cloning of the demonstrated chunks."""
    def train():
        optimizer = torch.optim.AdamW(net.parameters(), cfg.teacher_lr, weight_decay=0.01, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, cfg.teacher_lr, total_steps=cfg.teacher_steps + 1)
        progress = common.loop(cfg, "teacher", cfg.teacher_steps, net=net, optimizer=optimizer, schedule=schedule)
        for _ in progress:
            pick = torch.randint(len(states), (cfg.batch,), device=cfg.dev)
            with cfg.autocast():
                logits = net(states[pick], instruction[pick], tokens[pick])
            loss = autoregressive_loss(logits.float(), tokens[pick])
            common.update(optimizer, loss, clip=1.0)
            schedule.step()
            progress.losses(ce=loss)
    return common.trained(cfg, "ceed-vla-teacher", net, train, data=task.key, demos=cfg.demos, flaw=cfg.flaw,
                          steps=cfg.teacher_steps, batch=cfg.batch, lr=cfg.teacher_lr)


def distil(cfg, name, teacher, contexts, trajectories, lengths, labels, consistency=True):
    """Consistency fine-tuning on `labels` (N, n), the Y~; without consistency the supervised fine-tuning on them."""
    student = copy.deepcopy(teacher).requires_grad_(True)
    optimizer = torch.optim.AdamW(student.parameters(), cfg.lr, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cfg.steps)
    progress = common.loop(cfg, name, student=student, optimizer=optimizer, schedule=schedule)
    for _ in progress:
        pick = torch.randint(len(lengths), (cfg.batch,), device=cfg.dev)
        context, label, losses = [c[pick] for c in contexts], labels[pick], {}
        with cfg.autocast():
            losses["ar"] = cfg.omega * autoregressive_loss(student(*context, label).float(), label)
            if consistency:
                state = unsettled_state(trajectories[pick], lengths[pick])
                with torch.no_grad():       # the target is the student as it is now
                    logits_fixed = student(*context, trajectories[pick, -1]).float()
                losses["consistency"] = consistency_loss(student(*context, state).float(), logits_fixed)
        common.update(optimizer, sum(losses.values()), clip=1.0)
        schedule.step()
        progress.losses(**losses)
    return student.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------- the experiment

def run(cfg, log):
    if cfg.width % 4:
        raise common.UserError(f"--width {cfg.width} is not a multiple of 4, the number of attention heads")
    control = common.domain(cfg, "control")
    task = {"point": control.Point, "arm": control.Arm}[cfg.task](
        cfg.chunk, cfg.bins, cfg.reach, radius=0.15, tolerance=0.08, detour=cfg.detour, horizon=2 * cfg.chunk)
    n = task.length

    def start(count):
        return torch.randint(cfg.bins, (count, n), device=cfg.dev)

    def on(model, *context):        # the model as a function of the tokens alone
        return lambda tokens: model(*context, tokens)

    states, instruction, _ = task.sample(cfg.demos, cfg.dev)
    mixed_up = task.goal(states, instruction)[:, 0] > cfg.flaw
    flawed = task.tokens(task.demonstrate(states, torch.where(mixed_up, 1 - instruction, instruction)))
    net = cfg.place(Policy(cfg.width, cfg.depth, cfg.bins, task.width, n))
    teacher = train_teacher(cfg, task, net, states, instruction, flawed)

    *contexts, actions = task.sample(cfg.demos, cfg.dev)
    trajectories = jacobi(on(teacher, *contexts), start(cfg.demos))[0]
    fixed = trajectories[:, -1]
    lengths = (trajectories != fixed[:, None]).any(2).sum(1)
    labels, replaced = mixed_labels(fixed, task.tokens(actions), task.actions, cfg.delta_max)

    scenes = task.reset(cfg.episodes, cfg.dev)
    first = start(cfg.episodes)

    def evaluate(decode):           # decode(context, start) -> tokens, forwards
        counts = []

        def policy(*context):
            tokens, forwards = decode(context, start(cfg.episodes))
            counts.append(forwards)
            return task.actions(tokens)
        with common.seeded(cfg.seed + 6_000_000):       # the same random starts for every arm
            done = task.rollout(policy, *scenes, cfg.chunks)
        asked = done.steps[None] > cfg.chunk * torch.arange(cfg.chunks, device=cfg.dev)[:, None]
        nfe = (torch.stack(counts) * asked).sum() / asked.sum()
        return dict(success=done.success.float().mean().item(), nfe=nfe.item()), done

    def decoder(model, exit_after=None):
        def decode(context, tokens):
            found, forwards = jacobi(on(model, *context), tokens, exit_after)
            return found[:, -1], forwards
        return decode

    def settled(model):             # tokens right after one forward although an earlier one was wrong in its input
        found = jacobi(on(model, *scenes), first)[0]
        wrong_before = (found[:, 0] != found[:, -1]).cumsum(1)[:, :-1] > 0
        return ((found[:, 1] == found[:, -1])[:, 1:] & wrong_before).sum(1).float().mean().item()

    def train(name, *options):
        return distil(cfg, name, teacher, contexts, trajectories, lengths, *options)

    log("expert (floor)", success=task.rollout(task.demonstrate, *scenes, cfg.chunks).success.float().mean().item())
    log("teacher, one token a call", **evaluate(lambda context, tokens: greedy(on(teacher, *context), tokens))[0])
    models = {"teacher": teacher, "sft": train("sft", labels, False), "consistency, Y* labels": train(
        "consistency, Y* labels", fixed), "ceed": train("ceed", labels)}
    curves, paths = {}, {}
    for arm, model in models.items():
        found = evaluate(decoder(model))[0]
        extra = dict(replaced=replaced.float().mean().item()) if arm == "ceed" else {}
        log(arm, **found, fixed_tokens=settled(model), **extra)
        exits = {e: evaluate(decoder(model, e)) for e in sorted({*cfg.exits, cfg.early_exit})}
        log(f"{arm}, early exit", **exits[cfg.early_exit][0])
        paths[arm] = exits[cfg.early_exit][1].path
        every = [*(metrics for metrics, _ in exits.values()), found]
        curves[arm] = [m["nfe"] for m in every], [m["success"] for m in every]
    draw(cfg, log, task, scenes, paths, curves,
         [jacobi(on(models[arm], *scenes), first)[0] for arm in ("teacher", "ceed")])


def draw(cfg, log, task, scenes, paths, curves, trajectories):
    shown = []
    for found in trajectories:      # share of right tokens, a row an iteration, a column a token
        right = (found == found[:, -1:]).float().mean(0)
        shown.append(torch.cat([right, right[-1:].expand(task.length + 2 - len(right), -1)]))
    line = torch.zeros(task.length + 2, 1, device=cfg.dev)

    def scene(path, few=6):
        few = min(few, len(scenes[0]))
        angle = torch.linspace(0, 6.28, 60, device=cfg.dev)
        ring = task.radius * torch.stack([angle.cos(), angle.sin()], 1)
        parts, colours = [], []
        for i in range(few):
            steps = path[:, i]
            between = [steps[:-1] + f * steps.diff(dim=0) for f in torch.linspace(0, 1, 8).tolist()]
            goal = task.goal(scenes[0][i:i + 1], scenes[1][i:i + 1]) + 0.4 * task.tolerance * ring / task.radius
            parts += [torch.cat(between), goal, scenes[0][i, 6:8] + ring]
            colours += [torch.full((len(x),), i) for x in parts[-3:]]
        return torch.cat(parts), torch.cat(colours)

    log.picture([
        ("success; last dot: converged", dict(curves=curves, x="forwards a chunk", y="success")),
        ("tokens right, a row an iteration: teacher | ceed", {"heat": torch.cat([shown[0], line, shown[1]], 1).cpu()}),
        (f"teacher, {cfg.early_exit} forwards a chunk", scene(paths["teacher"])),
        (f"ceed, {cfg.early_exit} forwards a chunk", scene(paths["ceed"])),
    ], columns=4, title=f"CEED-VLA: {task.length} action tokens, decoded in parallel")


CLAIMS = [
    common.Claim("ceed", "<", "teacher", metric="nfe", margin=0.75,
                 says="the student's Jacobi decoding converges in less than three quarters of the teacher's forwards"),
    common.Claim("ceed", "<", "sft", metric="nfe", margin=0.83,
                 says="which fine-tuning on the same labels without the consistency loss does not bring"),
    common.Claim("ceed", ">", "teacher", metric="success", margin=-0.06, scale="difference",
                 says="its success stays within 6 points of the teacher's"),
    common.Claim("ceed, early exit", ">", "ceed", metric="success", margin=-0.03, scale="difference",
                 says="two forwards a chunk cost it at most 3 points of its success"),
    common.Claim("ceed, early exit", ">", "teacher, early exit", metric="success", margin=0.05, scale="difference",
                 says="with two forwards a chunk it is 5 points better than the teacher with two"),
    common.Claim("ceed, early exit", ">", "sft, early exit", metric="success", margin=0.0, scale="difference",
                 says="and better than the student without consistency loss with two"),
    common.Claim("ceed", ">", "consistency, Y* labels", metric="success", margin=0.0, scale="difference",
                 says="mixed labels mend errors of the teacher that its own converged answers as labels keep"),
]
NOTES = """Tuning was on seeds 100 and 101 (learning rates 3e-4, 1e-3, 2e-3, the same for all arms); 0 to 4 ran once.
The task was chosen so that tokens depend on each other: without the demonstrator's detours, and with moves of 0.15,
the teacher was as good after two forwards as converged, and an early exit had nothing to lose. Mixed labels gain from
errors put into the teacher's demonstrations; a quarter of the labels were replaced, on tuning seeds 13 % of those
outside the faulty region too, most of them chunks with the other detour. Fine-tuning without the consistency loss,
converged, is 3 points better than ceed: that loss costs success, and without mixed labels ceed would be 3 points below
the teacher. It saves 30 % of the forwards to convergence; more takes the early exit: 2 forwards for 10 tokens."""

if __name__ == "__main__":
    common.main(run, Config, CLAIMS)
