"""Make the small data sets of this folder: python toy_data/make.py [names ...] [--out DIR]

Without names every set is made. The same bytes come out on every run: all randomness is seeded, and the npz
files are uncompressed, because compressors differ between versions. Images are uint8, channels last:
(N, H, W, C). Labels are int64, balanced and in random order.

    glyphs.npz     12x12 grey digits: 10 classes, 6000 train, 2000 test
    glyphs36.npz   12x12 grey digits and capitals: 36 classes, 3600 train, 1080 test
    shapes.npz     8x8 RGB shapes: 8 classes with attributes, 4000 train, 1000 test
    shapes16.npz   16x16 RGB shapes: the same with masks, 1000 train, 320 test

To add a set, write a function that returns a dict of arrays and put it into GENERATORS. The sample_*
functions draw as many more examples as a caller wants, with labels and colours of the caller's choice.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np

# 5x7 bitmaps: seven rows from the top, two hex digits a row, bit 4 is the leftmost column.
# Drawn here because the fonts of imaging libraries change between versions.
BITMAPS = {
    "0": "0E11131519110E", "1": "040C040404040E", "2": "0E11010204081F", "3": "1F02040201110E",
    "4": "02060A121F0202", "5": "1F101E0101110E", "6": "0608101E11110E", "7": "1F010204080808",
    "8": "0E11110E11110E", "9": "0E11110F01020C", "A": "0E1111111F1111", "B": "1E11111E11111E",
    "C": "0E11101010110E", "D": "1C12111111121C", "E": "1F10101E10101F", "F": "1F10101E101010",
    "G": "0E11101711110F", "H": "1111111F111111", "I": "0E04040404040E", "J": "0702020202120C",
    "K": "11121418141211", "L": "1010101010101F", "M": "111B1515111111", "N": "11111915131111",
    "O": "0E11111111110E", "P": "1E11111E101010", "Q": "0E11111115120D", "R": "1E11111E141211",
    "S": "0F10100E01011E", "T": "1F040404040404", "U": "1111111111110E", "V": "11110A0A0A0404",
    "W": "1111111515150A", "X": "11110A040A1111", "Y": "11110A04040404", "Z": "1F01020408101F",
}  # fmt: skip
GLYPHS = "".join(BITMAPS)  # class index -> character
GLYPH_SIZE = 12

SHAPES = ("disc", "square", "cross", "triangle", "ring", "horizontal bar", "vertical bar", "diagonal")
COLOURS = ("red", "green", "blue", "yellow", "magenta", "cyan")
PALETTE = ((225, 55, 50), (60, 200, 75), (65, 95, 235), (230, 210, 55), (215, 70, 205), (65, 205, 215))
ATTRIBUTES = ("shape", "colour", "x", "y")  # columns of the attribute arrays
POSITIONS = 3  # levels of the attributes x (left, middle, right) and y (top, middle, bottom)
TRAVEL = 0.3  # a shape's centre lies within this of the image's centre, in units of half the image width


def balanced_labels(n, classes, rng):
    """(n,) int64 in 0..classes-1 in random order; class counts differ by one at most."""
    return rng.permutation(np.arange(n, dtype=np.int64) % classes)


def bitmaps():
    """(36, 7, 5) float64 in {0, 1}: the characters of GLYPHS."""
    rows = np.array([list(bytes.fromhex(code)) for code in BITMAPS.values()])
    return ((rows[:, :, None] >> np.arange(4, -1, -1)) & 1).astype(np.float64)


def sample_glyphs(n, seed, classes=10, labels=None, jitter=1.0, noise=0.13):
    """Draw n glyphs: images (n, 12, 12, 1) uint8, bright on dark, and labels (n,) int64 in 0..classes-1.

    seed: whatever np.random.default_rng takes. classes: 10 (digits) or up to 36 (then A-Z).
    labels: (n,) integers, or None for balanced ones. jitter: 0 for upright glyphs in the middle, 1 for the
    strength of the files, more for strong views. noise: standard deviation of the pixel noise where full
    white is 1.
    """
    rng = np.random.default_rng(seed)
    labels = balanced_labels(n, classes, rng) if labels is None else np.asarray(labels, dtype=np.int64)

    def spread(width, *shape):
        return jitter * width * rng.uniform(-1, 1, (n, *shape))

    # Inverse affine map: from an output pixel back to a position in the bitmap.
    angle, shear, shift = spread(0.24), spread(0.2), spread(1.1, 2)
    scale = 1.3 * np.exp(spread(0.13, 1) + spread(0.09, 2))  # pixels a bitmap cell: common size, then aspect
    grid = np.arange(GLYPH_SIZE) - (GLYPH_SIZE - 1) / 2
    x = grid[None, None, :] - shift[:, 0, None, None]
    y = grid[None, :, None] - shift[:, 1, None, None]
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    u, v = cos * x + sin * y, cos * y - sin * x
    u = (u + shear[:, None, None] * v) / scale[:, 0, None, None] + 2  # (2, 3) is the middle of the bitmap
    v = v / scale[:, 1, None, None] + 3

    # Bilinear interpolation; the border of zeros lets every position outside read as background.
    padded = np.pad(bitmaps(), ((0, 0), (2, 2), (2, 2)))
    u, v = np.clip(u + 2, 0, 7.999), np.clip(v + 2, 0, 9.999)
    col, row = u.astype(np.int64), v.astype(np.int64)
    fu, fv, which = u - col, v - row, labels[:, None, None]
    top = (1 - fu) * padded[which, row, col] + fu * padded[which, row, col + 1]
    low = (1 - fu) * padded[which, row + 1, col] + fu * padded[which, row + 1, col + 1]
    ink = (1 - fv) * top + fv * low

    # A soft threshold makes strokes thicker or thinner; then contrast, a floor and noise.
    ink = np.clip(1.5 * ink - 0.2 + spread(0.15, 1, 1), 0, 1)
    high = 0.82 + spread(0.18, 1, 1)
    base = 0.08 + spread(0.08, 1, 1)
    grey = base + (high - base) * ink + noise * rng.standard_normal(ink.shape)
    images = np.rint(255 * np.clip(grey, 0, 1)).astype(np.uint8)[..., None]
    return {"images": images, "labels": labels}


def inside_shape(labels, x, y):
    """Where points lie inside their shape: (n, H, W) bool.

    labels: (n,) indices into SHAPES. x, y: broadcastable to (n, H, W), relative to the shape's centre and in
    units of its half width; y points down.
    """
    ax, ay, r2 = np.abs(x), np.abs(y), x * x + y * y
    tests = (
        lambda i: r2[i] < 1,
        lambda i: np.maximum(ax[i], ay[i]) < 0.9,
        lambda i: (np.maximum(ax[i], ay[i]) < 1.05) & (np.minimum(ax[i], ay[i]) < 0.32),
        lambda i: (y[i] < 0.9) & (ax[i] < 0.55 * (y[i] + 1.1)),
        lambda i: (r2[i] < 1.2) & (r2[i] > 0.36),
        lambda i: (ax[i] < 1.15) & (ay[i] < 0.36),
        lambda i: (ay[i] < 1.15) & (ax[i] < 0.36),
        lambda i: (np.abs(x[i] - y[i]) < 0.5) & (np.maximum(ax[i], ay[i]) < 1.0),
    )
    inside = np.empty(np.broadcast_shapes(x.shape, y.shape), dtype=bool)
    x, y = np.broadcast_to(x, inside.shape), np.broadcast_to(y, inside.shape)
    ax, ay = np.broadcast_to(ax, inside.shape), np.broadcast_to(ay, inside.shape)
    for label, test in enumerate(tests):
        members = np.flatnonzero(labels == label)
        inside[members] = test(members)
    return inside


def sample_shapes(n, seed, size=8, labels=None, colours=None, oversample=4):
    """Draw n coloured shapes on dark backgrounds.

    Returns a dict of
        images (n, size, size, 3) uint8
        labels (n,) int64, indices into SHAPES
        attributes (n, 4) int64 with the columns
            0 shape: 0-7, equal to the label
            1 colour: 0-5, index into COLOURS
            2 x of the centre: 0 left, 1 middle, 2 right, thirds of the range that centres cover
            3 y of the centre: 0 top, 1 middle, 2 bottom
        masks (n, size, size) uint8: 1 where the shape covers half of the pixel or more, otherwise 0

    labels, colours: (n,) integers, or None for balanced labels and independent uniform colours; colours
    chosen by label make a spurious correlation. oversample: points a pixel and axis for anti-aliasing.
    """
    rng = np.random.default_rng(seed)
    labels = balanced_labels(n, len(SHAPES), rng) if labels is None else np.asarray(labels, dtype=np.int64)
    drawn = rng.integers(len(COLOURS), size=n)  # drawn always, so that colours alter nothing else
    colours = drawn if colours is None else np.asarray(colours, dtype=np.int64)
    centre = rng.uniform(-1, 1, (n, 2))
    half_width = rng.uniform(0.5, 0.66, (n, 1, 1))

    grid = (np.arange(size * oversample) + 0.5) * 2 / (size * oversample) - 1
    x = (grid[None, None, :] - TRAVEL * centre[:, 0, None, None]) / half_width
    y = (grid[None, :, None] - TRAVEL * centre[:, 1, None, None]) / half_width
    inside = inside_shape(labels, x, y)
    cover = inside.reshape(n, size, oversample, size, oversample).mean((2, 4))[..., None]

    front = np.asarray(PALETTE, dtype=np.float64)[colours] + rng.uniform(-22, 22, (n, 3))
    back = rng.uniform(10, 40, (n, 1)) + rng.uniform(-9, 9, (n, 3))
    pixels = (1 - cover) * back[:, None, None] + cover * front[:, None, None]
    places = np.minimum((centre + 1) / 2 * POSITIONS, POSITIONS - 1).astype(np.int64)
    return {
        "images": np.rint(np.clip(pixels, 0, 255)).astype(np.uint8),
        "labels": labels,
        "attributes": np.column_stack([labels, colours, places]).astype(np.int64),
        "masks": (cover[..., 0] >= 0.5).astype(np.uint8),
    }


def train_and_test(sample, n_train, n_test, seed, **options):
    """Two independent draws of sample(n, seed, ...) in one dict, under train_* and test_*.

    The streams are (seed, 1) and (seed, 2): a caller's plain integer below 2**32 never repeats either.
    """
    parts = {"train": sample(n_train, (seed, 1), **options), "test": sample(n_test, (seed, 2), **options)}
    return {f"{part}_{key}": array for part, arrays in parts.items() for key, array in arrays.items()}


def glyphs(n_train=6000, n_test=2000, seed=10):
    """Digits 0-9: train_/test_ images (n, 12, 12, 1) uint8, labels (n,) int64 in 0..9."""
    return train_and_test(sample_glyphs, n_train, n_test, seed, classes=10)


def glyphs36(n_train=3600, n_test=1080, seed=36):
    """Digits and capitals: train_/test_ images (n, 12, 12, 1) uint8, labels (n,) int64 in 0..35."""
    return train_and_test(sample_glyphs, n_train, n_test, seed, classes=36)


def shapes(n_train=4000, n_test=1000, seed=8):
    """8x8 shapes: train_/test_ images (n, 8, 8, 3) uint8, labels (n,) int64 in 0..7, attributes (n, 4) int64.

    The columns of attributes are shape, colour, x, y: see sample_shapes.
    """
    arrays = train_and_test(sample_shapes, n_train, n_test, seed, size=8)
    return {key: array for key, array in arrays.items() if not key.endswith("_masks")}


def shapes16(n_train=1000, n_test=320, seed=16):
    """16x16 shapes: the arrays of shapes at 16x16, and train_/test_ masks (n, 16, 16) uint8 in {0, 1}."""
    return train_and_test(sample_shapes, n_train, n_test, seed, size=16)


# File stem -> function that returns the file's arrays when called without arguments.
GENERATORS = {"glyphs": glyphs, "glyphs36": glyphs36, "shapes": shapes, "shapes16": shapes16}


def save(path, arrays):
    """Write a dict of arrays as an uncompressed npz; a reader never sees half a file."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(part, "wb") as file:
            np.savez(file, **arrays)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line instead of argparse's usage block."""
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv=None):
    known = ", ".join(GENERATORS)
    parser = Parser(prog="make.py", description="Make the small data sets.", allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="name", help=f"any of {known}; none means all")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).resolve().parent,
        metavar="DIR",
        help="folder to write to, made if missing (default: the folder of this file)",
    )
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in GENERATORS]
    if unknown:
        parser.error(f"unknown name {', '.join(map(repr, unknown))}; choose from {known}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        for name in dict.fromkeys(args.names or GENERATORS):
            path = args.out / f"{name}.npz"
            save(path, GENERATORS[name]())
            print(f"{path}  {path.stat().st_size:,} bytes")
    except OSError as problem:
        parser.error(f"cannot write to {args.out}: {problem.strerror or problem}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
