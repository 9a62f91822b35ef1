"""The toy data: reproducible to the byte, well formed, small, and neither trivial nor hopeless to learn."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parent.parent / "toy_data"
spec = importlib.util.spec_from_file_location("toy_data_make", FOLDER / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)

# name: (train, test, image shape, classes)
IMAGE_SETS = {
    "glyphs": (6000, 2000, (12, 12, 1), 10),
    "glyphs36": (3600, 1080, (12, 12, 1), 36),
    "shapes": (4000, 1000, (8, 8, 3), 8),
    "shapes16": (1000, 320, (16, 16, 3), 8),
}


def load(name):
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def run(*arguments):
    command = [sys.executable, str(FOLDER / "make.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_every_file_is_regenerated_to_the_byte(tmp_path):
    done = run("--out", tmp_path / "new")
    assert done.returncode == 0, done.stderr
    made = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert made == sorted(f"{name}.npz" for name in make.GENERATORS)
    for name in made:
        assert (tmp_path / "new" / name).read_bytes() == (FOLDER / name).read_bytes(), name


def test_only_the_named_files_are_written(tmp_path):
    assert make.main(["shapes16", "shapes16", "--out", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["shapes16.npz"]


@pytest.mark.parametrize("arguments", [["glyfs"], ["glyphs", "glyfs"], ["--glyfs"]])
def test_unknown_names_end_in_one_line(tmp_path, arguments):
    done = run(*arguments, "--out", tmp_path / "new")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "glyfs" in done.stderr
    assert not (tmp_path / "new").exists()


def test_unusable_folder_ends_in_one_line(tmp_path):
    (tmp_path / "file").write_text("kept")
    done = run("shapes", "--out", tmp_path / "file")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "file").read_text() == "kept"


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "set.npz"
    target.write_bytes(b"old")

    def broken(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(make.np, "savez", broken)
    with pytest.raises(OSError, match="disk full"):
        make.save(target, {"a": np.zeros(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["set.npz"]
    assert target.read_bytes() == b"old"


def test_total_size():
    assert sum(path.stat().st_size for path in FOLDER.glob("*.npz")) < 8_000_000


@pytest.mark.parametrize("name", IMAGE_SETS)
def test_arrays(name):
    n_train, n_test, image, classes = IMAGE_SETS[name]
    data = load(name)
    keys = {"shapes": ("attributes",), "shapes16": ("attributes", "masks")}.get(name, ())
    assert set(data) == {f"{part}_{key}" for part in ("train", "test") for key in ("images", "labels", *keys)}
    for part, n in (("train", n_train), ("test", n_test)):
        images, labels = data[f"{part}_images"], data[f"{part}_labels"]
        assert images.shape == (n, *image)
        assert images.dtype == np.uint8
        assert images.min() < 30
        assert images.max() > 225
        assert labels.shape == (n,)
        assert labels.dtype == np.int64
        assert np.bincount(labels).tolist() == [n // classes] * classes
        assert (np.diff(labels) < 0).any(), "labels are not in random order"


@pytest.mark.parametrize("name", IMAGE_SETS)
def test_no_image_occurs_twice(name):
    data = load(name)
    images = [image.tobytes() for part in ("train", "test") for image in data[f"{part}_images"]]
    assert len(set(images)) == len(images)


@pytest.mark.parametrize("name", ["shapes", "shapes16"])
@pytest.mark.parametrize("part", ["train", "test"])
def test_attributes_describe_the_image(name, part):
    data = load(name)
    images, attributes = data[f"{part}_images"].astype(float), data[f"{part}_attributes"]
    assert attributes.shape == (len(images), len(make.ATTRIBUTES))
    assert attributes.dtype == np.int64
    shape, colour, x, y = attributes.T
    assert (shape == data[f"{part}_labels"]).all()
    for column, levels in ((colour, len(make.COLOURS)), (x, make.POSITIONS), (y, make.POSITIONS)):
        share = np.bincount(column, minlength=levels) / len(column)
        assert len(share) == levels
        assert abs(share - 1 / levels).max() < 0.08

    # The brightest pixel lies in the shape: its colour is nearest to the palette entry.
    flat = images.reshape(len(images), -1, 3)
    front = flat[np.arange(len(flat)), flat.sum(-1).argmax(1)]
    nearest = ((front[:, None] - np.array(make.PALETTE)) ** 2).sum(-1).argmin(1)
    assert (nearest == colour).mean() > 0.97
    weight = flat.max(-1).reshape(images.shape[:3])
    weight = np.clip(weight - 90, 0, None)
    place = np.arange(images.shape[1])
    across, down = weight.sum(1) @ place / weight.sum((1, 2)), weight.sum(2) @ place / weight.sum((1, 2))
    for measured, column in ((across, x), (down, y)):
        means = [measured[column == level].mean() for level in range(make.POSITIONS)]
        assert (np.diff(means) > 0.08 * images.shape[1]).all()


@pytest.mark.parametrize("part", ["train", "test"])
def test_masks_cover_the_shape(part):
    data = load("shapes16")
    masks, images = data[f"{part}_masks"], data[f"{part}_images"].max(-1)
    assert masks.shape == images.shape
    assert masks.dtype == np.uint8
    assert set(np.unique(masks)) == {0, 1}
    assert masks.sum((1, 2)).min() >= 10
    assert masks.mean() < 0.4
    # Front colours have a channel far above every background, and half-covered pixels lie between.
    assert images[masks == 1].min() > 80
    assert np.median(images[masks == 0]) < 50


def ridge_accuracy(data, strength=30.0):
    """Test accuracy of a linear least-squares classifier on the pixels."""

    def features(part):
        x = data[f"{part}_images"].reshape(len(data[f"{part}_images"]), -1) / 255.0
        return np.column_stack([x, np.ones(len(x))])

    x, labels = features("train"), data["train_labels"]
    weights = np.linalg.solve(x.T @ x + strength * np.eye(x.shape[1]), x.T @ np.eye(labels.max() + 1)[labels])
    return ((features("test") @ weights).argmax(1) == data["test_labels"]).mean()


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("glyphs", 0.7, 0.97), ("glyphs36", 0.4, 0.9), ("shapes", 0.4, 0.97), ("shapes16", 0.4, 0.97)],
)
def test_a_linear_classifier_learns_something_but_not_all(name, low, high):
    assert low < ridge_accuracy(load(name)) < high


def test_samplers_draw_more_on_demand():
    first, same = make.sample_glyphs(50, 3, classes=36), make.sample_glyphs(50, 3, classes=36)
    assert all((first[key] == same[key]).all() for key in first)
    assert not (first["images"] == make.sample_glyphs(50, 4, classes=36)["images"]).all()

    still = make.sample_glyphs(20, 0, labels=np.full(20, 7), jitter=0, noise=0)
    assert (still["labels"] == 7).all()
    assert (still["images"] == still["images"][0]).all()

    labels = np.arange(40) % 8
    tied = make.sample_shapes(40, 0, size=12, labels=labels, colours=labels % 6)
    assert tied["images"].shape == (40, 12, 12, 3)
    assert tied["masks"].shape == (40, 12, 12)
    assert (tied["attributes"][:, :2] == np.column_stack([labels, labels % 6])).all()


@pytest.mark.parametrize("name", ["glyphs", "shapes"])
def test_a_plain_seed_does_not_repeat_the_files(name):
    sample = {"glyphs": make.sample_glyphs, "shapes": make.sample_shapes}[name]
    kept = {image.tobytes() for image in load(name)["train_images"]}
    for seed in (0, 8, 10):
        assert not kept & {image.tobytes() for image in sample(100, seed)["images"]}


def test_bitmaps_are_distinct():
    maps = make.bitmaps()
    assert maps.shape == (36, 7, 5)
    assert make.GLYPHS == "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    differ = np.abs(maps[:, None] - maps[None]).sum((2, 3)) + 99 * np.eye(36)
    assert differ.min() >= 3
