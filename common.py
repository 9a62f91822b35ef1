"""Everything that the methods need and that is not a method: configuration, the training loop with checkpoints,
data, networks, cached teachers, flow and diffusion basics, metrics, pictures, claims and the ledger.

Conventions. Images are (B, C, H, W) in [-1, 1], points (B, D) of unit variance, labels (B,) int64 or None. A flow has
x_t = (1 - t) x + t noise with t = 0 data and t = 1 noise, velocity v = noise - x, and t is a tensor of shape (B,).
EDM notation writes x_sigma = x + sigma noise; then sigma = t / (1 - t) and x_t = x_sigma / (1 + sigma).
A network is called as net(x, t, y=None, s=None), y being labels (None or the value `classes` = no class) and s a
second time for networks built with times=2.
"""
import argparse
import contextlib
import copy
import dataclasses
import difflib
import hashlib
import importlib
import io
import json
import math
import os
import re
import shutil
import sys
import time
import types
import typing
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import language
from language import *
from metrics import *
from networks import GCN, MLP, ResNet, TimeFeatures, Transformer, UNet
from toy_data.points import NAMES, Points

__all__ = ["GCN", "MLP", "ResNet", "TimeFeatures", "Transformer", "UNet"]      # those of networks.py, for readers of scripts
ROOT = Path(__file__).resolve().parent
TOY = ROOT / "toy_data"
DATA_HELP = "a toy data set, a name in the folder $DISTILL_DATA, or a path to a .npz file"
LEDGER = 1      # raise only when a change in this file can move results: it makes every results file stale


class UserError(Exception):
    """Something the user can put right: main prints it as one line and exits with code 2."""


class NonFiniteLoss(Exception):
    """A loss term became NaN or infinite: main prints the step and the term and exits with code 1."""


# ---------------------------------------------------------------------------------------------- configuration

class between(NamedTuple):
    """Range of a Config field: Annotated[float, "help", between(0, 1)]. Without it an int is >= 1, a float >= 0."""
    low: float = -math.inf
    high: float = math.inf


@dataclass(kw_only=True)
class Config:
    """Options that all scripts share; a script's Config adds its hyper-parameters, each Annotated[type, "help"].

    PRESETS maps a situation to settings that replace the defaults there, while explicit flags still win:
    "points", "images" (any image data), "cifar" (32x32 images), a data set's name, "smoke". Of a preset in this class only the
    fields that a script has are used.
    """
    PRESETS: ClassVar[dict] = {"smoke": dict(steps=3, teacher_steps=3, batch=16, eval_samples=64, pairs=64)}

    data: Annotated[str, DATA_HELP] = "eight_gaussians"
    seed: Annotated[int, "first random seed", between(0)] = 0
    seeds: Annotated[int, "how many seeds to run, from --seed on; claims are judged over them"] = 1
    steps: Annotated[int, "optimiser steps of every arm"] = 1000
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], "where to compute; auto: cuda if there is one, else cpu"] = "auto"
    amp: Annotated[bool, "bfloat16 autocast"] = False
    compile: Annotated[bool, "torch.compile the networks"] = False
    out: Annotated[str, "folder for the picture, the JSON and the checkpoints"] = "runs"
    resume: Annotated[bool, "continue an interrupted run of the same configuration"] = False
    smoke: Annotated[bool, "tiny settings: walk through every line in about 2 s"] = False
    fid: Annotated[bool, "image generators: also FID in torchvision's Inception features (downloads its weights)"] = False
    threads: Annotated[int, "CPU threads; 0: torch's own choice", between(0)] = 0
    checkpoint_every: Annotated[float, "seconds between checkpoints"] = 30.0
    preview_every: Annotated[float, "seconds between pictures of samples in OUT/<name>.state, by image generators"] = 300.0

    def __post_init__(self):
        self.context = types.SimpleNamespace(state=None, seconds={}, steps={})  # for checkpoints; times and steps of loops

    @property
    def dev(self) -> torch.device:
        """The torch device; UserError if it does not exist here."""
        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: no CUDA device is available here (possible: auto, cpu)")
        if name == "mps" and not torch.backends.mps.is_available():
            raise UserError("--device mps: not available here (possible: auto, cpu)")
        return torch.device(name)

    def autocast(self):
        """Context for a forward pass: bfloat16 autocast with --amp, else nothing."""
        return torch.autocast(self.dev.type, torch.bfloat16) if self.amp else contextlib.nullcontext()

    def place(self, module: nn.Module) -> nn.Module:
        """Move a network to the device, channels_last on CUDA, compiled in place with --compile."""
        module.to(self.dev)
        if self.dev.type == "cuda" and any(p.dim() == 4 for p in module.parameters()):
            module.to(memory_format=torch.channels_last)
        if self.compile:
            module.compile()
        return module


class Parser(argparse.ArgumentParser):
    """argparse that reports an error in one line, with the nearest option for a mistyped one, and exits with 2."""
    def error(self, message):
        if message.startswith("unrecognized arguments: "):
            word = message.split()[2].split("=")[0]
            near = difflib.get_close_matches(word, self._option_string_actions, 1)
            message = f"unknown option {word}" + (f", did you mean {near[0]}?" if near else "")
        sys.stderr.write(f"error: {message} (--help lists all options)\n")
        raise SystemExit(2)


def option(hint) -> dict:
    """argparse arguments for one annotated field: type, choices, range."""
    kind, *rest = typing.get_args(hint)
    text, bounds = rest[0], (rest[1] if len(rest) > 1 else None)
    if kind is bool:
        return dict(action=argparse.BooleanOptionalAction, help=text)
    if typing.get_origin(kind) is Literal:
        return dict(choices=typing.get_args(kind), help=text)
    many = typing.get_origin(kind) is tuple
    scalar = typing.get_args(kind)[0] if many else kind
    low, high = bounds or {int: between(1), float: between(0)}.get(scalar, between())

    def convert(word):
        try:
            value = scalar(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{word!r} is not {'an integer' if scalar is int else 'a number'}")
        if scalar is not str and not (math.isfinite(value) and low <= value <= high):
            raise argparse.ArgumentTypeError(f"{word} is not in [{low:g}, {high:g}]")
        return value

    def convert_many(words):
        return tuple(convert(word) for word in words.split(","))
    return dict(type=convert_many if many else convert, help=text, metavar=scalar.__name__.upper() + ("[,..]" if many else ""))


def parse(config: type, argv: list[str], description: str = "") -> Config:
    """Command line to a Config instance: defaults, then presets, then explicit flags. Exits with code 2 on bad input."""
    hints = typing.get_type_hints(config, include_extras=True)
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    shown = [f"  {situation}: {', '.join(f'{k} {v}' for k, v in preset.items() if k in defaults)}"
             for cls in config.__mro__ for situation, preset in vars(cls).get("PRESETS", {}).items()]
    parser = Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                    epilog="other defaults with this data or option:\n" + "\n".join(shown))
    for name, default in defaults.items():
        arguments = option(hints[name])
        arguments["help"] = (arguments["help"] + f" (default: {default})").replace("%", "%%")
        parser.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS, **arguments)
    given = vars(parser.parse_args(argv))
    name = given.get("data", defaults["data"])
    settings = dict(defaults)
    for situation in (*data_kinds(name), "smoke" if given.get("smoke") else ""):
        for cls in reversed(config.__mro__):
            preset = vars(cls).get("PRESETS", {}).get(situation, {})
            settings.update({k: v for k, v in preset.items() if k in defaults})
    return config(**{**settings, **given})


# ---------------------------------------------------------------------------------------------- files that survive

def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that readers see the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def save_state(path: Path, state: Any) -> None:
    """torch.save behind a SHA-256, atomically."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(path, hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue())


def load_state(path: Path) -> Any:
    """Read what save_state wrote, on the CPU, without pickle. None (with a warning) if the file is damaged."""
    content = path.read_bytes()
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        print(f"warning: {path} is damaged and will be rebuilt", file=sys.stderr)
        return None
    return torch.load(io.BytesIO(content[32:]), map_location="cpu", weights_only=True)


@contextlib.contextmanager
def locked(path: Path, wait: bool = True):
    """Hold an advisory lock that the system drops if the process dies. Yields False if it is taken and wait is False."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except ImportError:         # Windows: no lock, atomic writes still keep every file whole
            pass
        except BlockingIOError:
            yield False
            return
        yield True


def digest(*parts) -> str:
    """Short hash of the text of any values."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------- random numbers

def rng_state() -> list[torch.Tensor]:
    """torch's random state on the CPU and, if there are any, on all CUDA devices."""
    return [torch.get_rng_state()] + (torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])


def set_rng_state(state: list[torch.Tensor]) -> None:
    """Restore what rng_state() returned."""
    torch.set_rng_state(state[0])
    if torch.cuda.is_available() and len(state) > 1:
        torch.cuda.set_rng_state_all(state[1:])


@contextlib.contextmanager
def seeded(seed: int):
    """Random numbers from this seed inside, the outer stream untouched outside."""
    outer = rng_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        set_rng_state(outer)


# ---------------------------------------------------------------------------------------------- training

class loop:
    """Training iterator: progress bar with losses, checkpoints, resume, a stop at the first non-finite loss.

        train = common.loop(cfg, "dmd", generator=generator, optimizer=optimizer)
        for step in train:
            ...
            train.losses(dm=loss_dm, regression=loss_reg)

    name: unique in a script and, for the time in the table, equal to the arm's name. steps: default cfg.steps.
    state: everything that changes from step to step: modules, optimisers, schedulers (state_dict) and plain tensors.
    preview: a function that returns samples, drawn every --preview-every seconds beside the checkpoint, on a random
    stream of its own.
    Inside, random numbers come from a stream of its own that depends on cfg.seed alone, so arms see the same data in
    the same order, and code outside gets the same numbers whether training ran, was resumed or came from a cache.
    """
    EVERY = 20      # losses are read this often: a read waits for the device

    def __init__(self, cfg: Config, name: str, steps: int | None = None, preview: Callable | None = None, **state):
        self.cfg, self.name, self.steps, self.state = cfg, name, cfg.steps if steps is None else steps, state
        self.preview = preview
        for module in state.values():       # a deep copy of a compiled network is not compiled
            if cfg.compile and isinstance(module, nn.Module) and module._compiled_call_impl is None:
                module.compile()
        self.pending, self.step, self.seconds = [], 0, 0.0
        folder = cfg.context.state
        self.path = folder and folder / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}-{digest(name)[:6]}.pt"

    def losses(self, **terms: torch.Tensor) -> None:
        """Report scalar loss tensors of this step; they are read and checked every few steps."""
        self.pending.append((self.step, {k: v.detach() for k, v in terms.items()}))

    def _read(self, bar) -> None:
        if not self.pending:
            return
        values = torch.stack([v.float() for _, terms in self.pending for v in terms.values()]).tolist()
        if not math.isfinite(sum(values)):
            names = [(step, name) for step, terms in self.pending for name in terms]
            for (step, name), value in zip(names, values):
                if not math.isfinite(value):
                    raise NonFiniteLoss(f"{self.name}: loss term '{name}' is {value} at step {step}")
        names = list(self.pending[-1][1])
        bar.set_postfix_str(" ".join(f"{n} {v:.4g}" for n, v in zip(names, values[-len(names):])), refresh=False)
        self.pending.clear()

    def _save(self) -> None:
        if self.path:
            state = {k: v if torch.is_tensor(v) else v.state_dict() for k, v in self.state.items()}
            save_state(self.path, dict(step=self.step, seconds=self.seconds, rng=rng_state(), state=state))

    def _load(self) -> None:
        saved = load_state(self.path) if self.path and self.cfg.resume and self.path.exists() else None
        if saved:
            for key, value in self.state.items():
                if torch.is_tensor(value):
                    with torch.no_grad():
                        value.copy_(saved["state"][key])
                else:
                    value.load_state_dict(saved["state"][key])
            set_rng_state(saved["rng"])
            self.step, self.seconds = saved["step"], saved["seconds"]

    def _draw(self) -> None:
        if self.preview and self.path:
            from pictures import draw
            with seeded(self.cfg.seed), torch.no_grad():
                picture = draw([(f"step {self.step}", self.preview())], title=self.name)
            write_atomic(self.path.with_suffix(".png"), picture)

    def __iter__(self):
        with seeded(10007 * (self.cfg.seed + 1)):
            self._load()
            bar = tqdm(total=self.steps, initial=self.step, desc=f"{self.name:<28.28}", file=sys.stderr,
                       mininterval=0.5 if sys.stderr.isatty() else 10)
            before, began = self.seconds, time.monotonic()
            saved = drawn = began
            try:
                while self.step < self.steps:
                    yield self.step
                    self.step += 1
                    bar.update()
                    due = time.monotonic() - saved > self.cfg.checkpoint_every
                    if due or self.step == self.steps or self.step % self.EVERY == 0:
                        self._read(bar)         # before a checkpoint, so that none holds a state that a NaN has reached
                    if due or self.step == self.steps:
                        saved = time.monotonic()
                        self.seconds = before + saved - began
                        self._save()
                    if time.monotonic() - drawn > self.cfg.preview_every or (self.cfg.smoke and self.step == self.steps):
                        self._draw()
                        drawn = time.monotonic()
            finally:
                bar.close()
                self.cfg.context.seconds[self.name], self.cfg.context.steps[self.name] = self.seconds, self.step


def update(optimizer: torch.optim.Optimizer, loss: torch.Tensor, clip: float = 0.0) -> None:
    """One optimiser step on a loss: zero_grad, backward, clip the total gradient norm (0: do not), step."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if clip:
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip)
    optimizer.step()


def ema_update(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * model for parameters; buffers are copied."""
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        for a, b in zip(average.buffers(), model.buffers()):
            a.copy_(b)


def frozen(module: nn.Module) -> nn.Module:
    """A copy in eval mode without gradients."""
    return copy.deepcopy(module).eval().requires_grad_(False)


def cached(name: str, make: Callable[[], Any]) -> Any:
    """The state in NAME.pt of the folder $DISTILL_CACHE (default: .cache in the project), made by make() where there is
    none. Several processes that want the same one wait for the first; a damaged file is rebuilt with a warning."""
    folder = Path(os.environ.get("DISTILL_CACHE") or ROOT / ".cache")
    path = folder / f"{name}.pt"
    try:
        with locked(path.with_suffix(".lock")):
            state = load_state(path) if path.exists() else None
            if state is None:
                state = make()
                save_state(path, state)
            return state
    except OSError as error:
        raise UserError(f"the cache folder {folder} cannot be used ({error}); set DISTILL_CACHE to another one")


def trained(cfg: Config, name: str, module: nn.Module, train: Callable[[], Any], **key) -> nn.Module:
    """Train `module` in place by train(), or load the result of an earlier run; returns it frozen, in eval mode.

    The weights are cached() under a hash of name, architecture, seed, device, --amp and key; put in the key everything
    else that determines them (data, steps, batch, learning rate).
    """
    shapes = [(k, tuple(v.shape)) for k, v in module.state_dict().items()]
    code = digest(name, repr(module), shapes, cfg.seed, cfg.dev.type, cfg.amp, LEDGER, sorted(key.items()))

    def make():
        with seeded(cfg.seed):
            train()
        return module.state_dict()
    module.load_state_dict(cached(f"{name}-{code}", make))
    return module.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------- data: arrays

def find_data(name: str) -> Path | None:
    """toy_data/NAME.npz, then NAME or NAME.npz in $DISTILL_DATA, then the path NAME; None if there is no such file."""
    folders = [TOY, *filter(None, [os.environ.get("DISTILL_DATA") and Path(os.environ["DISTILL_DATA"])]), Path()]
    tries = [folder / f for folder in folders for f in (f"{name}.npz", name)]
    return next((p for p in tries if p.is_file()), None)


def data_names() -> list[str]:
    """The names that --data knows."""
    return [*NAMES, *sorted(p.stem for p in TOY.glob("*.npz")), "cifar10", "cifar100"]


def read_npz(name: str) -> dict[str, np.ndarray]:
    """All arrays of a .npz found by find_data. UserError if it is missing, unreadable or holds pickles."""
    path = find_data(name)
    if path is None:
        raise UserError(f"--data {name}: no such data set or file (possible: {', '.join(data_names())}, or a .npz file)")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (ValueError, OSError, EOFError, KeyError, AttributeError, zipfile.BadZipFile, zipfile.zlib.error) as error:
        raise UserError(f"{path}: not a readable .npz file of plain arrays ({str(error).splitlines()[0]})")


def data_kinds(name: str) -> tuple[str, ...]:
    """The situations of Config.PRESETS that a data set calls for, from the general to the particular."""
    if name in ("cifar10", "cifar100"):
        return "images", "cifar", name
    path = find_data(name)
    if name in NAMES:
        return "points", name
    if path is None or path.suffix != ".npz":
        return (name,)
    try:
        with zipfile.ZipFile(path) as archive:
            key = next((f"{k}.npy" for k in ("train_images", "images") if f"{k}.npy" in archive.namelist()), None)
            if key is None:
                return ("points", name) if "points.npy" in archive.namelist() else (name,)
            with archive.open(key) as file:
                np.lib.format.read_magic(file)
                shape = np.lib.format.read_array_header_1_0(file)[0]
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile):       # reported when it is read
        return (name,)
    return ("images", "cifar", name) if shape[1:3] == (32, 32) else ("images", name)


def check_array(found: dict, key: str, dims: tuple[int, ...], name: str) -> torch.Tensor:
    """found[key] as a tensor, checked: present, numeric, not empty, a number of dimensions in dims, finite."""
    if key not in found:
        raise UserError(f"{name}: no array '{key}' in it (found: {', '.join(found) or 'nothing'})")
    array = found[key]
    if array.dtype.kind not in "fiub":
        raise UserError(f"{name}: '{key}' has type {array.dtype}, numbers are needed")
    if array.ndim not in dims:
        raise UserError(f"{name}: '{key}' has {array.ndim} dimensions {array.shape}, needed: {' or '.join(map(str, dims))}")
    if array.size == 0:
        raise UserError(f"{name}: '{key}' is empty, shape {array.shape}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise UserError(f"{name}: '{key}' contains NaN or infinite values")
    return torch.from_numpy(np.ascontiguousarray(array))


def check_labels(labels: np.ndarray | None, n: int, name: str, classes: int | None = None) -> torch.Tensor:
    """Labels as (n,) int64; zeros if there are none. UserError: wrong count or type, outside 0..classes-1."""
    if labels is None:
        return torch.zeros(n, dtype=torch.long)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UserError(f"{name}: labels must be one integer an example, got {labels.dtype} of shape {labels.shape}")
    if len(labels) != n:
        raise UserError(f"{name}: {len(labels)} labels for {n} examples")
    if labels.min() < 0 or (classes and labels.max() >= classes):
        top = f"..{classes - 1}" if classes else " and up"
        raise UserError(f"{name}: labels must be 0{top}, found {labels.min()}..{labels.max()}")
    return torch.from_numpy(labels.astype(np.int64))


class Images:
    """Images on the device as uint8, handed out as float in [-1, 1].

    train (N, C, H, W) uint8, train_labels (N,), test, test_labels; shape (C, H, W); classes, 0 if there are no labels
    or when asked to be unconditional; n_classes, always that of the labels; sigma_data = 0.5.
    """
    sigma_data = 0.5

    def __init__(self, name: str, device: torch.device, conditional: bool = True):
        found = cifar(name) if name in ("cifar10", "cifar100") else read_npz(name)
        named = len(found["classes"]) if "classes" in found else None
        if "train_images" in found:
            train, test = (self._images(found, f"{part}_images", name) for part in ("train", "test"))
            y_train = check_labels(found.get("train_labels"), len(train), name, named)
            y_test = check_labels(found.get("test_labels"), len(test), name, named or int(y_train.max()) + 1)
        else:       # no test set: every tenth image becomes one
            images = self._images(found, "images", name)
            labels = check_labels(found.get("labels"), len(images), name, named)
            test_part = torch.arange(len(images)) % 10 == min(9, len(images) - 1)
            train_part = ~test_part if len(images) > 1 else test_part
            train, test, y_train, y_test = images[train_part], images[test_part], labels[train_part], labels[test_part]
        self.name, self.device, self.train, self.test = name, device, train.to(device), test.to(device)
        self.n_classes = named or int(max(y_train.max(), y_test.max())) + 1
        self.train_labels, self.test_labels = y_train.to(device), y_test.to(device)
        self.shape = tuple(self.train.shape[1:])
        if self.test.shape[1:] != self.shape:
            raise UserError(f"{name}: train and test images differ in shape, {self.shape} and {tuple(self.test.shape[1:])}")
        self.labelled = "train_labels" in found or "labels" in found
        self.classes = self.n_classes if conditional and self.labelled else 0
        self.key = digest(*(hashlib.sha256(a.cpu().numpy().tobytes()).hexdigest() for a in (self.train, self.train_labels)),
                          self.train.shape)

    @staticmethod
    def _images(found, key, name):
        x = check_array(found, key, (3, 4), name)
        x = x[..., None] if x.dim() == 3 else x
        if x.shape[-1] not in (1, 3):
            raise UserError(f"{name}: '{key}' must be (N, H, W), (N, H, W, 1) or (N, H, W, 3), got {tuple(x.shape)}")
        if x.dtype != torch.uint8:
            low, high = float(x.min()), float(x.max())
            if low < -1 or high > 255:
                raise UserError(f"{name}: '{key}' lies in [{low:g}, {high:g}]; possible: 0..255, [0, 1] or [-1, 1]")
            x = x.float()
            x = (x if high > 1 else x * 255 if low >= 0 else (x + 1) * 127.5).round().to(torch.uint8)
        return x.permute(0, 3, 1, 2).contiguous()

    @staticmethod
    def normal(x: torch.Tensor) -> torch.Tensor:
        """uint8 to float in [-1, 1]."""
        return x.float() / 127.5 - 1

    def sample(self, n: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """n random training images (n, C, H, W) and labels (n,), None when unconditional."""
        index = torch.randint(len(self.train), (n,), device=self.device)
        return self.normal(self.train[index]), (self.train_labels[index] if self.classes else None)

    def labels(self, n: int) -> torch.Tensor | None:
        """n labels drawn with the frequencies of the training set, None when unconditional."""
        index = torch.randint(len(self.train), (n,), device=self.device)
        return self.train_labels[index] if self.classes else None


def shift_and_flip(x: torch.Tensor, shift: int, flip: bool = False) -> torch.Tensor:
    """The usual augmentation of small images (B, C, H, W) of any type: each moved as a whole by up to `shift` pixels either
    way, the border repeated, and with flip half of them mirrored left to right. Random numbers: only what is asked for."""
    (b, c, h, w), device = x.shape, x.device
    rows, columns = torch.arange(h, device=device), torch.arange(w, device=device)
    if shift:
        dy, dx = torch.randint(-shift, shift + 1, (2, b, 1), device=device)
        rows, columns = (rows + dy).clamp(0, h - 1), (columns + dx).clamp(0, w - 1)
        x = x.gather(2, rows.view(b, 1, h, 1).expand(b, c, h, w))
    if flip:
        columns = torch.where(torch.rand(b, 1, device=device) < 0.5, columns, columns.flip(-1))
    return x.gather(3, columns.view(b, 1, 1, w).expand(b, c, h, w)) if shift or flip else x


def load_torchvision(asked: str):
    """The module torchvision with its parts datasets and models. Beside a CPU-only torch the compiled operators do not
    load; declaring the two that are missing suffices."""
    try:
        for operator in ("nms(Tensor boxes, Tensor scores, float threshold) -> Tensor",
                         "qnms(Tensor boxes, Tensor scores, float threshold) -> Tensor"):
            with contextlib.suppress(RuntimeError):
                torch.library.define(f"torchvision::{operator.split('(')[0]}", "(" + operator.split("(", 1)[1])
        import torchvision.datasets
        import torchvision.models
    except ImportError as error:
        raise UserError(f"{asked} needs torchvision ({error}); pip install -r requirements.txt")
    return torchvision


def cifar(name: str) -> dict[str, np.ndarray]:
    """CIFAR-10 or CIFAR-100 through torchvision, downloaded on first use into $DISTILL_DATA or .cache."""
    datasets = load_torchvision(f"--data {name}").datasets
    source = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    folder = os.environ.get("DISTILL_DATA") or ROOT / ".cache"
    try:
        train, test = (source(folder, train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError, EOFError) as error:
        raise UserError(f"--data {name}: could not be downloaded into {folder} ({error}); use --data FILE.npz offline")
    return dict(train_images=train.data, train_labels=np.array(train.targets), classes=np.array(train.classes),
                test_images=test.data, test_labels=np.array(test.targets))


class OwnPoints:
    """The user's own points from a .npz with `points` (N, D) and perhaps `labels` (N,), centred and scaled to unit
    variance over all coordinates; the same interface as toy_data.points.Points, D any number."""
    sigma_data, means = 1.0, None

    def __init__(self, name: str, device: torch.device, conditional: bool = False):
        found = read_npz(name)
        x = check_array(found, "points", (2,), name).float()
        y = check_labels(found.get("labels"), len(x), name)
        self.name, self.device, self.shape = name, device, tuple(x.shape[1:])
        self.key = digest(hashlib.sha256(x.numpy().tobytes()).hexdigest(), x.shape)
        self.points = ((x - x.mean(0)) / (x - x.mean(0)).square().mean().sqrt().clamp_min(1e-8)).to(device)
        self.point_labels = y.to(device)
        self.classes = int(y.max()) + 1 if conditional and "labels" in found else 0

    def sample(self, n: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        index = torch.randint(len(self.points), (n,), device=self.device)
        return self.points[index], (self.point_labels[index] if self.classes else None)

    def labels(self, n: int) -> torch.Tensor | None:
        return self.sample(n)[1]


def load_data(cfg: Config, conditional: bool | None = None) -> "Points | OwnPoints | Images":
    """The data set --data. conditional: hand out labels; default: for images, not for points."""
    if cfg.data in NAMES:
        return Points(cfg.data, cfg.dev, bool(conditional))
    if cfg.data not in ("cifar10", "cifar100") and "points" in read_npz(cfg.data):
        return OwnPoints(cfg.data, cfg.dev, bool(conditional))
    return Images(cfg.data, cfg.dev, conditional is not False)


def domain(cfg: Config, *names: str) -> types.ModuleType:
    """The module toy_data/<name>.py of a domain that is generated on the fly; UserError if --data is not in names."""
    if cfg.data not in names:
        raise UserError(f"--data {cfg.data}: this method needs other data (possible: {', '.join(names)})")
    return importlib.import_module(f"toy_data.{cfg.data}")


def load_images(cfg: Config) -> Images:
    """The labelled image set --data, for classification; UserError for points or without labels."""
    data = load_data(cfg)
    if not isinstance(data, Images) or not data.labelled:
        raise UserError(f"--data {cfg.data}: this method needs labelled images (possible: glyphs, shapes, cifar10, a .npz)")
    return data


# ---------------------------------------------------------------------------------------------- networks and teachers

def make_network(cfg: Config, data, width: int, depth: int, times: int = 1, out: int | None = None):
    """MLP for points, UNet for images, placed on the device. out: output dimensions or channels (default: data's)."""
    arguments = dict(width=width, depth=depth, classes=data.classes, times=times, out=out)
    return cfg.place(UNet(data.shape, **arguments) if len(data.shape) == 3 else MLP(data.shape[0], **arguments))


def is_large(data) -> bool:
    """Images of 32x32 and more, which have settings and measures of their own."""
    return len(data.shape) == 3 and min(data.shape[1:]) >= 32


def flow_teacher(cfg: Config, data, width: int, depth: int, batch: int = 0, lr: float = 0.0, label_drop: float = 0.1,
                 name: str = "teacher", steps: int = 0):
    """A velocity network trained by flow matching (t uniform), cached and frozen: the teacher that all generators share.
    Its weights are the exponential average of the last ~200 steps, or from 32x32 on of the last twentieth. Labels, where
    the data hands them out, are dropped with probability label_drop, so that guided() works. lr 0: 5e-3 for points, 1e-3
    for small images, 3e-4 from 32x32 on; batch 0: 512, there 128; steps 0: cfg.teacher_steps. A second teacher in a
    script needs a name of its own, for its loop and checkpoints."""
    net = make_network(cfg, data, width, depth)
    large = is_large(data)
    lr = lr or (3e-4 if large else 1e-3 if len(data.shape) == 3 else 5e-3)
    batch, steps = 16 if cfg.smoke else batch or (128 if large else 512), steps or cfg.teacher_steps
    decay = max(0.995, 1 - 20 / steps) if large else 0.995

    def train():
        average = copy.deepcopy(net)
        optimizer = torch.optim.Adam(net.parameters(), lr=lr, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        state = dict(net=net, average=average, optimizer=optimizer, schedule=schedule)
        progress = loop(cfg, name, steps, **state, preview=lambda: sample_flow(
            average, torch.randn(64, *data.shape, device=cfg.dev), 20, data.labels(64)))
        for step in progress:
            x, y = data.sample(batch)
            if y is not None:
                y = torch.where(torch.rand(batch, device=x.device) < label_drop, data.classes, y)
            noise, t = torch.randn_like(x), torch.rand(batch, device=x.device)
            with cfg.autocast():
                v = net(interpolate(x, noise, t), t, y)
            loss = F.mse_loss(v.float(), noise - x)
            update(optimizer, loss)
            schedule.step()
            ema_update(average, net, min(decay, (step + 1) / (step + 10)))
            progress.losses(flow=loss)
        net.load_state_dict(average.state_dict())
    return trained(cfg, "teacher", net, train, data=data.key, classes=data.classes, steps=steps, batch=batch, lr=lr,
                   drop=label_drop)


def language_model(cfg: Config, name: str, net: Transformer, sample: Callable, steps: int, eos: int, batch: int = 128,
                   lr: float = 3e-3, **key) -> Transformer:
    """Train a causal Transformer by cross-entropy on the answers of sample(batch) -> prompts (B, P), answers (B, L), up
    to their first eos; one-cycle learning rate with peak lr. Cached and frozen, see trained(): key must name the data."""
    def train():
        optimizer = torch.optim.AdamW(net.parameters(), lr, (0.9, 0.99), weight_decay=0.01, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1)
        progress = loop(cfg, name, steps, net=net, optimizer=optimizer, schedule=schedule)
        for _ in progress:
            prompts, answers = (x.to(cfg.dev) for x in sample(batch))
            with cfg.autocast():
                logits = language.completion_logits(net, prompts, answers)
            loss = -language.masked_mean(language.token_log_probs(logits.float(), answers),
                                         language.answer_mask(answers, eos))
            update(optimizer, loss, clip=1.0)
            schedule.step()
            progress.losses(ce=loss)
    return trained(cfg, name, net, train, steps=steps, batch=batch, lr=lr, **key)


def classifier(cfg: Config, data: Images) -> ResNet:
    """A small ResNet trained on the labelled images, cached and frozen: its features() give the Frechet distance. From
    32x32 on it is wider and deeper and learns longer, on images that are mirrored at random."""
    large = is_large(data)
    stages = (2, 2, 2) if large else (1, 1, 1) if min(data.shape[1:]) >= 16 else (1, 1)
    net = cfg.place(ResNet(data.shape[0], data.n_classes, 32 if large else 16, stages))
    steps, batch = (3, 16) if cfg.smoke else (5000, 256) if large else (400, 128)

    def train():
        optimizer = torch.optim.Adam(net.parameters(), lr=2e-3, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps if large else 1.0)
        progress = loop(cfg, "classifier", steps, net=net, optimizer=optimizer, schedule=schedule)
        for _ in progress:
            index = torch.randint(len(data.train), (batch,), device=data.device)
            x = data.normal(data.train[index])
            if large:
                x = torch.where(torch.rand(batch, 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)
            loss = F.cross_entropy(net(x), data.train_labels[index])
            update(optimizer, loss)
            schedule.step()
            progress.losses(ce=loss)
    return trained(cfg, "classifier", net, train, data=data.key, steps=steps, batch=batch)


# ---------------------------------------------------------------------------------------------- flow and diffusion

def expand(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B,) viewed as (B, 1, ...) with as many dimensions as `like`."""
    return t.view(-1, *[1] * (like.dim() - 1))


def interpolate(x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x_t = (1 - t) x + t noise, t (B,) in [0, 1]."""
    t = expand(t, x)
    return (1 - t) * x + t * noise


class Denoiser(nn.Module):
    """EDM view of a velocity network: D(x_sigma, sigma, y) = E[x | x_sigma], sigma (B,) >= 0. Identity at sigma = 0."""

    def __init__(self, velocity: Callable):
        super().__init__()
        self.velocity = velocity

    def forward(self, x, sigma, y=None):
        x_t, t = x / expand(1 + sigma, x), sigma / (1 + sigma)
        return x_t - expand(t, x) * self.velocity(x_t, t, y)


def score_from_denoised(x, sigma, denoised):
    """grad log p_sigma(x) = (D - x) / sigma^2; sigma (B,) > 0."""
    return (denoised - x) / expand(sigma, x).square()


def karras_sigmas(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> torch.Tensor:
    """n noise levels (n,) falling from sigma_max to sigma_min, evenly spaced in sigma^(1/rho) (EDM, eq. 5)."""
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (high + ramp * (low - high)).pow(rho).float()


def guided(model: Callable, scale: float, classes: int) -> Callable:
    """Classifier-free guidance: uncond + scale (cond - uncond); scale 1 is the conditional model, 0 the other."""
    def guided_model(x, t, y):
        cond, uncond = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, classes)])).chunk(2)
        return uncond + scale * (cond - uncond)
    return guided_model


@torch.no_grad()
def solve(velocity: Callable, x: torch.Tensor, times: torch.Tensor, method: str = "euler", path: bool = False):
    """Solve dx/dt = velocity(x, t) along `times` (N+1,), rising or falling, with "euler" (N calls) or "heun" (2N).

    velocity(x (B, ...), t (B,)) -> (B, ...). Returns x at times[-1], or with path=True all N+1 states stacked.
    """
    if method not in ("euler", "heun"):
        raise ValueError(f"method must be 'euler' or 'heun', got {method!r}")
    states = [x]
    for a, b in zip(times[:-1].tolist(), times[1:].tolist()):
        d = velocity(x, x.new_full((len(x),), a))
        y = x + (b - a) * d
        if method == "heun":
            y = x + (b - a) * (d + velocity(y, x.new_full((len(x),), b))) / 2
        x = y
        if path:
            states.append(x)
    return torch.stack(states) if path else x


def sample_flow(model: Callable, noise: torch.Tensor, steps: int, y=None, method: str = "euler", path: bool = False):
    """Generate from noise by `steps` even steps of a velocity model(x, t, y) from t = 1 to 0 (NFE: steps, Heun 2x)."""
    return solve(lambda x, t: model(x, t, y), noise, torch.linspace(1, 0, steps + 1), method, path)


# ---------------------------------------------------------------------------------------------- judging what was trained

@torch.no_grad()
def predict(model: Callable, data: Images, batch: int = 1000) -> torch.Tensor:
    """Logits (N, C) of model on the test images."""
    return torch.cat([model(data.normal(part)).float() for part in data.test.split(batch)])


def batched(features: Callable, x: torch.Tensor, batch: int = 500) -> torch.Tensor:
    """features(x), a batch of x at a time, without gradient."""
    with torch.no_grad():
        return torch.cat([features(part).float() for part in x.split(batch)])


def quality(cfg: Config, data, samples: torch.Tensor) -> dict[str, float]:
    """The metrics by which every generator is judged, against as many fresh real samples (at most 10,000):
    sw2; for mixtures coverage, mass_tv and off_support; for labelled images fd, the Frechet distance in the features
    of a classifier trained on the same data, from 32x32 on with precision and recall; with --fid fid_torchvision, that in
    features of torchvision's Inception-v3, against all training images."""
    n = min(len(samples), 10_000)
    with seeded(cfg.seed + 5_000_000):      # the same real samples for every arm
        real = data.sample(n)[0]
    found = dict(sw2=sliced_wasserstein(samples, real))
    if getattr(data, "means", None) is not None:
        found |= mode_stats(samples, data.means, data.weights, data.std)
    kept = data.__dict__.setdefault("reference", {})       # what is the same for every arm is computed once
    if getattr(data, "labelled", False):
        if n not in kept:
            net = classifier(cfg, data)
            kept[n] = net, batched(net.features, real.clamp(-1, 1), 1000)
        net, reference = kept[n]
        features = batched(net.features, samples.clamp(-1, 1), 1000)
        found["fd"] = frechet(features, reference)
        if is_large(data):
            found["precision"], found["recall"] = precision_recall(reference, features)
    if cfg.fid and len(data.shape) == 3:
        if "inception" not in kept:
            kept["inception"] = inception_reference(cfg, data)
        net, reference = kept["inception"]
        found["fid_torchvision"] = frechet(batched(net, samples.clamp(-1, 1)), reference)
    return found


def inception_reference(cfg: Config, data: Images) -> tuple[Callable, tuple[torch.Tensor, torch.Tensor]]:
    """Inception-v3 and the moments of its features on all training images, those cached; UserError without the weights."""
    try:
        net = inception(load_torchvision("--fid").models)
    except (OSError, RuntimeError) as error:
        raise UserError(f"--fid: the weights of Inception-v3 could not be downloaded ({error}); leave the option out")

    def make():
        images = data.train[:100] if cfg.smoke else data.train
        mean, cov = moments(batched(lambda part: net(data.normal(part)), images))
        return dict(mean=mean, cov=cov)
    state = cached(f"inception-{data.key}-{cfg.smoke}", make)
    return net, (state["mean"], state["cov"])


# ---------------------------------------------------------------------------------------------- running a script

class Claim(NamedTuple):
    """left < margin * right (op "<") or left > margin * right (">") on one metric, judged over the seeds.

    scale "ratio": both positive, judged on log(left / right) against log(margin). scale "difference": left - right
    against margin (so op ">" with margin 0.02 reads: at least 0.02 more). right: an arm or a number.
    """
    left: str
    op: Literal["<", ">"]
    right: str | float
    metric: str
    says: str
    margin: float = 1.0
    scale: Literal["ratio", "difference"] = "ratio"


class Log:
    """Collects the results of one seed. Call it as log("arm", sw2=..., nfe=...); the training time of the loop with
    the arm's name is added as `seconds`."""

    def __init__(self, cfg: Config, picture: Path | None):
        self.cfg, self.path, self.arms = cfg, picture, {}

    def __call__(self, arm: str, **metrics: float) -> None:
        if arm in self.arms:
            raise ValueError(f"arm {arm!r} is logged twice")
        seconds = {"seconds": self.cfg.context.seconds[arm]} if arm in self.cfg.context.seconds else {}
        self.arms[arm] = {k: float(v) for k, v in (metrics | seconds).items()}

    def picture(self, panels: list[tuple[str, Any]], columns: int = 4, title: str = "") -> None:
        """Draw labelled panels into one PNG (first seed only). A panel's content is points (N, D), or (points, labels
        (N,)), of which the first two coordinates are shown; images (N, C, H, W) in [-1, 1]; {"curves": {name: (xs, ys)},
        "x": label, "y": label, "logx": bool, "logy": bool}; {"bars": {name: value}, "x": label}; or {"heat": array (H, W)},
        dark where it is high."""
        if self.path:
            from pictures import draw
            write_atomic(self.path, draw(panels, columns, title))


def source_name(run: Callable) -> tuple[str, types.ModuleType]:
    """Name and module of the script that defines run()."""
    module = sys.modules[run.__module__]
    return Path(module.__file__).stem, module


def main(run: Callable, config: type, claims: list[Claim], argv: list[str] | None = None) -> None:
    """Run a script: parse the command line, call run(cfg, log) for every seed, print the table and the verdicts, write
    OUT/<name>.json and OUT/<name>.png. Exit code 2 for what the user can put right, 1 for a non-finite loss."""
    try:
        cfg = parse(config, sys.argv[1:] if argv is None else argv, source_name(run)[1].__doc__)
        with locked_run(cfg, run) as state:
            execute(run, cfg, claims, state)
    except UserError as error:
        raise SystemExit(_fail(error, 2))
    except NonFiniteLoss as error:
        raise SystemExit(_fail(error, 1))
    except torch.OutOfMemoryError:
        raise SystemExit(_fail("out of memory; lower --batch, --width or --eval-samples (or use --amp)", 1))
    except KeyboardInterrupt:
        raise SystemExit(_fail("stopped; the same command with --resume continues from the last checkpoint", 130))


def _fail(message, code: int) -> int:
    sys.stderr.write(f"error: {message}\n")
    return code


@contextlib.contextmanager
def locked_run(cfg: Config, run: Callable):
    """The folder for checkpoints, OUT/<name>.state, for this process alone; None while another run uses it."""
    name, module = source_name(run)
    folder = Path(cfg.out) / f"{name}.state"
    neutral = ("out", "resume", "threads", "checkpoint_every", "preview_every", "fid", "seed", "seeds")
    settings = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in neutral}
    settings = json.loads(json.dumps(settings | {"script": digest(Path(module.__file__).read_text())}))
    with contextlib.ExitStack() as stack:
        try:
            mine = stack.enter_context(locked(Path(cfg.out) / f".{name}.lock", wait=False))
            if mine and not cfg.resume:
                shutil.rmtree(folder, ignore_errors=True)
                write_atomic(folder / "config.json", json.dumps(settings, indent=1).encode())
        except OSError as error:
            raise UserError(f"--out {cfg.out}: cannot be written ({error.strerror or error})")
        if not mine and cfg.resume:
            raise UserError(f"--resume: another run is using {folder}; wait for it or choose another --out")
        if not mine:
            print(f"note: another run is using {folder}; this one keeps no checkpoints", file=sys.stderr)
        if cfg.resume:
            try:
                before = json.loads((folder / "config.json").read_text())
            except (OSError, ValueError):
                raise UserError(f"--resume: nothing to resume, {folder} holds no run")
            changed = [f"{k} was {before.get(k)}, is {v}" for k, v in settings.items() if before.get(k) != v]
            if changed:
                raise UserError(f"--resume: {folder} belongs to another configuration ({'; '.join(changed)})")
        yield folder if mine else None


def execute(run: Callable, cfg: Config, claims: list[Claim], state: Path | None) -> dict:
    """All seeds of a script; prints the table and the verdicts and returns the results as written to the JSON."""
    import ledger
    name, module = source_name(run)
    device = cfg.dev
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    torch.set_float32_matmul_precision("high")      # TF32 on GPUs that have it; no effect on the CPU
    picture, began, arms, seeds = Path(cfg.out) / f"{name}.png", time.monotonic(), [], []
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        one = dataclasses.replace(cfg, seed=seed)
        one.context.state = state and state / f"seed{seed}"
        log = Log(one, picture if seed == cfg.seed else None)
        with seeded(seed):
            run(one, log)
        arms.append(log.arms)
        seeds.append(seed)
    table = {arm: {m: [a[arm][m] for a in arms] for m in arms[0][arm]     # a teacher from the cache has no seconds
                   if m != "seconds" or all(m in a[arm] for a in arms)} for arm in arms[0]}
    settings = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in ("out", "resume", "seed", "seeds")}
    result = ledger.describe(name, module.__doc__ or "") | dict(
        data=cfg.data, seeds=seeds, arms=table, claims=[ledger.judge(claim, table) for claim in claims],
        notes=getattr(module, "NOTES", ""), config=settings, seconds=round((time.monotonic() - began) / cfg.seeds, 1),
        device=torch.cuda.get_device_name() if device.type == "cuda" else device.type, torch=torch.__version__,
        hash=ledger.fingerprint(Path(module.__file__), cfg.data),
        steps={arm: n for arm, n in one.context.steps.items() if arm in table})
    path = Path(cfg.out) / f"{name}.json"
    write_atomic(path, (json.dumps(result, indent=1) + "\n").encode())
    print(ledger.report(result))
    print(f"picture: {picture}\nresults: {path}")
    return result
