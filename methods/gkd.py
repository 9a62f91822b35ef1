"""GKD - On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes
Paper: Rishabh Agarwal et al., ICLR 2024, arXiv:2306.13649
Code: huggingface/trl (trl/experimental/gkd/gkd_trainer.py: GKDTrainer), by others; none by the authors
Family: llm-kd. Distils: a language model into a smaller one, on what the smaller one writes.

A student that learns from fixed texts never sees a prefix with one of its own slips in it, and does not know how
to go on when it has made one. GKD takes a share lambda of its training texts from the student as it is now and
asks the teacher for its next-token distribution after every prefix of them:

    L = (1 - lambda) E_{(x,y) ~ data} D(p_T || p_S)(y|x)  +  lambda E_{x ~ data, y ~ p_S(.|x)} D(p_T || p_S)(y|x),
    D(p_T || p_S)(y|x) = 1/|y| sum_n D( p_T(.|y_<n, x) || p_S(.|y_<n, x) ),

without a gradient through the sampling. lambda = 0 with the forward KL is supervised KD, lambda = 1 is on-policy. The
divergence D is free: forward KL, reverse KL or, in between, JSD(beta) = beta KL(p_T || m) + (1 - beta) KL(p_S || m),
m = beta p_T + (1 - beta) p_S; a student that cannot represent the teacher gains from the mode-seeking end.

The miniature adds five digits mod 5, in an order of one's own choice, each step a term and the sum so far:
"S31423=" -> "1140332033.". A problem has up to 120 right answers, the data show one of them to each of 30
problems, and all arms draw on these problems alone. An answer is right when all its 11 tokens are. The student has a
quarter of the teacher's weights. As in the paper it can do the task to some extent before it is distilled: it has
been fine-tuned, on problems without end as the teacher, but only until about 60 % of its answers were right.
Left out: the policy gradient that the paper can add for a reward. The mean over tokens is taken a sequence at a
time, as in the paper; TRL takes it over all tokens of a batch, and samples at temperature 0.9 where the paper has 1.

    python methods/gkd.py                       # 40 s of CPU time
    python methods/gkd.py --beta 0.5 --lmbda 0.5
"""
import copy
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common


@dataclass
class Config(common.Config):
    PRESETS: ClassVar[dict] = {"smoke": dict(teacher_batch=16, start_steps=3, test=32, points=2)}

    data: Annotated[str, "the domain; arithmetic: sums with a chain of thought in any order"] = "arithmetic"
    terms: Annotated[int, "numbers to be added, in any order; the answer has 2 terms + 1 tokens"] = 5
    modulus: Annotated[int, "numbers are 0..modulus-1 and are added mod modulus", common.between(2, 10)] = 5
    problems: Annotated[int, "problems with right answers, from which all arms draw (paper: GSM8K, 7,473)"] = 30
    steps: Annotated[int, "distillation steps of every arm (paper: 10,000 on GSM8K)"] = 300
    batch: Annotated[int, "sequences a step, the students' (paper: 32)"] = 64
    lr: Annotated[float, "peak learning rate on the student's own texts (paper: 3e-4 with Adafactor)"] = 3e-3
    data_lr: Annotated[float, "peak learning rate of distillation on the data's texts"] = 3e-4
    sft_lr: Annotated[float, "peak learning rate of the fine-tuning on the data's texts"] = 1e-4
    lmbda: Annotated[float, "lambda of gkd: share of the steps on the student's own texts (TRL: 0.5)",
                     common.between(0, 1)] = 1.0
    beta: Annotated[float, "divergence of gkd: 0 forward KL, 1 reverse KL, between them JSD (TRL: 0.5)",
                    common.between(0, 1)] = 1.0
    temperature: Annotated[float, "of the student's texts in training (paper: 1, TRL: 0.9)"] = 1.0
    width: Annotated[int, "width of the student"] = 24
    depth: Annotated[int, "layers of the student"] = 2
    start_acc: Annotated[float, "share of right answers at which the training of the start ends",
                         common.between(0, 1)] = 0.6
    start_steps: Annotated[int, "steps after which it ends in any case"] = 800
    start_lr: Annotated[float, "learning rate of the start"] = 6e-3
    teacher_width: Annotated[int, "width of the teacher"] = 48
    teacher_depth: Annotated[int, "layers of the teacher"] = 2
    teacher_steps: Annotated[int, "steps of the teacher, on problems without end"] = 500
    teacher_batch: Annotated[int, "batch of the teacher"] = 64
    teacher_lr: Annotated[float, "peak learning rate of the teacher"] = 6e-3
    test: Annotated[int, "unseen problems, one text each, for the metrics"] = 1000
    points: Annotated[int, "points of the accuracy curves"] = 8


# ------------------------------------------------------------------------------------------- the objective

def generalized_jsd(teacher, student, beta):
    """The divergence D between next-token distributions, p_T = softmax(teacher), p_S = softmax(student): (B, L).

    Logits (B, L, V). beta 0 is KL(p_T || p_S), beta 1 is KL(p_S || p_T); in between JSD(beta), section 2 of the paper.
    JSD(beta) / beta and JSD(beta) / (1 - beta) go to the two at the ends, but JSD itself to 0: the scale jumps there.
    Gradient to the student alone.
    """
    log_t, log_s = teacher.detach().log_softmax(-1), student.log_softmax(-1)
    if beta == 0:
        return (log_t.exp() * (log_t - log_s)).sum(-1)
    if beta == 1:
        return (log_s.exp() * (log_s - log_t)).sum(-1)
    weight = torch.tensor([beta, 1 - beta], dtype=log_s.dtype, device=log_s.device).log()
    log_m = torch.logaddexp(log_t + weight[0], log_s + weight[1])       # m = beta p_T + (1 - beta) p_S
    from_teacher = (log_t.exp() * (log_t - log_m)).sum(-1)
    from_student = (log_s.exp() * (log_s - log_m)).sum(-1)
    return beta * from_teacher + (1 - beta) * from_student


def gkd_loss(teacher, student, mask, beta):
    """Mean over the sequences of (1/|y|) sum_n D_n. Logits (B, L, V); mask (B, L) bool: the tokens of y up to and
    including its end marker. What the student writes after that must not count."""
    divergence, mask = generalized_jsd(teacher, student, beta), mask.to(student.dtype)
    return ((divergence * mask).sum(1) / mask.sum(1).clamp_min(1)).mean()


def cross_entropy_loss(student, tokens, mask):
    """SFT, or SeqKD if the teacher wrote the tokens: their -log p_S (B, L), a mean like that of gkd_loss."""
    return -common.masked_mean(common.token_log_probs(student, tokens), mask, by_sequence=True)


# ------------------------------------------------------------------------------------------- training

def fine_tuned(cfg, student, task, eos, **key):
    """Cross-entropy on problems without end until a share cfg.start_acc of the student's answers is right. Cached."""
    def train():
        optimizer = torch.optim.AdamW(student.parameters(), cfg.start_lr, (0.9, 0.99), weight_decay=0.01, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
        for step in (progress := common.loop(cfg, "student", cfg.start_steps, student=student, optimizer=optimizer,
                                             schedule=schedule)):
            x, y = (part.to(cfg.dev) for part in task.sample(200 if step % 20 == 19 else cfg.batch))
            if step % 20 == 19:         # unseen problems of the split "train"
                if task.valid(x, common.generate(student, x, y.shape[1], eos)).float().mean() >= cfg.start_acc:
                    break
                x, y = x[:cfg.batch], y[:cfg.batch]
            with cfg.autocast():
                logits = common.completion_logits(student, x, y).float()
            loss = cross_entropy_loss(logits, y, common.answer_mask(y, eos))
            common.update(optimizer, loss, clip=1.0)
            schedule.step()
            progress.losses(ce=loss)
    return common.trained(cfg, "student", student, train, steps=cfg.start_steps, acc=cfg.start_acc, lr=cfg.start_lr,
                          batch=cfg.batch, **key)


def distil(cfg, name, start, teacher, prompts, answers, eos, lmbda, beta, lr, measure):
    """Algorithm 1 of the paper on prompts (N, P) and answers (N, L); beta None: cross-entropy on the answers instead.

    lr is the peak, reached after a tenth of the steps, by when Adam's averages are sound. measure(student) gives a
    number, kept at cfg.points moments. Returns the student and the curve (2, points)."""
    student = copy.deepcopy(start).requires_grad_(True).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr, (0.9, 0.99), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, 10 * (step + 1) / cfg.steps) * (1 + math.cos(math.pi * step / cfg.steps)) / 2)
    moments = torch.linspace(0, cfg.steps - 1, cfg.points).long().tolist()
    curve = torch.zeros(2, cfg.points)
    for step in (progress := common.loop(cfg, name, student=student, optimizer=optimizer, schedule=schedule,
                                         curve=curve)):
        pick = torch.randint(len(prompts), (cfg.batch,), device=cfg.dev)
        x, y = prompts[pick], answers[pick]
        if torch.rand(()).item() < lmbda:       # once a step: all texts of it are the student's own, fresh, or none
            y = common.generate(student, x, y.shape[1], eos, cfg.temperature)
        mask = common.answer_mask(y, eos)
        with cfg.autocast():
            logits = common.completion_logits(student, x, y).float()
            if beta is not None:
                with torch.no_grad():
                    target = common.completion_logits(teacher, x, y).float()
        loss = cross_entropy_loss(logits, y, mask) if beta is None else gkd_loss(target, logits, mask, beta)
        common.update(optimizer, loss, clip=1.0)
        schedule.step()
        progress.losses(loss=loss)
        if step in moments:
            curve[:, moments.index(step)] = torch.tensor([step + 1.0, measure(student)])
    return student.eval().requires_grad_(False), curve


# ------------------------------------------------------------------------------------------- the experiment

def run(cfg, log):
    arithmetic = common.domain(cfg, "arithmetic")
    task, eos = arithmetic.Sums(cfg.terms, cfg.modulus, "any"), arithmetic.EOS
    span, length = task.prompt_length + task.answer_length, task.answer_length
    teacher = cfg.place(common.Transformer(arithmetic.TOKENS, cfg.teacher_width, cfg.teacher_depth, 4, span))
    key = dict(data=arithmetic.KEY, terms=cfg.terms, modulus=cfg.modulus)
    teacher = common.language_model(cfg, "teacher", teacher, task.sample, cfg.teacher_steps, eos, cfg.teacher_batch,
                                    cfg.teacher_lr, **key)
    with common.seeded(cfg.seed + 1_000_000):       # the same whether the networks come from the cache or not
        prompts, answers = (x.to(cfg.dev) for x in task.sample(cfg.problems))
        test = task.sample(cfg.test, "test")[0].to(cfg.dev)
    start = cfg.place(common.Transformer(arithmetic.TOKENS, cfg.width, cfg.depth, 4, span))
    start = fine_tuned(cfg, start, task, eos, **key)

    @torch.no_grad()
    def kl(model, x, y):        # KL(p_T || p_S) after every prefix of texts y to problems x, by place: (tokens,)
        mask = common.answer_mask(y, eos).float()
        found = common.forward_kl(common.completion_logits(teacher, x, y), common.completion_logits(model, x, y))
        return (found * mask).sum(0) / mask.sum(0).clamp_min(1)

    def write(model, temperature=1.0, n=None):
        with common.seeded(cfg.seed + 2_000_000):
            return common.generate(model, test[:n], length, eos, temperature)

    def share_right(model):
        return task.valid(test[:300], write(model, n=300)).float().mean().item()

    positions, curves, own_states, data_states = torch.arange(1, length + 1), {}, {}, {}

    def record(arm, model):
        y = write(model)
        own, seen = kl(model, test, y), kl(model, prompts, answers)
        entropy = common.masked_mean(common.entropy(common.completion_logits(model, test, y)),
                                     common.answer_mask(y, eos))
        log(arm, acc=task.valid(test, y).float().mean(), acc_greedy=task.valid(test, write(model, 0)).float().mean(),
            kl_own=own.mean(), kl_data=seen.mean(), mismatch=own.mean() / seen.mean().clamp_min(1e-8),
            entropy=entropy)
        own_states[arm], data_states[arm] = (positions, own.cpu()), (positions, seen.cpu())

    record("teacher", teacher)
    record("start", start)
    for arm, lmbda, beta, lr in [
            ("SFT", 0.0, None, cfg.sft_lr), ("supervised KD", 0.0, 0.0, cfg.data_lr),
            ("off-policy, reverse KL", 0.0, 1.0, cfg.data_lr), ("on-policy, forward KL", 1.0, 0.0, cfg.lr),
            ("gkd", cfg.lmbda, cfg.beta, cfg.lr)]:
        student, curve = distil(cfg, arm, start, teacher, prompts, answers, eos, lmbda, beta, lr, share_right)
        record(arm, student)
        curves[arm] = tuple(curve)
    log.picture([
        ("right chains on unseen problems", dict(curves=curves, x="step", y="accuracy")),
        ("KL to the teacher on the student's own texts", dict(curves={a: own_states[a] for a in curves}, x="token",
                                                              y="nats", logy=True)),
        ("KL to the teacher on the training texts", dict(curves={a: data_states[a] for a in curves}, x="token",
                                                         y="nats", logy=True)),
    ], columns=3, title=f"GKD: {cfg.problems} problems, {length} tokens; texts from the data or from the student")


CLAIMS = [
    common.Claim("gkd", ">", "supervised KD", metric="acc", margin=0.1, scale="difference",
                 says="on-policy with the reverse KL: at least 10 points more right chains than supervised KD"),
    common.Claim("gkd", ">", "supervised KD", metric="acc_greedy", margin=0.1, scale="difference",
                 says="and at least 10 points more with greedy decoding, so it is not only a sharper student"),
    common.Claim("on-policy, forward KL", ">", "supervised KD", metric="acc", margin=0.1, scale="difference",
                 says="with the same divergence, the forward KL, own texts are better than the data's by 10 points"),
    common.Claim("gkd", ">", "off-policy, reverse KL", metric="acc", margin=0.1, scale="difference",
                 says="with the reverse KL by 10 points as well"),
    common.Claim("on-policy, forward KL", "<", "supervised KD", metric="kl_own", margin=0.7,
                 says="same divergence: on-policy cuts the KL to the teacher on the student's own texts by 30 %"),
    common.Claim("on-policy, forward KL", "<", "supervised KD", metric="mismatch", margin=0.7,
                 says="and the ratio of the KL on own texts to that on the training texts by 30 %"),
    common.Claim("gkd", ">", "on-policy, forward KL", metric="acc", margin=0.0, scale="difference",
                 says="on own texts the mode-seeking reverse KL gives more right chains than the forward KL"),
    common.Claim("gkd", "<", "on-policy, forward KL", metric="entropy", margin=0.98,
                 says="and less varied ones: its entropy is at least 2 % lower"),
    common.Claim("supervised KD", ">", "SFT", metric="acc", margin=0.0, scale="difference",
                 says="supervised KD is better than fine-tuning on the same right answers"),
]

NOTES = """Second round; seeds 0 to 4 were run once in it. In the first (seven digits mod 4, 120 problems, a
start fine-tuned on these alone, 200 steps, one learning rate for all) seven of nine claims were reproduced, but
no arm had converged and seeds 0 to 4 spread from 7 to 88 % right with gkd, since some students had not yet
found out how to keep track of the terms left. Now the start is trained on problems without end until 60 % are
right and the arms level off (gkd: 87 to 97 %); the gain over supervised KD is smaller, 18 points in place of
33, and steadier. Undecided are greedy decoding (on average 9 points, seed 4: supervised KD 99.5 % as well) and
the reverse KL on either texts (16 points, the bound 9.3): all five seeds have the sign claimed, the margin of
10 points is what is in doubt. What on-policy gains comes from few data: with 250 problems (seeds 131, 132,
data_lr 3e-3, there better than 3e-4) it is 3 and 10 points with the forward KL. Tuning was on seeds 120 to 125,
three more (130 to 132) then confirmed it, and claims and margins were fixed there: that of the entropy to 2 %,
as 3 % was undecided on these three; the fifth and the last were undecided too, and kept. Tried: starts
fine-tuned on the 60 or 120 problems alone (some students stay at 20 % right for all of 400 steps, on own texts
as well); students of one layer, widths 24 to 48 (some do not reach 60 % in 800 steps); mod 4, 6 and 10; 24, 40
and 60 problems. Learning rates with 40 problems (seeds 121 and 125; at 6e-3 seed 121 alone), right by the end:
supervised KD 0.59 at 6e-3, 0.64 and 0.56 at 3e-3, 0.76 and 0.62 at 1e-3, 0.78 and 0.61 at 3e-4; on-policy with
the forward KL 0.94, 0.92 and 0.91, 0.84 and 0.84 at the first three; gkd 0.91, 0.94 and 0.93, 0.89 and 0.90.
Fine-tuning on the data's texts makes the start worse except at very small learning rates (seed 125, start 0.50:
0.39 at 3e-3, 0.52 at 3e-4, 0.59 at 1e-4), so it has one of its own. At 1e-3 and more supervised KD is closer to
the teacher on the training texts than on-policy is; at 3e-4, where it is better on unseen problems, the two are
alike there. Left out against the first round: SeqKD and JSD 0.5 (--beta 0.5), in no claim."""

if __name__ == "__main__":
    common.main(run, Config, CLAIMS)
