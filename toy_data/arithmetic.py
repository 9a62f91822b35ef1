"""Arithmetic problems as characters, generated without end: prompts, chains of thought, a split, an exact verifier.

    task = Chain(steps=3)                               # "C7+4*2-5=" -> "127.", the value after each step mod 10
    prompts, answers = task.sample(64)                  # int64 (64, task.prompt_length), (64, task.answer_length)
    held_out, _ = task.sample(500, split="test")        # problems that "train" never hands out
    task.correct(held_out, completions)                 # (500,) bool: the final answer is right
    task.valid(held_out, completions)                   # (500,) bool: every step is right as well

Tasks are Addition, Chain, Sums, Parts and Sort, their size being the level of difficulty; Mixture makes one
task of several. A prompt begins with the letter of its task and ends with "=", an answer ends with EOS ".".
The digit d is the token d. Random numbers come from torch's global stream on the CPU; all else works on the
device of the tensors it is given.
"""
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

VOCABULARY = "0123456789+-*=;,._ACSPOabcdefghij"     # the small letters have no meaning here: tags, hints, styles
TOKENS = len(VOCABULARY)                            # a method's own tokens, e.g. a mask, begin at this number
INDEX = {character: i for i, character in enumerate(VOCABULARY)}
EOS, PAD = INDEX["."], INDEX["_"]
PLUS, MINUS, TIMES, EQUALS, NEXT = (INDEX[c] for c in "+-*=;")
HELD_OUT = 10                                       # one problem in ten belongs to the split "test"
KEY = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]      # a part of the key of cached teachers


def encode(text: str) -> torch.Tensor:
    """Characters to tokens (L,) int64; KeyError for a character outside VOCABULARY."""
    return torch.tensor([INDEX[c] for c in text], dtype=torch.long)


def decode(tokens: torch.Tensor) -> str | list[str]:
    """Tokens (L,) to text, (B, L) to a list of texts; a token beyond VOCABULARY becomes "#"."""
    if tokens.dim() > 1:
        return [decode(row) for row in tokens]
    return "".join(VOCABULARY[i] if i < TOKENS else "#" for i in tokens.tolist())


def in_test(operands: torch.Tensor) -> torch.Tensor:
    """(B, K) int64 >= 0 to (B,) bool: a fixed tenth of all problems, by a hash of the operands."""
    h = torch.full((len(operands),), operands.shape[1], device=operands.device)
    for column in operands.unbind(1):
        h = (h * 1_000_003 + column + 1) % 2_147_483_647        # below 2^31, so that no product overflows
        h = (h ^ (h >> 15)) * 48_271 % 2_147_483_647
    return (h >> 7) % HELD_OUT == 0


def columns(*parts) -> torch.Tensor:
    """Token columns, each (B,) or one int for all rows, to (B, number of columns) int64."""
    like = next(p for p in parts if torch.is_tensor(p))
    return torch.stack([p if torch.is_tensor(p) else torch.full_like(like, p) for p in parts], 1)


def slipped(value: torch.Tensor, modulus: int, slip: float) -> torch.Tensor:
    """value (B,) in 0..modulus-1; with probability slip one of the other numbers instead."""
    if not slip:
        return value
    other = (value + torch.randint(1, modulus, value.shape).to(value.device)) % modulus
    return torch.where(torch.rand(value.shape).to(value.device) < slip, other, value)


def end_of(completions: torch.Tensor) -> torch.Tensor:
    """Place (B,) of the first EOS in completions (B, L); L where there is none."""
    place = torch.arange(completions.shape[1], device=completions.device)
    return torch.where(completions == EOS, place, completions.shape[1]).amin(1)


class Task:
    """What all tasks share. A subclass sets the letter and the lengths and defines draw, prompt, read and answer."""
    letter: str                 # first token of every prompt
    prompt_length: int
    answer_length: int          # with EOS
    final_length: int           # tokens of the final answer, which stand just before EOS

    def draw(self, n: int) -> torch.Tensor:
        """n random problems as operands (n, K) int64."""
        raise NotImplementedError

    def prompt(self, operands: torch.Tensor) -> torch.Tensor:
        """Operands (B, K) to prompts (B, prompt_length)."""
        raise NotImplementedError

    def read(self, prompts: torch.Tensor) -> torch.Tensor:
        """Prompts (B, prompt_length) back to operands (B, K)."""
        raise NotImplementedError

    def answer(self, operands: torch.Tensor, slip: float = 0.0) -> torch.Tensor:
        """Operands to answers (B, answer_length). slip: chance of a wrong step, on which the later ones build."""
        raise NotImplementedError

    def key(self, operands: torch.Tensor) -> torch.Tensor:
        """What the split depends on (B, K): the same for problems that differ in the order of terms only."""
        return operands

    def sample(self, n: int, split: Literal["train", "test"] = "train", slip: float = 0.0):
        """n problems of a split: prompts (n, prompt_length) and answers (n, answer_length), int64."""
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', got {split!r}")
        operands = self.draw(0)
        for _ in range(100):
            more = self.draw(math.ceil((n - len(operands)) * (HELD_OUT + 3 if split == "test" else 1.2)) + 8)
            operands = torch.cat([operands, more[in_test(self.key(more)) == (split == "test")]])
            if len(operands) >= n:
                return self.prompt(operands[:n]), self.answer(operands[:n], slip)
        raise ValueError(f"{type(self).__name__} of this size has no problems for the split {split!r}")

    def solve(self, prompts: torch.Tensor) -> torch.Tensor:
        """A right answer (B, answer_length) to each of prompts (B, prompt_length)."""
        return self.answer(self.read(prompts))

    def correct(self, prompts: torch.Tensor, completions: torch.Tensor) -> torch.Tensor:
        """(B,) bool: completions (B, L) have an EOS, and the tokens just before the first one are the final answer."""
        end = end_of(completions)
        last = end[:, None] - torch.arange(self.final_length, 0, -1, device=end.device)
        final = completions.gather(1, last.clamp_min(0))
        right = self.solve(prompts)[:, -1 - self.final_length:-1]
        return (final == right).all(1) & (end >= self.final_length) & (end < completions.shape[1])

    def valid(self, prompts: torch.Tensor, completions: torch.Tensor) -> torch.Tensor:
        """(B,) bool: all tokens of completions (B, L) up to the first EOS are right, the steps as well."""
        if completions.shape[1] < self.answer_length:
            return torch.zeros(len(completions), dtype=torch.bool, device=completions.device)
        return (completions[:, :self.answer_length] == self.solve(prompts)).all(1)


class Addition(Task):
    """a + b, of `digits` digits each: "A57+68=". cot: "short" gives carry and digit from the last place on,
    "15;12;=125."; "long" the sums too, "7+8+0=15;5+6+1=12;=125."; "none" the sum alone, last digit first,
    "521."; "forward" the sum alone, first digit first, "125.", where a digit waits for all carries behind it."""
    letter = "A"

    def __init__(self, digits: int, cot: Literal["none", "forward", "short", "long"] = "short"):
        self.digits, self.cot = digits, cot
        self.prompt_length, self.final_length = 2 * digits + 3, digits + 1
        steps = {"none": 0, "forward": 0, "short": 3 * digits + 1, "long": 9 * digits + 1}[cot]
        self.answer_length = steps + self.final_length + 1

    def draw(self, n):
        return torch.randint(10, (n, 2 * self.digits))

    def prompt(self, operands):
        a, b = operands.chunk(2, 1)
        return columns(INDEX["A"], *a.unbind(1), PLUS, *b.unbind(1), EQUALS)

    def read(self, prompts):
        d = self.digits
        return torch.cat([prompts[:, 1:1 + d], prompts[:, 2 + d:2 + 2 * d]], 1)

    def key(self, operands):        # a + b and b + a
        a, b = operands.chunk(2, 1)
        place = 10 ** torch.arange(self.digits - 1, -1, -1, device=operands.device)
        swap = (a * place).sum(1) > (b * place).sum(1)
        return torch.where(swap[:, None], torch.cat([b, a], 1), operands)

    def answer(self, operands, slip=0.0):
        a, b = (x.flip(1).unbind(1) for x in operands.chunk(2, 1))
        carry, steps, total = torch.zeros_like(operands[:, 0]), [], []
        for x, y in zip(a, b):
            z = slipped(x + y + carry, 20, slip)
            if self.cot == "long":
                steps += [x, PLUS, y, PLUS, carry, EQUALS]
            steps += [z // 10, z % 10, NEXT]
            carry = z // 10
            total.append(z % 10)
        total.append(carry)
        if self.cot == "none":
            return columns(*total, EOS)
        return columns(*([*steps, EQUALS] if self.cot != "forward" else []), *reversed(total), EOS)


class Chain(Task):
    """`steps` operations, from left to right mod `modulus`: "C7+4*2=". cot: "short" gives the value after every step,
    "12."; "long" the steps, "7+4=1;1*2=2;=2."; "none" the result, "2."."""
    letter, final_length = "C", 1

    def __init__(self, steps: int, modulus: int = 10, operations: str = "+-*",
                 cot: Literal["none", "short", "long"] = "short"):
        if not 2 <= modulus <= 10 or not operations or set(operations) - set("+-*"):
            raise ValueError(f"modulus must be in 2..10 and operations from '+-*', got {modulus} and {operations!r}")
        self.steps, self.modulus, self.cot, self.operations = steps, modulus, cot, encode(operations)
        self.prompt_length = 2 * steps + 3
        self.answer_length = {"none": 2, "short": steps + 1, "long": 6 * steps + 3}[cot]

    def draw(self, n):
        operations = self.operations[torch.randint(len(self.operations), (n, self.steps))]
        return torch.cat([torch.randint(self.modulus, (n, self.steps + 1)), operations], 1)

    def prompt(self, operands):
        first, values, operations = operands.split([1, self.steps, self.steps], 1)
        return columns(INDEX["C"], first[:, 0], *torch.stack([operations, values], 2).flatten(1).unbind(1), EQUALS)

    def read(self, prompts):
        return torch.cat([prompts[:, 1:-1:2], prompts[:, 2:-1:2]], 1)

    def answer(self, operands, slip=0.0):
        first, values, operations = operands.split([1, self.steps, self.steps], 1)
        value, steps = first[:, 0], []
        for x, operation in zip(values.unbind(1), operations.unbind(1)):
            new = torch.where(operation == TIMES, value * x, torch.where(operation == PLUS, value + x, value - x))
            new = slipped(new % self.modulus, self.modulus, slip)
            steps += [value, operation, x, EQUALS, new, NEXT] if self.cot == "long" else [new]
            value = new
        return columns(*{"none": [value], "short": steps, "long": [*steps, EQUALS, value]}[self.cot], EOS)


class Sums(Task):
    """`terms` numbers added one after the other mod `modulus`: "S3142=" -> "33144820.", in steps of a term and the
    sum so far. Every order of the terms is valid. order: that of the answers handed out; with "any" it is
    random, and a problem has many right answers."""
    letter, final_length = "S", 1

    def __init__(self, terms: int, modulus: int = 10, order: Literal["forward", "backward", "any"] = "forward"):
        if not 2 <= modulus <= 10:
            raise ValueError(f"modulus must be in 2..10, got {modulus}")
        self.terms, self.modulus, self.order = terms, modulus, order
        self.prompt_length, self.answer_length = terms + 2, 2 * terms + 1

    def draw(self, n):
        return torch.randint(self.modulus, (n, self.terms))

    def prompt(self, operands):
        return columns(INDEX["S"], *operands.unbind(1), EQUALS)

    def read(self, prompts):
        return prompts[:, 1:-1]

    def key(self, operands):
        return operands.sort(1)[0]

    def solve(self, prompts):       # the terms as they stand even for "any": a verifier must not draw random numbers
        order = "backward" if self.order == "backward" else "forward"
        return Sums(self.terms, self.modulus, order).answer(self.read(prompts))

    def answer(self, operands, slip=0.0):
        if self.order == "any":
            operands = operands.gather(1, torch.rand(operands.shape).argsort(1).to(operands.device))
        elif self.order == "backward":
            operands = operands.flip(1)
        value, steps = torch.zeros_like(operands[:, 0]), []
        for x in operands.unbind(1):
            value = slipped((value + x) % self.modulus, self.modulus, slip)
            steps += [x, value]
        return columns(*steps, EOS)

    def valid(self, prompts, completions):
        if completions.shape[1] < self.answer_length:
            return torch.zeros(len(completions), dtype=torch.bool, device=completions.device)
        terms, sums = completions[:, 0:2 * self.terms:2], completions[:, 1:2 * self.terms:2]
        right = (self.key(terms) == self.key(self.read(prompts))) & (sums == terms.cumsum(1) % self.modulus)
        return right.all(1) & (end_of(completions) == self.answer_length - 1)


class Parts(Task):
    """Each of `terms` digits as `parts` digits that add up to it: "P583=" -> "237121.", that is 5 = 2 + 3, 8 = 7 + 1
    and 3 = 2 + 1, cut at random places. All parts of a digit but one are free: a problem has many right
    answers. The final answer is the whole."""
    letter = "P"

    def __init__(self, terms: int, parts: int = 2):
        self.terms, self.parts = terms, parts
        self.prompt_length, self.answer_length, self.final_length = terms + 2, terms * parts + 1, terms * parts

    def draw(self, n):
        return torch.randint(10, (n, self.terms))

    def prompt(self, operands):
        return columns(INDEX["P"], *operands.unbind(1), EQUALS)

    def read(self, prompts):
        return prompts[:, 1:-1]

    def solve(self, prompts):       # every digit as itself and zeros: a verifier must not draw random numbers
        digits = self.read(prompts)
        rest = digits.new_zeros(*digits.shape, self.parts - 1)
        return columns(*torch.cat([digits[..., None], rest], 2).flatten(1).unbind(1), EOS)

    def answer(self, operands, slip=0.0):
        cuts = torch.rand(*operands.shape, self.parts - 1).to(operands.device) * (operands[..., None] + 1)
        ends = torch.cat([torch.zeros_like(operands)[..., None], cuts.long().sort(2)[0], operands[..., None]], 2)
        parts = ends.diff(dim=2).flatten(1).unbind(1)
        return columns(*(slipped(x, 10, slip) for x in parts), EOS)

    def valid(self, prompts, completions):
        if completions.shape[1] < self.answer_length:
            return torch.zeros(len(completions), dtype=torch.bool, device=completions.device)
        parts = completions[:, :self.final_length].unflatten(1, (self.terms, self.parts))
        right = (parts.sum(2) == self.read(prompts)) & (parts < 10).all(2)
        return right.all(1) & (end_of(completions) == self.answer_length - 1)

    correct = valid


class Sort(Task):
    """`terms` digits in rising order: "O3142=" -> "1234."."""
    letter = "O"

    def __init__(self, terms: int):
        self.terms = self.final_length = terms
        self.prompt_length, self.answer_length = terms + 2, terms + 1

    def draw(self, n):
        return torch.randint(10, (n, self.terms))

    def prompt(self, operands):
        return columns(INDEX["O"], *operands.unbind(1), EQUALS)

    def read(self, prompts):
        return prompts[:, 1:-1]

    def key(self, operands):
        return operands.sort(1)[0]

    def answer(self, operands, slip=0.0):
        return columns(*(slipped(x, 10, slip) for x in operands.sort(1)[0].unbind(1)), EOS)


class Mixture:
    """Several tasks or levels as one: prompts have PAD before, answers PAD behind, up to the longest. weights: how
    often each is drawn (default: equally). No two tasks may share both letter and prompt length, by which
    kind() tells them."""

    def __init__(self, tasks: Sequence[Task], weights: Sequence[float] | None = None):
        self.tasks = tuple(tasks)
        self.weights = torch.tensor(weights or [1.0] * len(tasks), dtype=torch.float)
        if len({(task.letter, task.prompt_length) for task in self.tasks}) < len(self.tasks):
            raise ValueError("two tasks of a mixture have the same letter and the same prompt length")
        self.prompt_length = max(task.prompt_length for task in self.tasks)
        self.answer_length = max(task.answer_length for task in self.tasks)

    def sample(self, n: int, split: Literal["train", "test"] = "train", slip: float = 0.0):
        """n problems: prompts (n, prompt_length) and answers (n, answer_length)."""
        kind = torch.multinomial(self.weights, n, replacement=True)
        prompts, answers = (torch.full((n, L), PAD) for L in (self.prompt_length, self.answer_length))
        for i, task in enumerate(self.tasks):
            rows = (kind == i).nonzero()[:, 0]
            p, a = task.sample(len(rows), split, slip)
            prompts[rows, self.prompt_length - p.shape[1]:], answers[rows, :a.shape[1]] = p, a
        return prompts, answers

    def kind(self, prompts: torch.Tensor) -> torch.Tensor:
        """(B,) int64: which of the tasks each prompt is of; -1 for none."""
        found = torch.full((len(prompts),), -1, device=prompts.device)
        for i, task in enumerate(self.tasks):
            start = self.prompt_length - task.prompt_length
            found[(prompts[:, start] == INDEX[task.letter]) & (prompts[:, :start] == PAD).all(1)] = i
        return found

    def _each(self, name, prompts, *others, out):
        kind = self.kind(prompts)
        for i, task in enumerate(self.tasks):
            rows = kind == i
            own = prompts[rows, self.prompt_length - task.prompt_length:]
            value = getattr(task, name)(own, *(x[rows] for x in others))
            if value.dim() > 1:
                value = F.pad(value, (0, out.shape[1] - value.shape[1]), value=PAD)
            out[rows] = value
        return out

    def solve(self, prompts: torch.Tensor) -> torch.Tensor:
        """A right answer (B, answer_length) to each of prompts (B, prompt_length), PAD behind."""
        return self._each("solve", prompts, out=prompts.new_full((len(prompts), self.answer_length), PAD))

    def correct(self, prompts: torch.Tensor, completions: torch.Tensor) -> torch.Tensor:
        """Task.correct, row by row."""
        return self._each("correct", prompts, completions, out=torch.zeros_like(prompts[:, 0], dtype=torch.bool))

    def valid(self, prompts: torch.Tensor, completions: torch.Tensor) -> torch.Tensor:
        """Task.valid, row by row."""
        return self._each("valid", prompts, completions, out=torch.zeros_like(prompts[:, 0], dtype=torch.bool))
