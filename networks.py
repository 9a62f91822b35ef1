"""Networks that several methods share; all of them can be reached as common.<name>.

A time-conditioned network is called as net(x, t, y=None, s=None): t (B,), labels y (B,) int64 or None (the value
`classes` means no class), s (B,) a second time for networks built with times=2.
"""
import contextlib
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


class TimeFeatures(nn.Module):
    """(B,) times to (B, 2 * frequencies + 1) features: t itself, sin and cos. Tells t from -t; |t| up to about 2."""

    def __init__(self, frequencies: int = 8):
        super().__init__()
        self.register_buffer("frequency", math.pi / 2 * 2 ** torch.arange(0, frequencies).div(2), persistent=False)
        self.width = 2 * frequencies + 1

    def forward(self, t):
        angle = t[:, None] * self.frequency
        return torch.cat([t[:, None], angle.sin(), angle.cos()], 1)


class Conditioning(nn.Module):
    """Features of the time(s) and the class: (B, width). classes + 1 embeddings, the last one meaning no class."""

    def __init__(self, classes: int, times: int, class_width: int = 16):
        super().__init__()
        self.time, self.classes, self.times = TimeFeatures(), classes, times
        self.label = nn.Embedding(classes + 1, class_width) if classes else None
        self.width = times * self.time.width + (class_width if classes else 0)

    def forward(self, x, t, y=None, s=None):
        parts = [self.time(t)]
        if self.times == 2:
            parts.append(self.time(t if s is None else s))
        if self.classes:
            parts.append(self.label(torch.full((len(x),), self.classes, device=x.device) if y is None else y))
        return torch.cat(parts, 1)


class MLP(nn.Module):
    """Time-conditioned network for points: net(x (B, D), t (B,), y (B,) or None, s (B,)) -> (B, out).

    hidden() gives the features (B, width) before `head`, a Linear.
    """

    def __init__(self, dim: int, width: int = 128, depth: int = 3, classes: int = 0, times: int = 1, out: int | None = None):
        super().__init__()
        self.condition = Conditioning(classes, times)
        sizes = [dim + self.condition.width] + [width] * depth
        self.trunk = nn.Sequential(*[m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.SiLU())])
        self.head = nn.Linear(width, out or dim)

    def hidden(self, x, t, y=None, s=None):
        return self.trunk(torch.cat([x, self.condition(x, t, y, s)], 1))

    def forward(self, x, t, y=None, s=None):
        return self.head(self.hidden(x, t, y, s))


def groups(channels: int) -> int:
    """Groups of a group norm: 8 or less, at least 4 channels each, a divisor of the channels."""
    return next(g for g in range(max(1, min(8, channels // 4)), 0, -1) if channels % g == 0)


class Block(nn.Module):
    """Residual block of the U-Net with scale and shift from the condition, then optional self-attention."""

    def __init__(self, a: int, b: int, condition: int, attention: bool):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups(a), a), nn.Conv2d(a, b, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups(b), b), nn.Conv2d(b, b, 3, padding=1)
        self.film = nn.Linear(condition, 2 * b)
        self.skip = nn.Conv2d(a, b, 1) if a != b else nn.Identity()
        self.norm3 = nn.GroupNorm(groups(b), b) if attention else None
        self.qkv, self.out = (nn.Conv2d(b, 3 * b, 1), nn.Conv2d(b, b, 1)) if attention else (None, None)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x, c):
        scale, shift = self.film(c)[:, :, None, None].chunk(2, 1)
        h = self.norm2(self.conv1(F.silu(self.norm1(x)))) * (1 + scale) + shift
        x = self.skip(x) + self.conv2(F.silu(h))
        if self.qkv is not None:
            B, C, H, W = x.shape
            heads = max(1, C // 64)
            q, k, v = self.qkv(self.norm3(x)).view(B, 3, heads, C // heads, H * W).transpose(3, 4).unbind(1)
            # in forward mode (jvp) the plain arithmetic: the fused kernels of GPUs have no such derivative
            plain = torch.autograd.forward_ad._current_level >= 0
            with sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext():
                h = F.scaled_dot_product_attention(q, k, v)
            x = x + self.out(h.transpose(2, 3).reshape(B, C, H, W))
        return x


class UNet(nn.Module):
    """Class-conditional U-Net: net(x (B, C, H, W), t (B,), y, s) -> (B, out, H, W); hidden() are the features before
    `head`, a 3x3 convolution. Halves the resolution while it is even and above 8 (at least once if it can); the width
    doubles at the first halving; attention at the lowest resolution."""

    def __init__(self, shape, width: int = 32, depth: int = 1, classes: int = 0, times: int = 1, out: int | None = None):
        super().__init__()
        channels, height, wide = shape
        self.condition = Conditioning(classes, times, 4 * width)
        c = 4 * width
        self.embed = nn.Sequential(nn.Linear(self.condition.width, c), nn.SiLU(), nn.Linear(c, c), nn.SiLU())
        levels, size = 0, (height, wide)
        while not (size[0] % 2 or size[1] % 2) and min(size) > (4 if levels == 0 else 8):
            levels, size = levels + 1, (size[0] // 2, size[1] // 2)
        widths = [width] + [2 * width] * levels
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.down, self.up, kept = nn.ModuleList(), nn.ModuleList(), [width]
        for level, w in enumerate(widths):
            for _ in range(depth):
                self.down.append(Block(kept[-1], w, c, level == levels))
                kept.append(w)
            if level < levels:
                self.down.append(nn.Conv2d(w, w, 3, padding=1, stride=2))
                kept.append(w)
        self.middle, now = Block(widths[-1], widths[-1], c, True), widths[-1]
        for level, w in reversed(list(enumerate(widths))):
            for _ in range(depth + 1):
                self.up.append(Block(now + kept.pop(), w, c, level == levels))
                now = w
            if level:
                self.up.append(nn.Upsample(scale_factor=2))
        self.last = nn.GroupNorm(groups(width), width)
        self.head = nn.Conv2d(width, out or channels, 3, padding=1)

    def descend(self, x, c):
        """The features of the downward half for the embedded condition c, from `first` to the lowest resolution."""
        kept = [self.first(x)]
        for layer in self.down:
            kept.append(layer(kept[-1], c) if isinstance(layer, Block) else layer(kept[-1]))
        return kept

    def hidden(self, x, t, y=None, s=None):
        c = self.embed(self.condition(x, t, y, s))
        kept = self.descend(x, c)
        x = self.middle(kept[-1], c)
        for layer in self.up:
            x = layer(torch.cat([x, kept.pop()], 1), c) if isinstance(layer, Block) else layer(x)
        return F.silu(self.last(x))

    def bottleneck(self, x, t, y=None, s=None):
        """Features (B, C, h, w) after `middle`, at the lowest resolution; the upward half is not run."""
        c = self.embed(self.condition(x, t, y, s))
        return self.middle(self.descend(x, c)[-1], c)

    def forward(self, x, t, y=None, s=None):
        if len(x) > 1000 and x.shape[2] >= 32 and not torch.is_grad_enabled():      # samples for the metrics: in parts
            parts = zip(*(z.split(1000) if torch.is_tensor(z) else [None] * len(x.split(1000)) for z in (x, t, y, s)))
            return torch.cat([self.head(self.hidden(*part)) for part in parts])
        return self.head(self.hidden(x, t, y, s))


class ResNet(nn.Module):
    """Small residual classifier: (B, C, H, W) -> logits (B, classes). stages: blocks per stage; each stage after the
    first halves the resolution and doubles the width. features() gives the pooled (B, width of the last stage)."""

    def __init__(self, channels: int, classes: int, width: int = 16, stages: tuple[int, ...] = (1, 1)):
        super().__init__()
        layers, now = [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()], width
        for stage, blocks in enumerate(stages):
            for block in range(blocks):
                layers.append(Residual(now, width << stage, 2 if stage and block == 0 else 1))
                now = width << stage
        self.body, self.head, self.width = nn.Sequential(*layers), nn.Linear(now, classes), now

    def features(self, x):
        return self.body(x).mean((2, 3))

    def forward(self, x):
        return self.head(self.features(x))


class Residual(nn.Module):
    """Two 3x3 convolutions with batch norm beside a shortcut."""

    def __init__(self, a: int, b: int, stride: int):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b)
        self.conv2, self.norm2 = nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b)
        same = a == b and stride == 1
        self.skip = nn.Identity() if same else nn.Sequential(nn.Conv2d(a, b, 1, stride, bias=False), nn.BatchNorm2d(b))

    def forward(self, x):
        return F.relu(self.skip(x) + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class GCN(nn.Module):
    """Graph convolutions: net(x (N, F), adjacency) -> logits (N, out); each layer is adjacency @ x @ W + b, with
    ReLU and dropout between layers. adjacency: an (N, N) matrix, usually sparse, with self-loops:
    D^-1/2 (A + I) D^-1/2 makes it the GCN of Kipf and Welling, D^-1 (A + I) the GraphSAGE with its "gcn" aggregator.
    Without one, net(x) is an MLP of the same shape. hidden() gives (N, width) before `head`.
    """

    def __init__(self, dim: int, width: int, out: int, depth: int = 2, dropout: float = 0.0):
        super().__init__()
        sizes = [dim] + [width] * (depth - 1)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:]))
        self.head, self.dropout = nn.Linear(sizes[-1], out), nn.Dropout(dropout)
        for layer in (*self.layers, self.head):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def hidden(self, x, adjacency=None):
        for layer in self.layers:
            x = self.dropout(F.relu(convolve(layer, x, adjacency)))
        return x

    def forward(self, x, adjacency=None):
        return convolve(self.head, self.hidden(x, adjacency), adjacency)


def convolve(layer: nn.Linear, x: torch.Tensor, adjacency: torch.Tensor | None = None) -> torch.Tensor:
    """adjacency @ (x @ W) + b; without adjacency the layer itself. Its product is in float32 also under autocast."""
    if adjacency is None:
        return layer(x)
    h = F.linear(x, layer.weight)
    with torch.autocast(x.device.type, enabled=False):
        return adjacency @ h.to(adjacency.dtype) + layer.bias


class Attention(nn.Module):
    """Multi-head self-attention over (B, L, width); keys and values of earlier positions can come from a cache."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, causal: bool, mask=None, cache=None):
        B, L, W = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.heads, W // self.heads).permute(2, 0, 3, 1, 4)
        if cache is not None:
            if cache:
                k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
            cache[:] = [k, v]
        if causal and (mask is not None or k.shape[2] != L):
            future = torch.ones(L, k.shape[2], dtype=torch.bool, device=x.device).tril(k.shape[2] - L)
            mask, causal = (future if mask is None else mask & future), False
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out(h.transpose(1, 2).reshape(B, L, W))


class Transformer(nn.Module):
    """Small pre-norm transformer over tokens: net(tokens (B, L)) -> logits (B, L, vocabulary).

    causal=False gives a bidirectional one (masked diffusion, encoders). Instead of tokens, `embeds` (B, L, width) can be
    given. mask (B, L) bool marks the positions that may be attended to (False: padding). condition (B, width) is added to
    every position, e.g. an embedded time. cache: None, or the list that new_cache() made, filled as a sequence goes on;
    `L` then counts the new positions only. hidden() gives (B, L, width) before `head`.
    """

    def __init__(self, vocabulary: int, width: int = 64, depth: int = 2, heads: int = 4, length: int = 64, causal: bool = True):
        super().__init__()
        self.causal, self.length = causal, length
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(nn.ModuleDict(dict(
            norm1=nn.LayerNorm(width), attention=Attention(width, heads), norm2=nn.LayerNorm(width),
            mlp=nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)))) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=0.02)

    def new_cache(self) -> list[list]:
        """An empty cache of keys and values, one list a block."""
        return [[] for _ in self.blocks]

    def hidden(self, tokens=None, embeds=None, mask=None, condition=None, cache=None):
        x = self.token(tokens) if embeds is None else embeds
        start = cache[0][0].shape[2] if cache and cache[0] else 0
        if start + x.shape[1] > self.length:
            raise ValueError(f"{start + x.shape[1]} positions, the network has {self.length}")
        x = x + self.position.weight[start:start + x.shape[1]]
        if condition is not None:
            x = x + condition[:, None]
        mask = None if mask is None else mask[:, None, None, :]
        for i, block in enumerate(self.blocks):
            x = x + block["attention"](block["norm1"](x), self.causal, mask, None if cache is None else cache[i])
            x = x + block["mlp"](block["norm2"](x))
        return self.norm(x)

    def forward(self, tokens=None, embeds=None, mask=None, condition=None, cache=None):
        return self.head(self.hidden(tokens, embeds, mask, condition, cache))
