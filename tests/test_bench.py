"""bench.py on random 32x32 images with tiny settings: what it measures, what it replays, what it writes."""
import json

import bench
import numpy as np
import pytest
import torch


@pytest.mark.parametrize("flags", [[], ["--amp"]], ids=["fp32", "bf16"])
def test_loops_of_a_script_at_scale(flags, tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path))      # bench sets its own, and this puts it back
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "tiny32.npz", images=rng.integers(0, 255, (60, 32, 32, 3), dtype=np.uint8), labels=np.arange(60) % 3)
    got = bench.variant("dmd", 3, ["--data", str(tmp_path / "tiny32.npz"), "--device", "cpu", "--threads", "1", "--smoke",
                                   "--width", "8", "--depth", "1", "--batch", "4", "--eval-samples", "16", "--pairs", "8",
                                   "--nfe-teacher", "2", *flags])
    assert (got["code"], got["device"]) == (0, "cpu")
    networks = {arm: loop["networks"] for arm, loop in got["loops"].items()}
    assert networks == {"teacher": 1, "regression only": 1, "matching only": 3, "dmd": 3}
    assert {arm: loop["batch"] for arm, loop in got["loops"].items()} == {a: 16 if a == "teacher" else 4 for a in networks}
    for loop in got["loops"].values():
        assert loop["real"] > 0 and loop["bare"] > 0 and loop["peak"] is None and loop["compiled"] == 0


def test_the_bare_calls_are_those_of_the_step():
    """The same networks, precision, gradient mode and optimiser steps, and the inputs keep their wish for a gradient."""
    seen = []

    class Net(torch.nn.Linear):
        def forward(self, x):
            out = super().forward(x)
            seen.append((out.dtype, torch.is_grad_enabled(), x.requires_grad, x.shape))
            return out
    net, teacher = Net(3, 3), Net(3, 3)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    calls, stepped = [], []
    with bench.record(calls, stepped, "cpu", torch):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            target = teacher(torch.randn(5, 3))
        with torch.autocast("cpu", torch.bfloat16):
            x = net(torch.randn(5, 3))
        loss = net(x.float()).square().mean() + target.float().mean()
        loss.backward()
        optimizer.step()
    real, before = seen[:], net.weight.detach().clone()
    seen.clear()
    bench.replay([(bench.cut(calls, torch), stepped)], "cpu", torch)
    assert seen == real == [(torch.bfloat16, False, False, (5, 3)), (torch.bfloat16, True, False, (5, 3)),
                            (torch.float32, True, True, (5, 3))]
    assert stepped == [optimizer] and not torch.equal(net.weight, before)
    assert torch.nn.Module.__call__.__name__ != "noted" and torch.autocast.__enter__.__name__ == "__enter__"


def test_the_table_and_its_file(tmp_path, monkeypatch, capsys):
    loop = dict(real=0.1, bare=0.09, harness=0.0, batch=128, peak=3 * 2**30, networks=3, compiled=1)
    asked = []

    def call(expression):
        asked.append(expression)
        if "--amp" in expression:
            return dict(loops={}, code=1), "error: out of memory"
        return dict(loops=dict(dmd=loop, experts=loop | dict(bare=None, batch=None)), code=0, device="GPU", torch="2"), ""
    monkeypatch.setattr(bench, "call", call)
    path = tmp_path / "b.json"
    monkeypatch.setattr("sys.argv", ["bench.py", "dmd", "--data", "x.npz", "--device", "cuda", "--variants", "compile", "bf16",
                                     "--json", str(path), "--", "--width", "8"])
    assert bench.main() == 1
    assert asked[0] == "variant('dmd', 200, ['--compile', '--data', 'x.npz', '--device', 'cuda', '--width', '8'])"
    made, (out, err) = json.loads(path.read_text()), capsys.readouterr()
    assert (made["device"], made["torch"], made["steps"]) == ("GPU", "2", 200) and len(made["rows"]) == 2
    first, second = made["rows"]
    assert first["samples_per_second"] == pytest.approx(1280) and first["bare_over_real"] == pytest.approx(0.9)
    assert (first["ms"], first["peak_mb"], first["variant"]) == (pytest.approx(100), 3072, "compile")
    assert second["samples_per_second"] is None and second["bare_over_real"] is None
    assert out.splitlines()[1].split() == ["dmd", "dmd", "compile", "100.0", "1280", "0.90", "3072", "1", "of", "3"]
    assert "GPU, torch 2" in out and "dmd, bf16: ended early, loops may be missing (error: out of memory)" in err


def test_options_that_need_data_say_so(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench.py", "dmd", "--", "--width", "8"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "go with --data" in capsys.readouterr().err
