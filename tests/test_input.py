"""Bad input: one clear line that says what was wrong and what is possible, exit code 2, nothing half-written."""
import numpy as np
import pytest
from conftest import ROOT, inline, script

import ledger

GENERATOR, CLASSIFIER = "dmd", "kd"
IMAGES = np.zeros((20, 8, 8, 3), np.uint8)
LABELS = np.arange(20) % 4


def refused(done, *said):
    assert done.returncode == 2, done.stderr[-1500:]
    lines = [line for line in done.stderr.strip().splitlines() if not line.startswith("note:")]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for words in said:
        assert words in lines[0], lines[0]


@pytest.mark.parametrize("arguments, said", [
    (["--nope", "1"], ["unknown option --nope"]),
    (["--stesp", "5"], ["did you mean --steps"]),
    (["--data", "no_such_set"], ["no_such_set", "eight_gaussians", "shapes"]),
    (["--data", "missing.npz"], ["missing.npz"]),
    (["--steps", "-5"], ["--steps", "-5"]),
    (["--batch", "0"], ["--batch"]),
    (["--seeds", "0"], ["--seeds"]),
    (["--seeds", "two"], ["--seeds", "'two'"]),
    (["--device", "tpu"], ["--device", "cuda"]),
    (["--resume"], ["nothing to resume"]),
])
def test_bad_arguments(arguments, said, tmp_path):
    refused(inline(GENERATOR, "--smoke", "--out", tmp_path, *arguments), *said)
    assert not list(tmp_path.glob("*.json")) and not list(tmp_path.glob("*.png"))


def test_cuda_without_cuda(tmp_path):
    refused(script(GENERATOR, "--smoke", "--out", tmp_path, "--device", "cuda", CUDA_VISIBLE_DEVICES=""), "no CUDA device")


@pytest.mark.parametrize("arrays, said", [
    (dict(pictures=IMAGES), ["no array 'images'", "pictures"]),
    (dict(images=IMAGES[:, 0]), []),                # (N, W, C): three dimensions read as (N, H, W), and that is possible
    (dict(images=IMAGES.reshape(20, -1)), ["2 dimensions", "needed: 3 or 4"]),
    (dict(images=np.zeros((20, 8, 8, 5), np.uint8)), ["(20, 8, 8, 5)"]),
    (dict(images=IMAGES, labels=LABELS - 1), ["labels must be 0", "-1"]),
    (dict(images=IMAGES, labels=LABELS, classes=np.array(["a", "b", "c"])), ["labels must be 0..2", "0..3"]),
    (dict(images=IMAGES, labels=LABELS[:7]), ["7 labels for 20"]),
    (dict(images=IMAGES, labels=LABELS[:, None]), ["one integer an example"]),
    (dict(images=IMAGES, labels=LABELS * 0.5), ["one integer an example"]),
    (dict(images=IMAGES[:0], labels=LABELS[:0]), ["empty"]),
    (dict(images=np.full((20, 8, 8), np.nan)), ["NaN"]),
    (dict(images=np.full((20, 8, 8), 900.0)), ["[900, 900]"]),
    (dict(images=np.array(["a", "b"])), ["numbers are needed"]),
    (dict(points=np.zeros((5, 2, 2))), ["3 dimensions"]),
    (dict(points=np.full((5, 2), np.inf)), ["infinite"]),
    (dict(points=np.zeros((0, 2))), ["empty"]),
    (dict(train_images=IMAGES, train_labels=LABELS, test_images=IMAGES[:, :6], test_labels=LABELS), ["differ in shape"]),
    (dict(train_images=IMAGES, train_labels=LABELS, test_images=IMAGES, test_labels=LABELS + 1), ["labels must be 0..3"]),
    (dict(train_images=IMAGES, train_labels=LABELS), ["test_images"]),
])
def test_bad_files(arrays, said, tmp_path):
    import common
    path = tmp_path / "mine.npz"
    np.savez(path, **arrays)
    if not said:
        assert common.Images(str(path), "cpu").shape == (1, 8, 3)
        return
    with pytest.raises(common.UserError) as error:
        common.load_data(common.Config(data=str(path), device="cpu"))
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    for words in said:
        assert words in str(error.value)


def test_a_bad_file_on_the_command_line(tmp_path):
    np.savez(tmp_path / "mine.npz", images=IMAGES, labels=LABELS[:7])
    refused(inline(GENERATOR, "--smoke", "--out", tmp_path, "--data", tmp_path / "mine.npz"), "7 labels for 20")


@pytest.mark.parametrize("content", [b"", b"not a zip", b"cut", b"flipped", b"pickle"])
def test_damaged_files(content, tmp_path):
    path = tmp_path / "mine.npz"
    np.savez_compressed(path, images=np.random.default_rng(0).integers(0, 255, (20, 8, 8, 3)).astype(np.uint8))
    whole = path.read_bytes()
    if content == b"cut":
        content = whole[:len(whole) // 2]
    elif content == b"flipped":
        content = whole[:1000] + bytes(b ^ 255 for b in whole[1000:1100]) + whole[1100:]
    elif content == b"pickle":
        np.savez(path, images=np.array([{"a": 1}], dtype=object))
        content = path.read_bytes()
    path.write_bytes(content)
    refused(inline(GENERATOR, "--smoke", "--out", tmp_path, "--data", path), "not a readable .npz")


def test_classification_needs_labels(tmp_path):
    refused(inline(CLASSIFIER, "--smoke", "--out", tmp_path, "--data", "moons"), "labelled images")
    np.savez(tmp_path / "mine.npz", images=IMAGES)
    refused(inline(CLASSIFIER, "--smoke", "--out", tmp_path, "--data", tmp_path / "mine.npz"), "labelled images")


def test_unwritable_out(tmp_path):
    (tmp_path / "file").write_text("in the way")
    refused(inline(GENERATOR, "--smoke", "--out", tmp_path / "file"), "--out", "cannot be written")
    assert (tmp_path / "file").read_text() == "in the way"


def test_own_points_and_own_images_work(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "points.npz", points=rng.normal(size=(100, 3)))
    np.savez(tmp_path / "grey.npz", images=rng.random((40, 10, 10)).astype(np.float32))
    np.savez(tmp_path / "rgb.npz", images=rng.integers(0, 255, (40, 8, 8, 3), dtype=np.uint8), labels=np.arange(40) % 3)
    for kind in ("points", "grey", "rgb"):
        done = inline(GENERATOR, "--smoke", "--threads", "1", "--out", tmp_path, "--data", tmp_path / f"{kind}.npz")
        assert done.returncode == 0, done.stderr[-1500:]
        assert (tmp_path / f"{GENERATOR}.json").exists()
    done = inline(CLASSIFIER, "--smoke", "--threads", "1", "--out", tmp_path, "--data", tmp_path / "rgb.npz")
    assert done.returncode == 0, done.stderr[-1500:]


def test_data_is_looked_for_in_the_users_collection(tmp_path):
    np.savez(tmp_path / "collected.npz", points=np.random.default_rng(0).normal(size=(50, 2)))
    done = inline(GENERATOR, "--smoke", "--out", tmp_path, "--data", "collected", DISTILL_DATA=str(tmp_path))
    assert done.returncode == 0, done.stderr[-1500:]


def test_float_images_in_either_range_are_the_same_data(tmp_path):
    import common
    x = np.random.default_rng(0).integers(0, 256, (30, 6, 6)).astype(np.uint8)
    x[0, 0, :2] = 0, 255
    tensors = []
    for i, images in enumerate((x, x / 255, x / 127.5 - 1, x.astype(np.float32))):
        np.savez(tmp_path / f"{i}.npz", images=images)
        tensors.append(common.Images(str(tmp_path / f"{i}.npz"), "cpu").train)
    assert all((t == tensors[0]).all() for t in tensors)
    assert common.Images.normal(tensors[0]).amin() == -1 and common.Images.normal(tensors[0]).amax() == 1


def test_run_all_refuses_unknown_names_and_counts():
    import subprocess
    import sys
    for arguments, said in ((["nope"], "no method nope"), (["--seeds", "0"], "--seeds"), (["--jobs", "x"], "--jobs")):
        done = subprocess.run([sys.executable, ROOT / "ledger.py", "run", *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 2 and said in done.stderr
    assert ledger.methods()
