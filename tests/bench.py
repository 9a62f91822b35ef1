"""What the harness costs and how long the scripts take: python tests/bench.py [names] [--steps N] [--fast]

For each script: the time of a training step divided by the time of the bare forward, backward and optimiser calls that
it consists of, measured in turns in one process (`ratio`; for the last arm trained, and the largest of all arms); it holds
the data, the objective's own arithmetic and the harness. The harness alone (bar, reading and checking losses, checkpoint
clock) as a share of that arm's step is `harness`, from a loop with an empty body and three loss terms; the seconds from the
start of Python to the first training step; and the seconds and the peak memory of a default run with a cold and with a
warm cache of teachers (left out with --fast). Run it on an idle machine.

    python tests/bench.py dmd kd --data FILE.npz --device cuda --json FILE.json [-- options of the scripts]

With --data the settings that a script takes for these data (on 32x32 images: `cifar`), every training loop for --steps and
a warm-up, plain (fp32; on a GPU TF32), with --amp (bf16), --compile and both. One row a loop: milliseconds a step, samples
a second (batch over the time of a step), bare/real, and the peak of the GPU's memory in training, all that the script keeps
there included. bare/real is the time of the bare calls over that of the real step, the inverse of `ratio`: 1 when the
script adds nothing to its networks, aim 0.95. It is low by nature where the objective itself is expensive (derivatives in
forward mode, clipping) and empty where a loop has no network of its own. `compiled` says how many of the networks that a
step calls --compile has reached. To try it on a CPU: -- --smoke --width 8 --depth 1.

The bare steps are made from a recording of a block of real ones: the calls of the networks, with their inputs, autocast and
whether they carried gradient, then one backward pass through the mean of the outputs and the same optimiser steps.
"""
import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = {"fp32": [], "bf16": ["--amp"], "compile": ["--compile"], "bf16+compile": ["--amp", "--compile"]}

CHILD = """
import json, sys
sys.path[:0] = [{root!r}, {tests!r}]
import bench
print(json.dumps(bench.{call}))
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


def measure(name: str, steps: int, arguments: list[str]) -> dict:
    """Run a script with these arguments and time `steps` steps of every training loop that is long enough, in blocks of 20
    real steps and 20 bare ones in turn; a loop of networks ends there. Returns the loops and the script's exit code.

    A loop has real and bare, seconds a step; harness, its share in the step; batch, samples a step; peak, bytes on the GPU;
    networks and compiled, how many networks a step calls and how many of them are compiled. What cannot be known is None."""
    import torch
    from conftest import load_method

    import common
    module, found, block = load_method(name), {}, min(20, steps)

    def now(device):
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    class Measured(common.loop):
        def __iter__(self):
            if arguments and self.name == "classifier":     # it only judges the arms, and longer than they are trained here
                self.steps = 3
            if self.steps <= 3 * block:
                yield from super().__iter__()
                return
            trains = all(any(isinstance(v, kind) for v in self.state.values())
                         for kind in (torch.nn.Module, torch.optim.Optimizer))
            device, began, peak, real, bare, calls, stepped, tape = self.cfg.dev, 0.0, None, [], [], [], [], []
            recorded = record(calls, stepped, device.type, torch) if trains else contextlib.nullcontext()
            for step in super().__iter__():     # warm-up, block to record, then timed blocks
                if step == block // 2 and device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                if step == block:
                    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
                    recorded.__enter__()
                elif block < step <= 2 * block and trains:
                    tape.append((cut(calls, torch), stepped[:]))
                    calls.clear(), stepped.clear()
                if step == 2 * block:
                    recorded.__exit__(None, None, None)
                    replay(tape, device.type, torch)
                elif step > 2 * block and step % block == 0:
                    real.append(now(device) - began)
                    if trains:
                        began = now(device)
                        replay(tape, device.type, torch)
                        bare.append(now(device) - began)
                if step >= 2 * block and step % block == 0:
                    began = now(device)
                if step >= 2 * block + steps and trains:
                    break
                yield step
            networks = {id(m): m for calls, _ in tape for m, *_ in calls}.values()
            found[self.name] = dict(
                real=statistics.median(real) / block, bare=statistics.median(bare) / block if networks else None,
                harness=empty * block / statistics.median(real), batch=batch(self, tape), peak=peak, networks=len(networks),
                compiled=sum(any(part._compiled_call_impl for part in m.modules()) for m in networks))

    def batch(loop, tape):
        if re.match("teacher|flow matching$", loop.name):     # their batch is not that of the arms
            sizes = [len(x) for calls, _ in tape for _, inputs, *_ in calls for x in inputs[:1] if torch.is_tensor(x)]
            return sizes[0] if sizes else None
        return getattr(loop.cfg, "batch", None)

    empty, terms = common.loop(common.Config(), "empty", 2000), {k: torch.tensor(1.0) for k in "abc"}
    began = time.perf_counter()
    for _ in empty:
        empty.losses(**terms)
    empty = (time.perf_counter() - began) / 2000
    original, common.loop, code = common.loop, Measured, 0
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            os.environ["DISTILL_CACHE"] = folder
            common.main(module.run, module.Config, module.CLAIMS, ["--threads", "2", "--out", folder, *arguments])
    except SystemExit as stopped:
        code = stopped.code
    except Exception:       # noqa: BLE001 - whatever ended it, the loops until then are of use
        traceback.print_exc()
        code = 1
    finally:
        common.loop = original
    return dict(loops=found, code=code)


def short(name: str, steps: int) -> list[str]:
    """Options for a script that leave its training steps as they are and make the rest small."""
    from conftest import load_method
    wanted = dict(steps=2 * min(20, steps) + steps + 1, eval_samples=256, pairs=512, eval_steps=10, expert_epochs=2, segment=1,
                  max_start=2)
    wanted["teacher_steps"] = wanted["steps"]
    options = []
    for field in dataclasses.fields(load_method(name).Config):
        if field.name in wanted:
            times = len(field.default) if isinstance(field.default, tuple) else 1
            options += ["--" + field.name.replace("_", "-"), ",".join([str(wanted[field.name])] * times)]
    return options


def variant(name: str, steps: int, options: list[str]) -> dict:
    """measure() with short() settings, and where it ran."""
    import torch
    got = measure(name, steps, [*short(name, steps), *options])
    gpu = any(loop["peak"] for loop in got["loops"].values())
    return got | dict(device=torch.cuda.get_device_name() if gpu else "cpu", torch=torch.__version__)


@contextlib.contextmanager
def record(calls: list, stepped: list, device: str, torch):
    """Note the outermost network calls (module, arguments, gradient mode, number of the autocast region, 0 outside) and
    the optimiser steps while it is open."""
    from torch.optim.optimizer import register_optimizer_step_post_hook
    depth, regions, call, enter = [0], [0], torch.nn.Module.__call__, torch.autocast.__enter__

    def noted(self, *arguments, **options):
        if depth[0] == 0 and not isinstance(self, torch.nn.modules.loss._Loss):
            region = regions[0] if torch.is_autocast_enabled(device) else 0
            calls.append((self, arguments, options, torch.is_grad_enabled(), region))
        depth[0] += 1
        try:
            return call(self, *arguments, **options)
        finally:
            depth[0] -= 1

    def entered(self):
        regions[0] += 1
        return enter(self)
    torch.nn.Module.__call__, torch.autocast.__enter__ = noted, entered
    hook = register_optimizer_step_post_hook(lambda o, a, k: stepped.append(o))
    try:
        yield
    finally:
        torch.nn.Module.__call__, torch.autocast.__enter__ = call, enter
        hook.remove()


def cut(calls, torch):
    """The calls with inputs cut from their graphs; inputs that carried gradient still ask for it."""
    def leaf(x):
        return x.detach().clone().requires_grad_(x.requires_grad) if torch.is_tensor(x) else x
    return [(m, tuple(map(leaf, a)), {k: leaf(v) for k, v in o.items()}, *how) for m, a, o, *how in calls]


def replay(tape, device: str, torch) -> None:
    """The bare calls of the recorded steps."""
    for calls, optimizers in tape:
        total = []
        for region, inside in itertools.groupby(calls, lambda c: c[-1]):
            with torch.autocast(device, torch.bfloat16) if region else contextlib.nullcontext():
                for module, arguments, options, gradient, _ in inside:
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


def child(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run Python code in a process of its own; SystemExit with the end of its messages if it fails."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                          env={**os.environ, **environment})
    if done.returncode:
        raise SystemExit(done.stderr[-3000:] or f"exit code {done.returncode}")
    return done


def call(expression: str) -> tuple[dict, str]:
    """The dictionary that a function of this file returns in a process of its own, and the last line of its messages."""
    done = child(CHILD.format(root=str(ROOT), tests=str(ROOT / "tests"), call=expression))
    return json.loads(done.stdout.splitlines()[-1]), (done.stderr.strip().splitlines() or [""])[-1]


def whole_run(name: str, cache: str, out: str) -> tuple[float, float]:
    """Seconds and peak memory in MB of a default run."""
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, str(ROOT / "methods" / f"{name}.py"), "--out", out],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "DISTILL_CACHE": cache})
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{name} failed")
    return time.monotonic() - began, usage.ru_maxrss / 1024


def at_scale(names: list[str], steps: int, variants: list[str], options: list[str], path: str | None) -> int:
    """A row for every script, loop and variant; returns the exit code, 1 if a script ended early."""
    made, failed = dict(steps=steps, options=options, rows=[]), 0
    print(f"{'method':<20}{'loop':<34}{'variant':<14}{'ms a step':>10}{'samples/s':>11}{'bare/real':>11}{'peak MB':>9}"
          f"{'compiled':>10}")
    for name, kind in itertools.product(names, variants):
        try:
            got, last = call(f"variant({name!r}, {steps}, {[*VARIANTS[kind], *options]!r})")
        except SystemExit as stopped:       # the process died
            got, last = dict(loops={}, code=1), stopped.code
        made |= {k: got[k] for k in ("device", "torch") if k in got}
        for arm, loop in got["loops"].items():
            row = dict(method=name, loop=arm, variant=kind, ms=1000 * loop["real"],
                       samples_per_second=loop["batch"] and loop["batch"] / loop["real"],
                       bare_over_real=loop["bare"] and loop["bare"] / loop["real"],
                       peak_mb=loop["peak"] and loop["peak"] / 2**20, networks=loop["networks"], compiled=loop["compiled"])
            made["rows"].append(row)
            cells = [f"{row[key]:{form}}" if row[key] is not None else "" for key, form in
                     (("samples_per_second", ".0f"), ("bare_over_real", ".2f"), ("peak_mb", ".0f"))]
            reached = f"{loop['compiled']} of {loop['networks']}" if "compile" in kind else ""
            print(f"{name:<20}{arm:<34.33}{kind:<14}{row['ms']:>10.1f}{cells[0]:>11}{cells[1]:>11}{cells[2]:>9}{reached:>10}",
                  flush=True)
        if got["code"]:
            failed = 1
            print(f"{name}, {kind}: ended early, loops may be missing ({last})", file=sys.stderr, flush=True)
        if path:
            Path(path).write_text(json.dumps(made, indent=1) + "\n")
    print(f"{made.get('device', '')}, torch {made.get('torch', '')}, {steps} steps a loop, {' '.join(options)}")
    return failed


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="methods (default: all; with --data those with settings for it)")
    parser.add_argument("--steps", type=int, help="steps timed in each loop (default: 100, with --data 200)")
    parser.add_argument("--fast", action="store_true", help="leave out the default runs")
    parser.add_argument("--data", help="measure the settings for these data: FILE.npz, or cifar10 (downloads)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="with --data (default: auto)")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), help="with --data (default: on a GPU all, else fp32)")
    parser.add_argument("--json", metavar="FILE", help="with --data: write the rows there, with device and torch's version")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, own = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1:]
    if not args.data and (args.variants or args.json or own or args.device != "auto"):
        parser.error("--device, --variants, --json and options after -- go with --data")
    if args.data:
        import torch
        sys.path.insert(0, str(ROOT))
        import ledger
        gpu = args.device != "cpu" and torch.cuda.is_available()
        return at_scale(args.names or [n for n in ledger.methods() if ledger.has_settings(n, args.data)], args.steps or 200,
                        args.variants or (list(VARIANTS) if gpu else ["fp32"]),
                        ["--data", args.data, "--device", args.device, *own], args.json)
    names = args.names or sorted(p.stem for p in (ROOT / "methods").glob("*.py"))
    print(f"{'method':<24}{'ratio':>7}{'largest':>9}{'harness':>9}{'first step s':>14}{'cold s':>9}{'warm s':>9}{'MB':>7}")
    for name in names:
        path = ROOT / "methods" / f"{name}.py"
        with tempfile.TemporaryDirectory() as folder:
            got, last = call(f"measure({name!r}, {args.steps or 100}, [])")
            if got["code"]:
                raise SystemExit(f"{name}: {last}")
            first = child(FIRST_STEP.format(root=str(ROOT), name=name, path=str(path), out=folder, began=time.time()),
                          DISTILL_CACHE=f"{folder}/first").stdout
            loops = got["loops"]
            last = loops[([arm for arm in loops if arm not in ("teacher", "classifier")] or list(loops))[-1]]
            ratios = [loop["real"] / loop["bare"] for loop in (last, *loops.values()) if loop["bare"]]
            line = f"{name:<24}" + (f"{ratios[0]:>7.2f}{max(ratios):>9.2f}" if last["bare"] else f"{'':>16}")
            line += f"{last['harness']:>9.1%}{float(first.split()[-1]):>14.1f}"
            if not args.fast:
                (cold, memory), (warm, _) = (whole_run(name, f"{folder}/cache", folder) for _ in range(2))
                line += f"{cold:>9.1f}{warm:>9.1f}{memory:>7.0f}"
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
