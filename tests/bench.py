"""What the harness costs and how long the scripts take: python tests/bench.py [names] [--steps N] [--fast]

For each script: the time of a training step divided by the time of the bare forward, backward and optimiser calls that
it consists of, measured in turns in one process (`ratio`; for the last arm trained, and the largest of all arms); it holds
the data, the objective's own arithmetic and the harness. The harness alone (bar, reading and checking losses, checkpoint
clock) as a share of that arm's step is `harness`, from a loop with an empty body and three loss terms; the seconds from the start of Python to the first training step; and the seconds and the peak memory of a default run with
a cold and with a warm cache of teachers (left out with --fast). Run it on an idle machine.

The bare step is made from a recording: the calls of the networks in one real step, with their inputs and whether they
carried gradient, then one backward pass through the mean of the outputs and the same optimiser steps.
"""
import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

CHILD = """
import json, sys, time
sys.path[:0] = [{root!r}, {tests!r}]
import bench
print(json.dumps(bench.ratios({name!r}, {steps})))
"""

FIRST_STEP = """
import sys, time, importlib.util
began = {began}
sys.path.insert(0, {root!r})
spec = importlib.util.spec_from_file_location({name!r}, {path!r})
module = importlib.util.module_from_spec(spec)
sys.modules[{name!r}] = module
spec.loader.exec_module(module)
import common
old = common.loop._read
def read(self, bar):
    print("first step after", time.time() - began)
    sys.stdout.flush()
    import os
    os._exit(0)
common.loop._read = read
common.loop.EVERY = 1
common.main(module.run, module.Config, module.CLAIMS, ["--threads", "2", "--out", {out!r}])
"""


def ratios(name: str, steps: int) -> dict[str, tuple[float, float]]:
    """{arm: (time of a step / time of its bare network and optimiser calls, share of the harness in the step)} for every
    training loop of a script."""
    import torch
    from conftest import load_method

    import common
    module, found = load_method(name), {}

    class Measured(common.loop):
        def __iter__(self):
            modules = [v for v in self.state.values() if isinstance(v, torch.nn.Module)]
            optimizers = [v for v in self.state.values() if isinstance(v, torch.optim.Optimizer)]
            if self.steps < 80 or not modules or not optimizers:
                yield from super().__iter__()
                return
            began, real, bare, recording, stepped = 0.0, [], [], [], []
            recorded = record(recording, stepped, torch)
            for step in super().__iter__():     # blocks of 20 real steps and 20 bare ones in turn
                if step == 20:
                    recorded.__enter__()
                elif step == 21:
                    recorded.__exit__(None, None, None)
                    tape = tapes(recording, torch)
                elif step >= 60 and step % 20 == 0:
                    real.append(time.perf_counter() - began)
                    bare.append(sum(replay(tape, stepped, torch) for _ in range(20)))
                if step >= 40 and step % 20 == 0:
                    began = time.perf_counter()
                if step >= 40 + steps:
                    break
                yield step
            if real:
                found[self.name] = statistics.median(real) / statistics.median(bare), 20 * empty / statistics.median(real)

    empty, terms = common.loop(common.Config(), "empty", 2000), {k: torch.tensor(1.0) for k in "abc"}
    began = time.perf_counter()
    for _ in empty:
        empty.losses(**terms)
    empty = (time.perf_counter() - began) / 2000
    original, common.loop = common.loop, Measured
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            os.environ["DISTILL_CACHE"] = folder
            common.main(module.run, module.Config, module.CLAIMS, ["--threads", "2", "--out", folder])
    finally:
        common.loop = original
    return found


@contextlib.contextmanager
def record(calls: list, stepped: list, torch):
    """Note the outermost network calls (module, arguments, gradient mode) and the optimiser steps while it is open."""
    from torch.optim.optimizer import register_optimizer_step_post_hook
    depth, call = [0], torch.nn.Module.__call__

    def noted(self, *arguments, **options):
        if depth[0] == 0 and not isinstance(self, torch.nn.modules.loss._Loss):
            calls.append((self, arguments, options, torch.is_grad_enabled()))
        depth[0] += 1
        try:
            return call(self, *arguments, **options)
        finally:
            depth[0] -= 1
    torch.nn.Module.__call__ = noted
    hook = register_optimizer_step_post_hook(lambda o, a, k: stepped.append(o))
    try:
        yield
    finally:
        torch.nn.Module.__call__ = call
        hook.remove()


def tapes(calls, torch):
    """The recording with inputs cut from their graphs; inputs that carried gradient still ask for it."""
    def cut(x):
        return x.detach().clone().requires_grad_(x.requires_grad) if torch.is_tensor(x) else x
    return [(m, tuple(map(cut, a)), {k: cut(v) for k, v in o.items()}, g) for m, a, o, g in calls]


def replay(tape, optimizers, torch) -> float:
    """Seconds of the bare calls."""
    began = time.perf_counter()
    total = []
    for module, arguments, options, gradient in tape:
        with torch.set_grad_enabled(gradient):
            out = module(*arguments, **options)
            if gradient and torch.is_tensor(out) and out.requires_grad:
                total.append(out.mean())
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    if total:
        sum(total).backward()
    for optimizer in optimizers:
        optimizer.step()
    return time.perf_counter() - began


def child(code: str, **environment: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                          env={**os.environ, **environment})
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return done.stdout


def whole_run(name: str, cache: str, out: str) -> tuple[float, float]:
    """Seconds and peak memory in MB of a default run."""
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, str(ROOT / "methods" / f"{name}.py"), "--out", out],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "DISTILL_CACHE": cache})
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{name} failed")
    return time.monotonic() - began, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="methods (default: all)")
    parser.add_argument("--steps", type=int, default=100, help="steps timed in each loop (default: 100)")
    parser.add_argument("--fast", action="store_true", help="leave out the default runs")
    args = parser.parse_args()
    names = args.names or sorted(p.stem for p in (ROOT / "methods").glob("*.py"))
    print(f"{'method':<24}{'ratio':>7}{'largest':>9}{'harness':>9}{'first step s':>14}{'cold s':>9}{'warm s':>9}{'MB':>7}")
    for name in names:
        path = ROOT / "methods" / f"{name}.py"
        with tempfile.TemporaryDirectory() as folder:
            found = json.loads(child(CHILD.format(root=str(ROOT), tests=str(ROOT / "tests"), name=name, steps=args.steps)))
            first = child(FIRST_STEP.format(root=str(ROOT), name=name, path=str(path), out=folder, began=time.time()),
                          DISTILL_CACHE=f"{folder}/first")
            arms = [arm for arm in found if arm not in ("teacher", "classifier")] or list(found)
            (ratio, share), largest = found[arms[-1]], max(r for r, _ in found.values())
            line = f"{name:<24}{ratio:>7.2f}{largest:>9.2f}{share:>9.1%}{float(first.split()[-1]):>14.1f}"
            if not args.fast:
                (cold, memory), (warm, _) = (whole_run(name, f"{folder}/cache", folder) for _ in range(2))
                line += f"{cold:>9.1f}{warm:>9.1f}{memory:>7.0f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
