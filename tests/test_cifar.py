"""The path of 32x32 images on the CPU with tiny settings: presets, metrics, sample pictures, resume, leaderboard."""
import ast
import json
import os
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, inline, load_method

import common
import ledger
import networks

READY = [name for name in ledger.methods() if ledger.has_settings(name, "cifar10")]
GENERATORS = [name for name in READY if "common.quality(" in (ROOT / "methods" / f"{name}.py").read_text()]
TINY = ["--width", "8", "--depth", "1"]
TINY_OF = {"kd": ["--teacher-width", "8"], "mtt": ["--width", "8", "--batch-real", "40"],
           "ftd": ["--width", "8", "--batch-real", "40"]}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """400 random images in ten classes, each class of one colour."""
    rng = np.random.default_rng(0)
    labels = np.arange(400) // 40
    x = rng.integers(0, 80, (400, 32, 32, 3)) + 17 * labels[:, None, None, None]
    path = tmp_path_factory.mktemp("data") / "tiny32.npz"
    np.savez(path, images=x.astype(np.uint8), labels=labels)
    return path


def results(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_the_image_methods_have_settings_for_cifar():
    asked = {"dmd", "dmd2", "consistency_models", "ict", "twinflow", "arcflow", "flow_maps", "instaflow", "kd", "pld",
             "ofa_kd", "mtt", "ftd"}
    assert asked <= set(READY) and "self_forcing" not in READY
    assert ledger.has_settings("self_forcing", None)


@pytest.mark.parametrize("name", GENERATORS)
def test_generators_share_network_teacher_and_budget(name, images):
    """What makes the scores on the leaderboard comparable."""
    cfg = common.parse(load_method(name).Config, ["--data", str(images)])
    assert (cfg.width, cfg.depth, cfg.batch, cfg.steps, cfg.eval_samples) == (96, 2, 128, 20_000, 10_000)
    assert getattr(cfg, "teacher_steps", 50_000) == 50_000 == getattr(cfg, "brief_teacher_steps", 50_000)
    assert common.parse(load_method(name).Config, ["--data", str(images), "--steps", "7"]).steps == 7, "flags win"


@pytest.mark.parametrize("name", READY)
def test_every_method_with_settings_walks_through(name, images, tmp_path):
    tiny = TINY if name in GENERATORS else TINY_OF.get(name, [])
    run = inline(name, "--data", images, "--smoke", "--threads", "1", "--out", tmp_path, *tiny)
    assert run.returncode == 0, run.stderr[-2000:]
    found = results(tmp_path, name)
    assert all(np.isfinite(v).all() for arm in found["arms"].values() for v in arm.values())
    if name in GENERATORS:
        assert any({"fd", "precision", "recall", "nfe"} <= set(arm) for arm in found["arms"].values())
        assert list((tmp_path / f"{name}.state").rglob("*.png")), "pictures of samples during training"


def test_real_cifar_when_it_is_there(tmp_path):
    """Teacher, generator, classifier, metrics and resume on the real images."""
    if not os.environ.get("DISTILL_DATA") or common.find_data("cifar10_subset") is None:
        pytest.skip("DISTILL_DATA holds no cifar10_subset.npz")
    settings = ["--data", "cifar10_subset", *TINY, "--batch", "8", "--steps", "3", "--teacher-steps", "3", "--pairs", "8",
                "--eval-samples", "32", "--threads", "1", "--smoke", "--out", tmp_path]
    assert inline("dmd", *settings).returncode == 0
    first = results(tmp_path, "dmd")["arms"]
    assert {"fd", "precision", "recall"} <= set(first["dmd"])
    assert inline("dmd", *settings, "--resume").returncode == 0      # nothing is trained again
    assert results(tmp_path, "dmd")["arms"] == first
    run = inline("kd", "--data", "cifar10_subset", "--smoke", "--threads", "1", "--out", tmp_path)
    assert run.returncode == 0 and "acc" in run.stdout


def test_samples_for_the_metrics_are_made_in_parts():
    torch.manual_seed(0)
    net = networks.UNet((1, 32, 32), 4, 1, classes=3, times=2).eval()
    x, t, y, s = torch.randn(1203, 1, 32, 32), torch.rand(1203), torch.randint(3, (1203,)), torch.rand(1203)
    with torch.no_grad():
        whole = net(x, t, y, s)
        assert whole.shape == x.shape
        for i in (0, 999, 1000, 1202):
            assert torch.allclose(whole[i], net(x[i:i + 1], t[i:i + 1], y[i:i + 1], s[i:i + 1])[0], atol=1e-5)
        assert torch.allclose(net(x, t)[1100], net(x[1100:1101], t[1100:1101])[0], atol=1e-5)


def test_forward_mode_goes_through_the_attention():
    torch.manual_seed(0)
    net = networks.UNet((1, 16, 16), 8).double().eval()
    x, d, t = torch.randn(2, 1, 16, 16).double(), torch.randn(2, 1, 16, 16).double(), torch.rand(2).double()
    _, derivative = torch.func.jvp(lambda z: net(z, t), (x,), (d,))
    with torch.no_grad():
        numeric = (net(x + 1e-5 * d, t) - net(x - 1e-5 * d, t)) / 2e-5
    assert torch.allclose(derivative, numeric, atol=1e-6)


def test_pictures_during_training_do_not_move_the_numbers(tmp_path):
    def draws(preview):
        cfg = common.Config(steps=4, seed=3, preview_every=0)
        cfg.context.state = tmp_path
        return [torch.randn(2).tolist() for _ in common.loop(cfg, "arm", preview=preview)]
    assert draws(None) == draws(lambda: torch.randn(5, 1, 8, 8).clamp(-1, 1))
    assert list(tmp_path.glob("arm-*.png"))


def test_precision_and_recall_in_blocks():
    torch.manual_seed(0)
    real, fake = torch.randn(2500, 3), 0.5 * torch.randn(2300, 3)
    precision, recall = common.precision_recall(real, fake)
    radius = torch.cdist(real, real).sort(1)[0][:, 3]
    assert precision == pytest.approx((torch.cdist(fake, real) <= radius).any(1).float().mean().item(), abs=1e-3)
    assert precision > 0.95 and recall < 0.9


def test_frechet_of_moments_is_that_of_features():
    x, y = torch.randn(300, 5), 2 * torch.randn(200, 5) + 1
    assert common.frechet(common.moments(x), common.moments(y)) == pytest.approx(common.frechet(x, y), rel=1e-12)


class FakeModels:
    """Stands for torchvision.models: a network of the right interface with random weights."""
    class Inception_V3_Weights:
        IMAGENET1K_V1 = None

    @staticmethod
    def inception_v3(weights):
        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.body, self.fc = torch.nn.Linear(3, 16), torch.nn.Linear(16, 10)

            def forward(self, x):
                assert x.shape[1:] == (3, 299, 299)
                return self.fc(self.body(x.mean((2, 3))))
        torch.manual_seed(0)
        return Net()


def test_fid_is_an_option_and_its_reference_is_cached(images, tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path))
    cfg = common.Config(data=str(images), smoke=True, fid=True)
    data = common.load_data(cfg)
    samples = data.normal(data.train[:20])
    monkeypatch.setattr(common, "load_torchvision", lambda asked: type("T", (), {"models": FakeModels}))
    first = common.quality(cfg, data, samples)
    assert first["fid_torchvision"] >= 0 and len(list(tmp_path.glob("inception-*.pt"))) == 1
    assert common.quality(cfg, common.load_data(cfg), samples) == first
    reference, = tmp_path.glob("inception-*.pt")
    reference.write_bytes(reference.read_bytes()[:-1])      # damaged: rebuilt, like a teacher
    assert common.quality(cfg, common.load_data(cfg), samples) == first

    def offline(weights):
        raise urllib.error.URLError("no network")
    monkeypatch.setattr(FakeModels, "inception_v3", staticmethod(offline))
    with pytest.raises(common.UserError, match="--fid.*could not be downloaded"):
        common.quality(cfg, common.load_data(cfg), samples)


def test_settings_for_cifar_make_only_its_own_results_stale(tmp_path, images):
    source = (ROOT / "methods" / "dmd.py").read_text()
    changed = tmp_path / "dmd.py"
    changed.write_text(source.replace("lr=5e-5", "lr=6e-5"))
    assert changed.read_text() != source
    original = ROOT / "methods" / "dmd.py"
    assert ledger.fingerprint(changed, "unequal_ring") == ledger.fingerprint(original, "unequal_ring")
    assert ledger.fingerprint(changed, str(images)) != ledger.fingerprint(original, str(images))
    tree = ast.parse(source)
    without = [n for n in ast.walk(tree) if isinstance(n, ast.keyword) and n.arg == "preview"]
    assert without, "dmd draws its samples during training"
    changed.write_text(source.replace(ast.get_source_segment(source, without[0]), "preview=None"))
    assert ledger.fingerprint(changed) == ledger.fingerprint(original)
    changed.write_text(source.replace("lr=3e-4", "lr=4e-4"))
    assert ledger.fingerprint(changed) != ledger.fingerprint(original)


def test_leaderboard_ranks_by_calls_and_distance(tmp_path, monkeypatch):
    def made(method, **arms):
        return dict(method=method, arms={k.replace("_", " "): v for k, v in arms.items()}, device="cpu", torch="2", seeds=[0])
    folder = tmp_path / "results" / "cifar10"
    folder.mkdir(parents=True)
    (tmp_path / "README.md").write_text(f"a\n{ledger.BEGIN_CIFAR}\nold\n{ledger.END_CIFAR}\nb\n")
    for name, content in {
            "a": made("A", teacher=dict(fd=[9.0], nfe=[50]), slow=dict(fd=[1.0], nfe=[4], seconds=[3])),
            "b": made("B", teacher=dict(fd=[9.0], nfe=[50]), far=dict(fd=[8.0], nfe=[1]), near=dict(fd=[7.0], nfe=[1])),
            "c": made("C", low=dict(acc=[0.2], nll=[1]), high=dict(acc=[0.9], nll=[1]))}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    monkeypatch.setattr(ledger, "ROOT", tmp_path)
    ledger.write_leaderboard(folder)
    text = (tmp_path / "README.md").read_text()
    places = [text.index(word) for word in ("| near |", "| far |", "| slow |", "| teacher |", "| high |", "| low |")]
    assert places == sorted(places) and text.count("| teacher |") == 1 and "old" not in text
    assert "(methods/a.py)" in text and "(../../methods/a.py)" in Path(folder / "README.md").read_text()
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 2, "as many cells as columns"


def test_out_of_memory_names_the_settings_to_lower(images, tmp_path, monkeypatch):
    dmd = load_method("dmd")

    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(dmd, "train", full)
    run = inline("dmd", "--data", images, "--smoke", "--threads", "1", "--out", tmp_path, *TINY)
    assert run.returncode == 1 and "out of memory; lower --batch, --width" in run.stderr
