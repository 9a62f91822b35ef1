"""Token sequences: sampling with a cache, log-probabilities, masks, divergences between next-token distributions, and
the pieces of reinforcement and preference learning that several methods share; all can be reached as common.<name>.

Prompts are (B, P) and completions (B, L), int64. `logits` (B, L, V) are those that predict the completion:
completion_logits(model, prompts, completions). `mask` (B, L) bool marks the tokens that count: answer_mask().
A divergence is a value for every position, (B, L); masked_mean() reduces it.
"""
import torch
import torch.nn.functional as F

__all__ = ["answer_mask", "clipped_policy_loss", "completion_logits", "dpo_loss", "entropy", "forward_kl", "generate",
           "group_advantages", "jensen_shannon", "masked_mean", "reverse_kl", "sequence_log_probs", "token_log_probs",
           "total_variation"]


# ------------------------------------------------------------------------------------------- sampling and log-probabilities

@torch.no_grad()
def generate(model, prompts: torch.Tensor, length: int, eos: int, temperature: float = 1.0, pad: int | None = None):
    """Sample completions (B, length) of prompts (B, P) from a causal Transformer; temperature 0 takes the likeliest.

    What follows the first `eos` of a row is `pad` (default: eos). Keys and values are cached, so that a token costs one
    call over one position; random numbers come from torch's global stream. Several completions of a prompt: repeat
    the prompt, prompts.repeat_interleave(n, 0)."""
    pad = eos if pad is None else pad
    out = torch.full((len(prompts), length), pad, device=prompts.device)
    cache, tokens = model.new_cache(), prompts
    open_ = torch.ones(len(prompts), dtype=torch.bool, device=prompts.device)
    for i in range(length):
        logits = model(tokens, cache=cache)[:, -1].float()
        if temperature > 0:
            token = torch.multinomial((logits / temperature).softmax(-1), 1)[:, 0]
        else:
            token = logits.argmax(-1)
        out[:, i] = torch.where(open_, token, pad)
        open_ = open_ & (token != eos)
        if not open_.any():
            break
        tokens = out[:, i:i + 1]
    return out


def completion_logits(model, prompts: torch.Tensor, completions: torch.Tensor) -> torch.Tensor:
    """(B, L, V): at position l the logits from which completions[:, l] is drawn, given the prompt and what precedes it."""
    return model(torch.cat([prompts, completions[:, :-1]], 1))[:, prompts.shape[1] - 1:]


def answer_mask(completions: torch.Tensor, eos: int) -> torch.Tensor:
    """(B, L) bool: the tokens up to and including the first eos; all where there is none."""
    ended = (completions == eos).cumsum(1)
    return (ended == 0) | ((ended == 1) & (completions == eos))


def masked_mean(values: torch.Tensor, mask: torch.Tensor, by_sequence: bool = False) -> torch.Tensor:
    """Mean of values (B, L) where mask (B, L) is True, 0 if it nowhere is: over all tokens of the batch, or with
    by_sequence over the tokens of a sequence and then over the sequences, so that long ones do not weigh more."""
    mask = mask.to(values.dtype)
    if by_sequence:
        return ((values * mask).sum(1) / mask.sum(1).clamp_min(1)).mean()
    return (values * mask).sum() / mask.sum().clamp_min(1)


def token_log_probs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """log p of tokens (B, L) under logits (B, L, V): (B, L), with gradient."""
    return -F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")


def sequence_log_probs(logits: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """log p of whole completions (B,): the sum over the tokens where mask is True."""
    return (token_log_probs(logits, tokens) * mask).sum(1)


# ------------------------------------------------------------------------------------------- divergences

def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of softmax(logits (..., V)): (...)."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def forward_kl(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(p || q), p = softmax(teacher), q = softmax(student), of logits (..., V): (...). Gradient to both arguments."""
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(q || p), the student's distribution first: (...)."""
    return forward_kl(student, teacher)


def jensen_shannon(teacher: torch.Tensor, student: torch.Tensor, beta: float) -> torch.Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, 0 < beta < 1: (...), at most log 2.
    Divided by beta it goes to the forward KL as beta -> 0, divided by 1 - beta to the reverse KL as beta -> 1."""
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    weight = torch.tensor([beta, 1 - beta], device=log_p.device, dtype=log_p.dtype).log()
    log_m = torch.logaddexp(log_p + weight[0], log_q + weight[1])
    return beta * (log_p.exp() * (log_p - log_m)).sum(-1) + (1 - beta) * (log_q.exp() * (log_q - log_m)).sum(-1)


def total_variation(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Half the l1 distance of the two distributions: (...), in [0, 1]."""
    return 0.5 * (teacher.softmax(-1) - student.softmax(-1)).abs().sum(-1)


# ------------------------------------------------------------------------------------------- rewards and preferences

def group_advantages(rewards: torch.Tensor, scale: bool = True, eps: float = 1e-6) -> torch.Tensor:
    """GRPO's advantages of rewards (prompts, group): less the group's mean and, with scale, divided by its standard
    deviation (n - 1 in the denominator) plus eps. Zero where all rewards of a group are equal."""
    advantage = rewards - rewards.mean(1, keepdim=True)
    return advantage / (rewards.std(1, keepdim=True) + eps) if scale and rewards.shape[1] > 1 else advantage


def clipped_policy_loss(log_p: torch.Tensor, old_log_p: torch.Tensor, advantage: torch.Tensor, low: float = 0.2,
                        high: float = 0.2) -> torch.Tensor:
    """PPO's loss of every token (B, L): -min(r A, clip(r, 1 - low, 1 + high) A), r = p / p_old. Gradient through log_p
    alone; advantage (B, L) or (B, 1)."""
    ratio, advantage = (log_p - old_log_p.detach()).exp(), advantage.detach()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def dpo_loss(chosen: torch.Tensor, rejected: torch.Tensor, reference_chosen: torch.Tensor,
             reference_rejected: torch.Tensor, beta: float = 0.1) -> torch.Tensor:
    """DPO's loss (B,) of sequence log-probabilities (B,): -log sigmoid(beta (margin of the policy - margin of the
    reference)). The reference carries no gradient."""
    margin = (chosen - rejected) - (reference_chosen - reference_rejected).detach()
    return -F.logsigmoid(beta * margin)
