"""Labelled panels in one PNG: scatter plots, image grids, curves, bars, heat maps."""
import io
import math
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

SIZE, GAP, BAR = 300, 14, 24        # side of a panel, space between panels, height of its label, in pixels
PALETTE = [(31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (255, 127, 14), (23, 150, 160), (188, 120, 34),
           (227, 80, 180), (110, 110, 110), (150, 160, 20)]


def font(size: int = 14):
    """Pillow's own font."""
    return ImageFont.load_default(size)


def draw(panels: list[tuple[str, Any]], columns: int = 4, title: str = "") -> bytes:
    """PNG of (label, content) panels in rows of `columns`; the kinds of content are those of common.Log.picture."""
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    top = 34 if title else GAP
    sheet = Image.new("RGB", (GAP + columns * (SIZE + GAP), top + rows * (SIZE + BAR + GAP)), "white")
    pen = ImageDraw.Draw(sheet)
    if title:
        pen.text((GAP, 8), title, fill="black", font=font(17))
    limits = [_array(c[0] if isinstance(c, tuple) else c) for _, c in panels if _is_points(c)]
    finite = np.abs(limits[0][np.isfinite(limits[0])]) if limits else np.ones(1)
    reach = float(np.quantile(finite, 0.995)) * 1.25 + 1e-6 if finite.size else 1.0
    names = dict.fromkeys(n for _, c in panels if isinstance(c, dict) for n in c.get("curves", ()))
    colours = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}     # one colour a name in all panels
    for i, (label, content) in enumerate(panels):
        x, y = GAP + i % columns * (SIZE + GAP), top + i // columns * (SIZE + BAR + GAP)
        pen.text((x, y + 3), shorten(pen, label, SIZE), fill="black", font=font())
        sheet.paste(_panel(content, reach, colours), (x, y + BAR))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def shorten(pen, text: str, width: int) -> str:
    """Text cut to a width in pixels."""
    while pen.textlength(text, font=font()) > width:
        text = text[:-2] + "…" if text.endswith("…") else text[:-1] + "…"
    return text


def _array(x) -> np.ndarray:
    return x.detach().float().cpu().numpy() if torch.is_tensor(x) else np.asarray(x, dtype=np.float64)


def _is_points(content) -> bool:
    points = content[0] if isinstance(content, tuple) else content
    return not isinstance(points, dict) and _array(points).ndim == 2


def _panel(content, reach: float, colours: dict) -> Image.Image:
    if isinstance(content, dict):
        if "heat" in content:
            return _heat(_array(content["heat"]))
        return _bars(**content) if "bars" in content else _curves(colours, **content)
    if _is_points(content):
        points, labels = content if isinstance(content, tuple) else (content, None)
        return _scatter(_array(points), None if labels is None else _array(labels).astype(int), reach)
    array = _array(content)
    if array.ndim == 4:
        return _grid(array)
    raise ValueError(f"cannot draw an array of shape {array.shape}: points (N, D), images (N, C, H, W) or a dict")


def _scatter(points: np.ndarray, labels: np.ndarray | None, reach: float) -> Image.Image:
    """The first two coordinates. All panels share the range of the first one, the data; what lies outside is drawn at
    the border."""
    points = np.pad(points, ((0, 0), (0, max(0, 2 - points.shape[1]))))[:, :2]
    scale = 2       # drawn at twice the size and reduced: smooth dots
    image = Image.new("RGB", (SIZE * scale, SIZE * scale), (248, 248, 248))
    pen = ImageDraw.Draw(image)
    points = np.nan_to_num(points[:4000], nan=0.0, posinf=1e6, neginf=-1e6)
    place = np.clip((points / reach + 1) / 2, 0.005, 0.995) * SIZE * scale
    for i, (x, y) in enumerate(place):
        colour = PALETTE[0 if labels is None else labels[i] % len(PALETTE)]
        y = SIZE * scale - y
        pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
    return image.resize((SIZE, SIZE), Image.LANCZOS)


def _grid(images: np.ndarray) -> Image.Image:
    """As many images as fit a square of at most 8 x 8, each enlarged without smoothing."""
    side = min(8, max(1, math.isqrt(len(images))))
    n, c = images.shape[:2]
    rows = [np.concatenate(list(images[r * side:(r + 1) * side].transpose(0, 2, 3, 1)), 1) for r in range(min(side, n))]
    array = (np.clip(np.nan_to_num(np.concatenate(rows)), -1, 1) * 127.5 + 127.5).round().astype(np.uint8)
    array = np.repeat(array, 3, 2) if c == 1 else array[..., :3]
    return Image.fromarray(array).resize((SIZE, SIZE), Image.NEAREST)


def _heat(array: np.ndarray) -> Image.Image:
    low, high = np.nanmin(array), np.nanmax(array)
    z = ((array - low) / (high - low or 1))[..., None]
    stops = np.array([[255, 255, 255], [90, 150, 210], [10, 30, 90]], float)      # white, blue, dark blue
    rgb = np.where(z < 0.5, stops[0] + 2 * z * (stops[1] - stops[0]), stops[1] + (2 * z - 1) * (stops[2] - stops[1]))
    return Image.fromarray(rgb.astype(np.uint8)).resize((SIZE, SIZE), Image.NEAREST)


def _bars(bars: dict, x: str = "") -> Image.Image:
    """{name: value} as horizontal bars from 0, each with its name and value; a value that is not finite has no bar."""
    image = Image.new("RGB", (SIZE, SIZE), (248, 248, 248))
    pen, small = ImageDraw.Draw(image), font(11)
    values = {name: float(value) for name, value in bars.items()}
    finite = [0.0, *filter(math.isfinite, values.values())]
    scale, row = (SIZE - 24) / (max(finite) - min(finite) or 1), (SIZE - 34) / max(1, len(values))
    zero = 12 - min(finite) * scale
    for i, (name, value) in enumerate(values.items()):
        top = 8 + i * row
        if math.isfinite(value):
            left, right = sorted((zero, zero + value * scale))
            pen.rectangle((left, top + 2, right, top + row - 3), fill=tuple((c + 510) // 3 for c in PALETTE[i % len(PALETTE)]))
        pen.text((16, top + row / 2), shorten(pen, f"{value:.3g}   {name}", SIZE - 30), fill="black", font=small, anchor="lm")
    pen.line((zero, 8, zero, SIZE - 28), fill=(120, 120, 120))
    pen.text((SIZE / 2, SIZE - 4), x, fill="black", font=small, anchor="mb")
    return image


def _curves(colours: dict, curves: dict, x: str = "", y: str = "", logy: bool = False, logx: bool = False) -> Image.Image:
    """{name: (xs, ys)} as lines with a legend and labelled axes."""
    image = Image.new("RGB", (SIZE, SIZE), (248, 248, 248))
    pen, small = ImageDraw.Draw(image), font(11)
    widths = [pen.textlength(name, font=small) for name in curves]
    columns = 2 if len(curves) > 3 and max(widths[::2]) < SIZE / 2 - 4 and max(widths[1::2]) < SIZE / 2 - 14 else 1
    left, right, top, bottom = 46, SIZE - 10, 26 + 14 * -(-len(curves) // columns), SIZE - 34
    lines = {k: (_array(a).ravel(), _array(b).ravel()) for k, (a, b) in curves.items()}
    lines = {k: (np.log10(a) if logx else a, np.log10(np.maximum(b, 1e-12)) if logy else b) for k, (a, b) in lines.items()}
    xs, ys = (np.concatenate([[0.0] * (not lines), *(line[i][np.isfinite(line[i])] for line in lines.values())])
              for i in (0, 1))
    x0, x1, y0, y1 = xs.min(), xs.max(), ys.min(), ys.max()
    x1, y1 = x1 + (x1 == x0), y1 + (y1 == y0)
    pen.rectangle((left, top, right, bottom), outline=(160, 160, 160))
    for f in (0.0, 0.5, 1.0):
        value = y0 + f * (y1 - y0)
        pen.text((left - 4, bottom - f * (bottom - top)), f"{10**value if logy else value:.3g}", fill="black", font=small,
                 anchor="rm")
        value = x0 + f * (x1 - x0)
        pen.text((left + f * (right - left), bottom + 3), f"{10**value if logx else value:.3g}", fill="black", font=small,
                 anchor="lt" if f == 0 else "rt" if f == 1 else "mt")
    pen.text(((left + right) / 2, SIZE - 4), x, fill="black", font=small, anchor="mb")
    pen.text((4, 3), y, fill="black", font=small)
    for i, (name, (a, b)) in enumerate(lines.items()):
        colour = colours[name]
        place = [(left + (u - x0) / (x1 - x0) * (right - left), bottom - (v - y0) / (y1 - y0) * (bottom - top))
                 for u, v in zip(a, b) if np.isfinite(u) and np.isfinite(v)]
        if len(place) > 1:
            pen.line(place, fill=colour, width=2)
        if len(place) <= 30:
            for u, v in place:
                pen.ellipse((u - 3, v - 3, u + 3, v + 3), fill=colour)
        pen.text((12 + i % columns * SIZE / 2, 18 + 14 * (i // columns)), name, fill=colour, font=small)
    return image
