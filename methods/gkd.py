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

The miniature adds seven digits mod 4, in an order of one's own choice, each step a term and the sum so far:
"S1132311=" -> "11122011301130.". A problem has up to 630 right answers, the data show one of them to each of
120 problems, and all arms draw on these problems alone. An answer is right when all its 15 tokens are. The student
has one layer and a sixth of the teacher's weights, and starts, as in the paper, from supervised fine-tuning (SFT).
Left out: the policy gradient that the paper can add for a reward. The mean over tokens is taken a sequence at a
time, as in the paper; TRL takes it over all tokens of a batch, and samples at temperature 0.9 where the paper has 1.

    python methods/gkd.py                       # 50 s of CPU time
    python methods/gkd.py --beta 0.5 --lmbda 0.5
"""
import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common


@dataclass
class Config(common.Config):
    PRESETS: ClassVar[dict] = {"smoke": dict(teacher_batch=16, sft_steps=3, problems=32, test=32, points=2)}

    data: Annotated[str, "the domain; arithmetic: sums with a chain of thought in any order"] = "arithmetic"
    terms: Annotated[int, "numbers to be added, in any order; the answer has 2 terms + 1 tokens"] = 7
    modulus: Annotated[int, "numbers are 0..modulus-1 and are added mod modulus", common.between(2, 10)] = 4
    problems: Annotated[int, "problems with right answers, from which all arms draw (paper: GSM8K, 7,473)"] = 120
    steps: Annotated[int, "distillation steps of every arm (paper: 10,000 on GSM8K)"] = 200
    batch: Annotated[int, "sequences a step, the students' (paper: 32)"] = 64
    lr: Annotated[float, "learning rate of all arms (paper: 3e-4 with Adafactor)"] = 6e-3
    lmbda: Annotated[float, "lambda of gkd: share of the steps on the student's own texts (TRL: 0.5)",
                     common.between(0, 1)] = 1.0
    beta: Annotated[float, "divergence of gkd: 0 forward KL, 1 reverse KL, between them JSD (TRL: 0.5)",
                    common.between(0, 1)] = 1.0
    temperature: Annotated[float, "of the student's texts in training (paper: 1, TRL: 0.9)"] = 1.0
    width: Annotated[int, "width of the student"] = 24
    depth: Annotated[int, "layers of the student"] = 1
    sft_steps: Annotated[int, "steps of the SFT from which all arms start"] = 150
    sft_lr: Annotated[float, "peak learning rate of the SFT"] = 5e-3
    teacher_width: Annotated[int, "width of the teacher"] = 48
    teacher_depth: Annotated[int, "layers of the teacher"] = 2
    teacher_steps: Annotated[int, "steps of the teacher, on problems without end"] = 500
    teacher_batch: Annotated[int, "batch of the teacher"] = 64
    teacher_lr: Annotated[float, "peak learning rate of the teacher"] = 6e-3
    test: Annotated[int, "unseen problems, one text each, for the metrics"] = 1000
    points: Annotated[int, "points of the accuracy curves"] = 6


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
    """SFT and SeqKD: -log p_S of tokens (B, L), a mean like that of gkd_loss."""
    return -common.masked_mean(common.token_log_probs(student, tokens), mask, by_sequence=True)


# ------------------------------------------------------------------------------------------- training

def distil(cfg, name, start, teacher, prompts, answers, eos, lmbda, beta, measure):
    """Algorithm 1 of the paper on prompts (N, P) and answers (N, L); beta None: cross-entropy on the answers instead.

    measure(student) gives a number, kept at cfg.points moments. Returns the student and the curve (2, points)."""
    student = copy.deepcopy(start).requires_grad_(True).train()
    optimizer = torch.optim.AdamW(student.parameters(), cfg.lr, (0.9, 0.99), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cfg.steps)
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
        teachers = common.generate(teacher, prompts, length, eos)   # SeqKD: one text of the teacher a problem

    def some(n):
        pick = torch.randint(len(prompts), (n,), device=cfg.dev)
        return prompts[pick], answers[pick]

    start = cfg.place(common.Transformer(arithmetic.TOKENS, cfg.width, cfg.depth, 4, span))
    start = common.language_model(cfg, "student", start, some, cfg.sft_steps, eos, cfg.batch, cfg.sft_lr,
                                  problems=cfg.problems, **key)

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
    for arm, texts, lmbda, beta in [
            ("SFT", answers, 0.0, None), ("SeqKD", teachers, 0.0, None), ("supervised KD", answers, 0.0, 0.0),
            ("off-policy, reverse KL", answers, 0.0, 1.0), ("on-policy, forward KL", answers, 1.0, 0.0),
            ("on-policy, JSD 0.5", answers, 1.0, 0.5), ("gkd", answers, cfg.lmbda, cfg.beta)]:
        student, curve = distil(cfg, arm, start, teacher, prompts, texts, eos, lmbda, beta, share_right)
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
    common.Claim("on-policy, forward KL", ">", "supervised KD", metric="acc", margin=0.05, scale="difference",
                 says="with the same divergence, the forward KL, own texts are better than the data's by 5 points"),
    common.Claim("gkd", ">", "off-policy, reverse KL", metric="acc", margin=0.1, scale="difference",
                 says="with the reverse KL by 10 points"),
    common.Claim("on-policy, forward KL", "<", "supervised KD", metric="kl_own", margin=0.7,
                 says="same divergence: on-policy cuts the KL to the teacher on the student's own texts by 30 %"),
    common.Claim("on-policy, forward KL", "<", "supervised KD", metric="mismatch", margin=0.5,
                 says="its ratio of the KL on own texts to that on the training texts is less than half as large"),
    common.Claim("gkd", ">", "on-policy, forward KL", metric="acc", margin=0.0, scale="difference",
                 says="on own texts the mode-seeking reverse KL gives more right chains than the forward KL"),
    common.Claim("gkd", "<", "on-policy, forward KL", metric="entropy", margin=0.95,
                 says="and less varied ones: its entropy is at least 5 % lower"),
    common.Claim("supervised KD", ">", "SFT", metric="acc", margin=0.0, scale="difference",
                 says="supervised KD is better than fine-tuning on the same right answers"),
]

NOTES = """Seeds differ much: 200 steps end before or after a student has learned the task (seed 0: 7 % right
with gkd, 13 % on-policy with the forward KL, 7 % supervised; seed 1: 88, 78 and 58 %), hence two claims
without a verdict. No arm has converged. What on-policy gains comes from few data: with 250 problems in place
of 120 and a longer fine-tuning (seed 100), supervised KD and on-policy were equal at the same divergence,
0.88 and 0.86 with the forward KL, 0.93 both with the reverse KL; with 1000 problems they were 0.91 and 0.87,
and 0.95 both. Supervised KD was expected to be closer to the teacher on the texts that it was trained on; on
tuning seed 110 it was not (0.049 against 0.029), so that claim was replaced, before seeds 0 to 4, by one
about the ratio of the two KLs. Seeds 0 to 4 were run once. Tuning was on seeds 100, 101 and 110: number of
problems, steps of the start, student widths 12, 16 and 24, learning rates 1e-3, 3e-3 and 6e-3, for all arms
alike, of which the largest was the best for supervised KD and for gkd on seed 101. Tried and dropped:
additions with a scratchpad and a teacher that corrects slips (seed 100: supervised 0.54, on-policy 0.18, both
with the forward KL; to correct slips is more than a student of this size learned in 200 steps)."""

if __name__ == "__main__":
    common.main(run, Config, CLAIMS)
