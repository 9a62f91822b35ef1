"""Spoken strings of phonemes as small mel-like spectrograms, generated without end, with everything in them known.

    clips = tones.sample(64)                                    # a NamedTuple, see Clips
    clips.mel, clips.mask                                       # (64, 20, 32) in about [-1, 1], bin 0 low; (64, 32) bool
    clips.string, clips.durations                               # int64 (64, 8), PAD and 0 after the end
    clips.phoneme, clips.pitch                                  # of every frame (64, 32); PAD after the end
    batch = tones.pick(clips, 16)                               # some of them, for training on a finite set
    again = tones.read(clips.string, clips.durations, 32)       # the same text read once more
    voices = tones.sample(64, 48, (10, 12), speakers=4)         # four speakers, at most 48 frames, 10 to 12 phonemes

A phoneme has two formants (centre, height, width), a voicing and a breathiness; stops are closed until their last
frame. A grammar of syllables with favourite successors makes strings. The formants glide from one phoneme to the next
(coarticulation) and voiced frames carry harmonics, a ripple along the frequency axis whose period is the pitch. What a
text does not determine is drawn for each reading: pitch, its slope and vibrato, size of the vocal tract, loudness,
the texture of noisy sounds. A speaker has a usual pitch and tract. Random numbers come from torch's global stream.
"""
import hashlib
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

BINS = 20
VOWELS, SONORANTS, FRICATIVES, STOPS = "ieaouy", "mnlr", "sfz", "ptk"
PHONEMES = VOWELS + SONORANTS + FRICATIVES + STOPS
PAD = len(PHONEMES)                         # no phoneme; a table of embeddings needs PAD + 1 rows
KEY = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]      # a part of the key of cached teachers
LENGTHS = {"vowel": (3, 6), "other": (2, 4)}    # frames of a phoneme, both ends included
PITCH = (2.6, 4.4)                          # distance of two harmonics, in bins

#                   first formant       second formant
#                   centre height width centre height width voiced breath
FORMANTS = dict(i=( 2.5,   1.6,   1.5,  14.0,  1.2,   1.6,  1.0,   0.0),
                e=( 4.5,   1.6,   1.5,  12.0,  1.2,   1.6,  1.0,   0.0),
                a=( 7.0,   1.7,   1.5,  11.0,  1.5,   1.6,  1.0,   0.0),
                o=( 5.0,   1.7,   1.5,   8.5,  1.3,   1.6,  1.0,   0.0),
                u=( 2.5,   1.6,   1.5,   6.0,  1.1,   1.5,  1.0,   0.0),
                y=( 2.5,   1.6,   1.5,  10.5,  1.2,   1.6,  1.0,   0.0),
                m=( 1.5,   1.1,   1.3,   6.0,  0.4,   1.3,  1.0,   0.0),
                n=( 1.5,   1.1,   1.3,  10.0,  0.4,   1.3,  1.0,   0.0),
                l=( 3.5,   1.1,   1.3,  15.0,  0.6,   1.3,  1.0,   0.0),
                r=( 3.5,   1.1,   1.3,   8.0,  0.7,   1.3,  1.0,   0.0),
                s=(15.0,   0.6,   2.0,  17.5,  1.3,   2.0,  0.0,   1.0),
                f=( 9.0,   0.6,   3.0,  14.0,  0.6,   3.0,  0.0,   1.0),
                z=( 2.0,   0.8,   1.3,  17.0,  1.0,   2.0,  0.5,   0.7),
                p=( 2.5,   1.2,   1.5,   5.0,  0.8,   2.0,  0.0,   0.5),
                t=(14.0,   0.8,   2.0,  17.0,  1.2,   2.0,  0.0,   0.5),
                k=( 8.0,   0.8,   1.5,  11.0,  1.2,   1.5,  0.0,   0.5))
TABLE = torch.tensor([FORMANTS[p] for p in PHONEMES] + [(10.0, 0.0, 2.0, 10.0, 0.0, 2.0, 0.0, 0.0)])


class Clips(NamedTuple):
    """n clips, padded: mel (n, BINS, frames), 0 after the end; mask (n, frames) bool; string and durations (n, most
    phonemes) int64; alignment and phoneme (n, frames), what alignment() and expand() give; speaker (n,) int64; pitch
    (n, frames), distance of the harmonics in bins."""
    mel: torch.Tensor
    mask: torch.Tensor
    string: torch.Tensor
    durations: torch.Tensor
    alignment: torch.Tensor
    phoneme: torch.Tensor
    speaker: torch.Tensor
    pitch: torch.Tensor


def grammar() -> torch.Tensor:
    """Transition probabilities (PAD, PAD), row = phoneme now. A vowel follows every consonant; after a vowel comes a
    consonant or, in 1 of 8 cases, another vowel. Of the phonemes allowed each one has favourites, six times as likely."""
    vowel = torch.tensor([p in VOWELS for p in PHONEMES])
    now, after = torch.arange(PAD)[:, None], torch.arange(PAD)
    weight = torch.where((3 * now + after) % 4 == 0, 6.0, 1.0)
    to_vowel, to_other = weight * vowel * (now != after), weight * ~vowel
    share = torch.where(vowel, 1 / 8, 1.0)[:, None]
    return share * to_vowel / to_vowel.sum(1, keepdim=True) + (1 - share) * to_other / to_other.sum(1, keepdim=True)


TRANSITIONS = grammar()


def strings(n: int, phonemes: tuple[int, int] = (5, 8), frames: int = 32, device: torch.device | str = "cpu"):
    """n random strings (n, most) int64, PAD after the end, and durations of the same shape, 0 there. The number of
    phonemes is even in the range; those that would not end within `frames` are left out."""
    low, most = phonemes
    rows = TRANSITIONS.to(device)
    now = torch.randint(PAD, (n,), device=device)
    found = [now]
    for _ in range(most - 1):
        now = torch.multinomial(rows[now], 1)[:, 0]
        found.append(now)
    string = torch.stack(found, 1)
    (a, b), (c, d) = LENGTHS["vowel"], LENGTHS["other"]
    long, short = (torch.randint(i, j + 1, string.shape, device=device) for i, j in ((a, b), (c, d)))
    durations = torch.where(string < len(VOWELS), long, short)
    count = torch.randint(low, most + 1, (n, 1), device=device)
    there = (torch.arange(most, device=device) < count) & (durations.cumsum(1) <= frames)
    return torch.where(there, string, PAD), durations * there


def alignment(durations: torch.Tensor, frames: int) -> torch.Tensor:
    """For durations (n, P) the position in the string that each frame belongs to (n, frames), P after the end."""
    now = torch.arange(frames, device=durations.device).expand(len(durations), frames)
    return torch.searchsorted(durations.cumsum(1), now.contiguous(), right=True)


def expand(string: torch.Tensor, durations: torch.Tensor, frames: int) -> torch.Tensor:
    """The phoneme of each frame (n, frames) int64, PAD after the end."""
    return torch.cat([string, torch.full_like(string[:, :1], PAD)], 1).gather(1, alignment(durations, frames))


def tracks(string: torch.Tensor, durations: torch.Tensor, frames: int) -> torch.Tensor:
    """What the text alone determines: the eight columns of FORMANTS for each frame, with closures and coarticulation,
    (n, frames, 8). Depends on neighbouring phonemes over two frames."""
    index, phoneme = alignment(durations, frames), expand(string, durations, frames)
    parts = TABLE.to(string.device)[phoneme]
    following = torch.cat([index[:, 1:], torch.full_like(index[:, :1], durations.shape[1])], 1)
    closed = (phoneme >= PHONEMES.index(STOPS[0])) & (phoneme < PAD) & (following == index)
    parts[..., 1] *= torch.where(closed, 0.1, 1.0)
    parts[..., 4] *= torch.where(closed, 0.1, 1.0)
    for _ in range(2):      # a glide is a running mean with weights 1, 2, 1
        padded = torch.cat([parts[:, :1], parts, parts[:, -1:]], 1)
        parts = (padded[:, :-2] + 2 * parts + padded[:, 2:]) / 4
    return parts


def read(string: torch.Tensor, durations: torch.Tensor, frames: int, speaker: torch.Tensor | None = None,
         speakers: int = 1, ripple: float = 0.7) -> Clips:
    """A random reading of each text. speaker (n,) in 0..speakers-1 sets the middle of pitch and tract (None: drawn);
    with one speaker they vary over the whole range. ripple: depth of the harmonics."""
    n, device = len(string), string.device
    if speaker is None:
        speaker = torch.randint(speakers, (n,), device=device)

    def normal(*shape):
        return torch.randn(n, *shape, device=device)

    def even(low, high):
        return low + (high - low) * torch.rand(n, 1, device=device)
    voice = (speaker[:, None] + even(0, 1)) / speakers                  # 0..1, each speaker an equal part
    time = torch.arange(frames, device=device) / 32
    contour = even(-0.2, 0.2) * (time - 0.5) + 0.06 * torch.sin(2 * math.pi * (3 * time + even(0, 1)))
    pitch = PITCH[0] * (PITCH[1] / PITCH[0]) ** voice * contour.exp()
    tract = 0.8 * (voice - 0.5) + 0.3 * normal(1)                       # in bins
    c1, h1, w1, c2, h2, w2, voiced, breath = tracks(string, durations, frames)[..., None].unbind(2)
    bins = torch.arange(BINS, device=device)
    envelope = sum(h * torch.exp(-(bins - c - tract[..., None]).square() / (2 * w * w)) for c, h, w in
                   ((c1, h1, w1), (c2, h2, w2)))
    harmonics = torch.cos(2 * math.pi * (bins + 1) / pitch[..., None])
    texture = ripple * voiced * harmonics + 0.4 * breath * normal(frames, BINS)
    mel = -1 + (0.1 * normal(1, 1)).exp() * envelope * (1 + texture) + 0.03 * normal(frames, BINS)
    mask = torch.arange(frames, device=device) < durations.sum(1, keepdim=True)
    return Clips((mel * mask[..., None]).transpose(1, 2), mask, string, durations, alignment(durations, frames),
                 expand(string, durations, frames), speaker, pitch)


def sample(n: int, frames: int = 32, phonemes: tuple[int, int] = (5, 8), speakers: int = 1, ripple: float = 0.7,
           device: torch.device | str = "cpu") -> Clips:
    """n random texts, each read once by a random speaker."""
    return read(*strings(n, phonemes, frames, device), frames, None, speakers, ripple)


def pick(clips: Clips, n: int) -> Clips:
    """n of the clips at random, with replacement."""
    index = torch.randint(len(clips.mel), (n,), device=clips.mel.device)
    return Clips(*(part[index] for part in clips))


class Recogniser(nn.Module):
    """A judge of spectrograms, to be trained by loss() on real ones: mel (n, BINS, frames) -> logits (n, PAD, frames) of
    the phoneme and logarithm of the pitch (n, frames). body() are its features (n, width, frames)."""

    def __init__(self, width: int = 64):
        super().__init__()
        first, second = nn.Conv1d(BINS, width, 5, padding=2), nn.Conv1d(width, width, 5, padding=2)
        self.body = nn.Sequential(first, nn.SiLU(), second, nn.SiLU())
        self.phoneme, self.pitch = nn.Conv1d(width, PAD, 1), nn.Conv1d(width, 1, 1)

    def forward(self, mel):
        h = self.body(mel)
        return self.phoneme(h), self.pitch(h)[:, 0]

    def loss(self, clips: Clips) -> dict[str, torch.Tensor]:
        """Cross-entropy of the phonemes and, in vowels, ten times the squared error of the logarithm of the pitch."""
        logits, pitch = self(clips.mel)
        vowel = clips.phoneme < len(VOWELS)
        return dict(phoneme=F.cross_entropy(logits, clips.phoneme, ignore_index=PAD),
                    pitch=10 * (pitch - clips.pitch.log())[vowel].square().mean())


def accuracy(recogniser: Recogniser, mel: torch.Tensor, clips: Clips) -> float:
    """Share of the frames of mel (n, BINS, frames) in which the recogniser finds the phoneme that the text asks for."""
    with torch.no_grad():
        return (recogniser(mel)[0].argmax(1) == clips.phoneme)[clips.mask].float().mean().item()


def detail(mel: torch.Tensor, mask: torch.Tensor) -> float:
    """Power of the second difference along the frequency axis: high with sharp harmonics, low when they are averaged."""
    return mel.diff(n=2, dim=1).square().transpose(1, 2)[mask].mean().item()


def text(string: torch.Tensor) -> list[str]:
    """Strings (n, P) of int64 as text, without the padding."""
    return ["".join(PHONEMES[i] for i in row if i != PAD) for row in string.tolist()]


def gallery(mel: torch.Tensor, mask: torch.Tensor, columns: int = 2) -> torch.Tensor:
    """Spectrograms (n, BINS, frames) as one array for a heat panel: low bins at the bottom, blank after the end of a
    clip (mask (n, frames)), `columns` side by side, a dark frame round each."""
    shown = torch.where(mask[:, None], mel, -1).flip(1).clamp(-1, 1.5)
    framed = F.pad(shown, (1, 1, 1, 1), value=1.5)
    rows = framed[:len(mel) // columns * columns].split(columns)
    return torch.cat([torch.cat(list(row), 1) for row in rows])
