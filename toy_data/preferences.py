"""Prompts, a writer's responses to them, a hidden reward and noisy preference pairs, generated without end.

    task = Preferences()                                    # a new hidden reward and a new writer
    prompts, responses = task.sample(64)                    # int64 (64, task.prompt_length), (64, task.length)
    prompts, chosen, rejected = task.pairs(1000, flip=0.1)  # two responses of the writer each, 10 % labelled wrongly
    held_out = task.prompts(500, split="test")              # prompts that "train" never hands out
    task.reward(held_out, task.write(held_out))             # (500,): about 0 on average; 1 is the best possible
    task.quality(held_out, task.write(held_out))            # (500, task.length): what each token adds to the reward
    task.best(held_out)                                     # (500, task.length): responses with the highest reward

A token is good or bad in view of the prompt and of the token before it: q(token | prompt, token before) is a
random network, and the reward is the mean of q over the response, on a scale where the writer has 0 and the best
response to each prompt 1 on average. The writer is a Markov chain: its logits are another linear map of the same
hidden features, so that who has read the writer knows what matters, but not, unless `skill` > 0, what is good.
Responses have `length` tokens and no end marker: EOS is a number that no token has, for functions that ask for it.
Prompts and responses share the tokens 0..tokens-1. Random numbers come from torch's global stream on the CPU; all
else works on the device of the tensors it is given.
"""
import hashlib
from pathlib import Path
from typing import Literal

import torch

EOS = -1
HELD_OUT = 10                                       # one prompt in ten belongs to the split "test"
KEY = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]      # a part of the key of cached teachers


def in_test(prompts: torch.Tensor) -> torch.Tensor:
    """(B, P) int64 >= 0 to (B,) bool: a fixed tenth of all prompts, by a hash of their tokens."""
    h = torch.full((len(prompts),), prompts.shape[1], device=prompts.device)
    for column in prompts.unbind(1):
        h = (h * 1_000_003 + column + 1) % 2_147_483_647        # below 2^31, so that no product overflows
        h = (h ^ (h >> 15)) * 48_271 % 2_147_483_647
    return (h >> 7) % HELD_OUT == 0


class Preferences:
    """tokens: size of the vocabulary; hidden: number of the features, the more the harder the reward;
    sharpness: how far the writer is from choosing all tokens alike; skill: how much its logits know of the reward."""

    def __init__(self, tokens: int = 10, prompt_length: int = 3, length: int = 6, hidden: int = 16,
                 sharpness: float = 1.5, skill: float = 0.0):
        if tokens < 2 or tokens**prompt_length < 20:
            raise ValueError(f"{tokens} tokens and prompts of {prompt_length} are too few for two splits")
        self.tokens, self.prompt_length, self.length = tokens, prompt_length, length
        self.sharpness, self.skill = sharpness, skill
        self.from_prompt = torch.randn(prompt_length, tokens, hidden) / prompt_length**0.5
        self.from_before = torch.randn(tokens + 1, hidden)     # the last row: before the first token of a response
        self.to_liking, self.to_habit = (torch.randn(hidden, tokens) / hidden**0.5 for _ in range(2))
        self.zero, self.one = 0.0, 1.0
        some = torch.randint(tokens, (1000, prompt_length))
        self.zero, self.one = self.expected(some).mean().item(), self.reward(some, self.best(some)).mean().item()

    def prompts(self, n: int, split: Literal["train", "test"] = "train") -> torch.Tensor:
        """n random prompts (n, prompt_length) of a split."""
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', got {split!r}")
        found, missing = [], n
        while missing > 0:
            drawn = torch.randint(self.tokens, (2 * missing + 20, self.prompt_length))
            found.append(drawn[in_test(drawn) == (split == "test")][:missing])
            missing -= len(found[-1])
        return torch.cat(found)

    def features(self, prompts: torch.Tensor) -> torch.Tensor:
        """What writer and reward have in common, (B, tokens + 1, hidden), by prompt and possible token before."""
        weights = self.from_prompt.to(prompts.device)
        seen = sum(weights[i, column] for i, column in enumerate(prompts.unbind(1)))
        return (seen[:, None] + self.from_before.to(prompts.device)).tanh()

    def transitions(self, prompts: torch.Tensor) -> torch.Tensor:
        """The writer's probabilities (B, tokens + 1, tokens) of the next token."""
        logits = self.sharpness * self.to_habit + self.skill * self.to_liking
        return (self.features(prompts) @ logits.to(prompts.device)).softmax(-1)

    def write(self, prompts: torch.Tensor) -> torch.Tensor:
        """A response (B, length) of the writer to each of prompts (B, prompt_length)."""
        law, row = self.transitions(prompts), torch.arange(len(prompts), device=prompts.device)
        token, out = torch.full_like(row, self.tokens), []
        for _ in range(self.length):
            token = torch.multinomial(law[row, token].cpu(), 1)[:, 0].to(prompts.device)
            out.append(token)
        return torch.stack(out, 1)

    def sample(self, n: int, split: Literal["train", "test"] = "train") -> tuple[torch.Tensor, torch.Tensor]:
        """n prompts and the writer's responses."""
        prompts = self.prompts(n, split)
        return prompts, self.write(prompts)

    def scores(self, prompts: torch.Tensor) -> torch.Tensor:
        """q (B, tokens + 1, tokens) of every token after every other; the reward is its mean over a response."""
        return (self.features(prompts) @ self.to_liking.to(prompts.device) - self.zero) / (self.one - self.zero)

    def quality(self, prompts: torch.Tensor, responses: torch.Tensor) -> torch.Tensor:
        """q of each token of responses (B, L): (B, L)."""
        first = torch.full_like(responses[:, :1], self.tokens)
        before = torch.cat([first, responses[:, :-1]], 1)
        row = torch.arange(len(prompts), device=prompts.device)[:, None]
        return self.scores(prompts)[row, before, responses]

    def reward(self, prompts: torch.Tensor, responses: torch.Tensor) -> torch.Tensor:
        """The hidden reward (B,) of responses (B, length)."""
        return self.quality(prompts, responses).mean(1)

    def pairs(self, n: int, flip: float = 0.1, split: Literal["train", "test"] = "train"):
        """n prompts with the preferred and the other one of two responses of the writer; with probability flip the
        label is wrong."""
        prompts = self.prompts(n, split)
        one, two = self.write(prompts), self.write(prompts)
        right = self.reward(prompts, one) >= self.reward(prompts, two)
        first = (right ^ (torch.rand(n) < flip))[:, None]
        return prompts, torch.where(first, one, two), torch.where(first, two, one)

    def expected(self, prompts: torch.Tensor) -> torch.Tensor:
        """The writer's mean reward (B,), exactly."""
        law, q = self.transitions(prompts), self.scores(prompts)
        at, total = torch.zeros_like(law[:, :, 0]), 0.0
        at[:, -1] = 1.0
        for _ in range(self.length):
            step = at[:, :, None] * law
            total = total + (step * q).sum((1, 2))
            at = torch.cat([step.sum(1), torch.zeros_like(at[:, :1])], 1)
        return total / self.length

    def best(self, prompts: torch.Tensor) -> torch.Tensor:
        """The response (B, length) with the highest reward to each of prompts, by dynamic programming."""
        q, value, choices = self.scores(prompts), 0.0, []
        for _ in range(self.length):
            value, choice = (q + value).max(-1)                 # over the next token, for every token before it
            choices.append(choice)
            value = value[:, None, :-1]
        row = torch.arange(len(prompts), device=prompts.device)
        token, out = torch.full_like(row, self.tokens), []
        for choice in reversed(choices):
            token = choice[row, token]
            out.append(token)
        return torch.stack(out, 1)
