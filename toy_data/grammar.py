"""Text whose law is known, or a text of your own, with misprints, and cut into tokens in more than one way.

    source = Markov()                                       # or read("my.txt")
    text = source.sample(400, 48)                           # (400, 48) int64, numbers of characters in source.alphabet
    source.allowed(text), source.log_probs(text)            # share of what the law allows (400,); log p (400, 46)
    noisy = misprint(text, 0.15, len(source.alphabet))      # 15 % of the characters replaced by random ones
    letters = Tokenizer(source.alphabet)                    # one token a character
    pairs = learn(text, source.alphabet, 14)                # and 14 frequent pairs of them
    tokens, ends = pairs.encode(text)                       # (400, M) int64, and where in the text each token ends
    pairs.decode(tokens, 48)                                # text again
    show(text, source.alphabet)                             # list of str

A tokenizer takes the longest piece that fits, from left to right. Random numbers come from torch's global stream;
all tensors are on the CPU.
"""
import hashlib
import re
from collections import Counter
from pathlib import Path

import torch

import common

DATA_HELP = "'grammar', made-up text, or a plain UTF-8 text file, by its path or its name in the folder $DISTILL_DATA"


class Markov:
    """Letters of which each depends on the two before: `choices` of them can follow a pair, with random
    weights, and with probability `tail` any letter does. The law is drawn when the object is made."""

    def __init__(self, letters: int = 6, choices: int = 2, tail: float = 0.02):
        if not 1 <= choices <= letters <= 26 or letters < 2:
            raise ValueError(f"choices {choices} must be 1..letters, letters {letters} 2..26")
        self.alphabet = "abcdefghijklmnopqrstuvwxyz"[:letters]
        drawn = torch.rand(letters, letters, letters).argsort(2)[..., :choices]
        weights = torch.empty(letters, letters, choices).exponential_()
        clean = torch.zeros(letters, letters, letters).scatter(2, drawn, weights / weights.sum(2, keepdim=True))
        self.follow = clean > 0
        self.law = (1 - tail) * clean + tail / letters          # law[a, b, c] = P(c after a b)
        self.key = hashlib.sha256(self.law.numpy().tobytes()).hexdigest()[:16]  # for keys of cached teachers

    def sample(self, n: int, length: int, split: str = "train") -> torch.Tensor:
        """n fresh texts (n, length); the splits do not differ. Its first letters are dropped: it starts anywhere."""
        text = list(torch.randint(len(self.alphabet), (2, n)))
        for _ in range(length + 4):
            text.append(torch.multinomial(self.law[text[-2], text[-1]], 1)[:, 0])
        return torch.stack(text[6:], 1)

    def log_probs(self, text: torch.Tensor) -> torch.Tensor:
        """log p of every letter of text (n, L) but the first two: (n, L - 2)."""
        return self.law[text[:, :-2], text[:, 1:-1], text[:, 2:]].log()

    def allowed(self, text: torch.Tensor) -> torch.Tensor:
        """(n,): the share of the letters of text (n, L), from the third on, that are among those that can follow the
        two before; -1 (no letter) is not."""
        found = self.follow[tuple(x.clamp_min(0) for x in (text[:, :-2], text[:, 1:-1], text[:, 2:]))]
        return (found & (text.unfold(1, 3, 1) >= 0).all(2)).float().mean(1)


class Book:
    """A text of one's own: windows of it at random places; the last tenth is for tests. Its law is not known."""

    def __init__(self, text: str):
        self.alphabet = "".join(sorted(set(text)))
        number = {c: i for i, c in enumerate(self.alphabet)}
        whole = torch.tensor([number[c] for c in text])
        cut = len(whole) - len(whole) // 10
        self.parts = dict(train=whole[:cut], test=whole[cut:])
        self.key = hashlib.sha256(text.encode()).hexdigest()[:16]

    def sample(self, n: int, length: int, split: str = "train") -> torch.Tensor:
        """n windows (n, length) of the split "train" or "test"; common.UserError if it is shorter."""
        part = self.parts[split]
        if len(part) < length:
            raise common.UserError(f"the text's part for {split} has {len(part)} characters, a window {length}")
        return part.unfold(0, length, 1)[torch.randint(len(part) - length + 1, (n,))]


def read(name: str) -> Book:
    """The plain text file found by common.find_data. common.UserError, one line, for one that is missing, not UTF-8,
    shorter than 1,000 characters, or with fewer than 2 or more than 256 different ones."""
    path = common.find_data(name)
    if path is None:
        raise common.UserError(f"--data {name}: no such text (possible: {DATA_HELP})")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise common.UserError(f"{path}: not a UTF-8 text file (byte {error.start}: {error.reason})")
    except OSError as error:
        raise common.UserError(f"{path}: cannot be read ({error.strerror or error})")
    if len(text) < 1000:
        raise common.UserError(f"{path}: {len(text)} characters, at least 1000 are needed")
    if not 2 <= len(set(text)) <= 256:
        raise common.UserError(f"{path}: {len(set(text))} different characters, from 2 to 256 are possible")
    return Book(text)


def misprint(text: torch.Tensor, share: float, letters: int) -> torch.Tensor:
    """text (n, L) in which each character is replaced, with probability share, by any of the `letters` ones."""
    return torch.where(torch.rand(text.shape) < share, torch.randint(letters, text.shape), text)


def show(text: torch.Tensor, alphabet: str) -> list[str]:
    """text (n, L) as strings; -1 is left out."""
    return ["".join(alphabet[i] for i in row if i >= 0) for row in text.tolist()]


class Tokenizer:
    """Cuts text into pieces, the longest that fits first. pieces: the characters of the alphabet and then `longer`
    ones. bos: the number behind the pieces, also used as padding; size = bos + 1, what a network's vocabulary needs.

    open (size,) bool: a longer piece begins with this one. Where such a token ends, the model has said more than its
    letters: that what follows does not complete the longer piece."""

    def __init__(self, alphabet: str, longer: tuple[str, ...] = ()):
        self.alphabet, self.pieces = alphabet, (*alphabet, *longer)
        self.bos = len(self.pieces)
        self.size, self.number = self.bos + 1, {p: i for i, p in enumerate(self.pieces)}
        self.pattern = re.compile("|".join(re.escape(p) for p in sorted(self.pieces, key=len, reverse=True)))
        self.open = torch.tensor([any(q != p and q.startswith(p) for q in self.pieces) for p in self.pieces] + [False])
        longest = max(map(len, self.pieces))
        self.spelled = torch.tensor([[alphabet.index(c) for c in p] + [-1] * (longest - len(p)) for p in self.pieces]
                                    + [[-1] * longest])

    def split(self, text: str) -> list[str]:
        """The pieces of one string."""
        return self.pattern.findall(text)

    def encode(self, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """text (n, L) to tokens (n, M), padded with bos, and ends (n, M): the offset in characters behind each token,
        0 in the padding."""
        rows = [torch.tensor([self.number[p] for p in self.split(row)]) for row in show(text, self.alphabet)]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.bos)
        lengths = (self.spelled >= 0).sum(1)[tokens]
        return tokens, lengths.cumsum(1) * (tokens != self.bos)

    def decode(self, tokens: torch.Tensor, length: int) -> torch.Tensor:
        """tokens (n, M) to the first `length` characters (n, length); -1 where there are no more. Skips bos."""
        letters = self.spelled[tokens.cpu()].flatten(1)
        letters = letters.gather(1, (letters < 0).long().argsort(dim=1, stable=True))
        letters = torch.nn.functional.pad(letters, (0, max(0, length - letters.shape[1])), value=-1)
        return letters[:, :length]


def learn(text: torch.Tensor, alphabet: str, longer: int, longest: int = 2) -> Tokenizer:
    """A tokenizer whose pieces are the characters and `longer` others (fewer if the text has no more): again and again
    the most frequent pair of neighbouring tokens in text (n, L) becomes a piece, up to `longest` characters."""
    rows, pieces = show(text, alphabet), ()
    while len(pieces) < longer:
        split = Tokenizer(alphabet, pieces).split
        cut = [split(row) for row in rows]
        counts = Counter(a + b for row in cut for a, b in zip(row, row[1:]) if len(a) + len(b) <= longest)
        fresh = [p for p, _ in counts.most_common() if p not in pieces]
        if not fresh:
            break
        pieces += (fresh[0],)
    return Tokenizer(alphabet, pieces)
