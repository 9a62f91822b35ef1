"""Kills, races, damaged files, non-finite losses: processes are really started and really killed."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, inline, load_method, script

import common
import ledger

SMALL = ["--batch", "16", "--teacher-steps", "300", "--steps", "150", "--eval-samples", "128", "--threads", "1"]
COMMAND = [sys.executable, str(ROOT / "methods" / "dmd.py"), *SMALL, "--checkpoint-every", "0.02"]


def metrics(folder):
    result = json.loads((folder / "dmd.json").read_text())
    return {arm: {k: v for k, v in m.items() if k != "seconds"} for arm, m in result["arms"].items()}


def start(folder, cache, *more):
    return subprocess.Popen([*COMMAND, "--out", str(folder), *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env={**os.environ, "DISTILL_CACHE": str(cache)}, text=True)


def test_kill_and_resume_gives_the_same_metrics(tmp_path):
    whole = start(tmp_path / "whole", tmp_path / "cache0")
    state = tmp_path / "killed" / "dmd.state" / "seed0"
    more = []
    for victim in ("teacher", "matching-only", "dmd"):      # killed in the teacher, in a baseline, in the method
        process = start(tmp_path / "killed", tmp_path / "cache1", *more)
        deadline = time.monotonic() + 100
        while not list(state.glob(f"{victim}-*.pt")):
            assert process.poll() is None, process.communicate()[0][-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "killed" / "dmd.json").exists()
        more = ["--resume"]
    last = start(tmp_path / "killed", tmp_path / "cache1", "--resume")
    output, _ = last.communicate()
    assert last.returncode == 0, output[-2000:]
    output, _ = whole.communicate()
    assert whole.returncode == 0, output[-2000:]
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    # the finished run can be resumed too: nothing is trained again, the results are the same
    again = start(tmp_path / "killed", tmp_path / "cache1", "--resume")
    assert again.wait() == 0 and metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    # another configuration is refused
    other = script("dmd", *SMALL, "--lr", "0.1", "--resume", "--out", tmp_path / "killed")
    assert other.returncode == 2 and "another configuration" in other.stderr and "lr was 0.00" in other.stderr


def test_interrupt_says_how_to_go_on(tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)   # it may be ignored here, as after a shell's &
    process = start(tmp_path, tmp_path / "cache", "--steps", "100000")
    signal.signal(signal.SIGINT, before)
    while not list(tmp_path.glob("dmd.state/seed0/regression*.pt")):
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in output.splitlines()[-1]


def test_two_runs_on_a_cold_cache_share_one_teacher(tmp_path):
    """The same command twice at once: same cache, same --out."""
    runs = [start(tmp_path / "out", tmp_path / "cache") for _ in range(2)]
    outputs = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert len(list((tmp_path / "cache").glob("teacher-*.pt"))) == 1
    assert sum("teacher " in output for output in outputs) == 1, "one of them trained the teacher"
    assert metrics(tmp_path / "out")


def teacher(cfg, trained=None):
    net = torch.nn.Linear(2, 2)

    def train():
        (trained if trained is not None else []).append(1)
        torch.nn.init.constant_(net.weight, 3.0)
    return common.trained(cfg, "teacher", net, train, steps=5)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_cache_file_is_rebuilt_with_a_warning(damage, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path))
    cfg, trained = common.Config(device="cpu"), []
    teacher(cfg, trained)
    teacher(cfg, trained)
    assert len(trained) == 1        # the second one came from the cache
    path, = tmp_path.glob("teacher-*.pt")
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes({"cut": content[:middle], "empty": b"",
                      "flip": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]}[damage])
    net = teacher(cfg, trained)
    assert len(trained) == 2 and "damaged" in capsys.readouterr().err
    assert (net.weight == 3).all() and not net.weight.requires_grad
    teacher(cfg, trained)
    assert len(trained) == 2


def test_what_determines_a_teacher_is_in_its_key(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path))
    trained = []
    teacher(common.Config(device="cpu"), trained)
    teacher(common.Config(device="cpu", seed=1), trained)
    common.trained(common.Config(device="cpu"), "teacher", torch.nn.Linear(2, 2), lambda: trained.append(1), steps=6)
    common.trained(common.Config(device="cpu"), "teacher", torch.nn.Linear(2, 3), lambda: trained.append(1), steps=5)
    assert len(trained) == 4


def test_a_damaged_checkpoint_restarts_its_arm_alone(tmp_path, capsys):
    arguments = ["--smoke", "--threads", "1", "--out", tmp_path]
    assert inline("dmd", *arguments).returncode == 0
    before = metrics(tmp_path)
    path, = tmp_path.glob("dmd.state/seed0/matching-only-*.pt")
    path.write_bytes(path.read_bytes()[:-100])
    done = inline("dmd", *arguments, "--resume")
    assert done.returncode == 0 and "damaged" in done.stderr
    assert metrics(tmp_path) == before


def test_no_pickle_is_loaded(tmp_path):
    """A checkpoint with a valid checksum that holds a pickled object is refused by torch's weights_only loader."""
    common.save_state(tmp_path / "x.pt", {"bad": common.Claim})
    with pytest.raises(Exception, match="[Ww]eights"):
        common.load_state(tmp_path / "x.pt")
    for path in [*ROOT.glob("*.py"), *ROOT.glob("methods/*.py"), *ROOT.glob("toy_data/*.py")]:
        source = path.read_text()
        assert "allow_pickle=True" not in source and "weights_only=False" not in source and "import pickle" not in source


def test_a_non_finite_loss_stops_the_run_with_step_and_term(tmp_path, monkeypatch):
    dmd = load_method("dmd")
    loss, calls = dmd.denoising_loss, []

    def sometimes(*arguments):
        calls.append(1)
        return loss(*arguments) * (float("nan") if len(calls) > 2 else 1)
    monkeypatch.setattr(dmd, "denoising_loss", sometimes)
    done = inline("dmd", "--smoke", "--threads", "1", "--out", tmp_path, "--steps", "30")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "error: matching only: loss term 'fake' is nan at step 2"
    assert not (tmp_path / "dmd.json").exists()


def test_runs_are_deterministic_and_seeds_differ(tmp_path):
    for folder, seed in (("a", 7), ("b", 7), ("c", 8)):
        assert inline("dmd", "--smoke", "--threads", "1", "--seed", seed, "--out", tmp_path / folder).returncode == 0
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b") != metrics(tmp_path / "c")


def test_several_seeds_are_the_single_runs(tmp_path):
    assert inline("dmd", "--smoke", "--threads", "1", "--seeds", "2", "--seed", "7", "--out", tmp_path / "two").returncode == 0
    assert inline("dmd", "--smoke", "--threads", "1", "--seed", "8", "--out", tmp_path / "one").returncode == 0
    two, one = metrics(tmp_path / "two"), metrics(tmp_path / "one")
    assert {arm: {k: v[1:] for k, v in m.items()} for arm, m in two.items()} == one


def test_run_all_skips_goes_on_after_a_failure_and_reports_it(tmp_path, monkeypatch, capsys):
    """In a copy of the project with two scripts, one of which fails."""
    import shutil
    for part in [*(p.name for p in ROOT.glob("*.py")), "run_all.sh"]:
        shutil.copy(ROOT / part, tmp_path / part)
    shutil.copytree(ROOT / "toy_data", tmp_path / "toy_data")
    (tmp_path / "methods").mkdir()
    (tmp_path / "README.md").write_text(f"top\n{ledger.BEGIN}\n{ledger.END}\nbottom\n")
    source = '''"""X - A title
Paper: A et al., B 2020, arXiv:2001.00001
Code: none
Family: test. Distils: nothing.

"""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
def run(cfg, log):
    log("a", acc=1.0 + cfg.seed / 10)
    log("b", acc=2.0)
CLAIMS = [common.Claim("a", "<", "b", "acc", "a is below b")]
if __name__ == "__main__":
    common.main(run, common.Config, CLAIMS)
'''
    (tmp_path / "methods" / "good.py").write_text(source)
    (tmp_path / "methods" / "bad.py").write_text(source.replace('log("b"', 'raise common.UserError("no luck")\n    log("b"'))

    def run_all():
        return subprocess.run(["./run_all.sh", "--seeds", "2", "--jobs", "2", "--threads", "1"], cwd=tmp_path, text=True,
                              capture_output=True, check=False, env={**os.environ, "PYTHON": sys.executable})
    first = run_all()
    assert first.returncode == 1, first.stderr
    assert "good: done" in first.stdout and "no luck" in first.stdout and "FAILED: bad" in first.stderr
    readme = (tmp_path / "README.md").read_text()
    assert "REPRODUCED" in readme and readme.startswith("top") and readme.endswith("bottom\n")
    second = run_all()
    assert "good: up to date" in second.stdout and second.returncode == 1
    (tmp_path / "methods" / "good.py").write_text(source.replace('says="', 'says="').replace("A title", "Another title"))
    assert "good: up to date" in run_all().stdout           # a reworded docstring asks for no new run
    (tmp_path / "methods" / "good.py").write_text(source.replace("2.0", "3.0"))
    assert "good: done" in run_all().stdout                 # other code does
