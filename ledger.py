"""Claims, the results files and the table in README.md; run_all.sh calls it.

    python ledger.py run [names] [--seeds N] [--jobs N] [--threads N] [--out DIR] [--data NAME] [--force]
    python ledger.py table              take over reworded claims and notes, rebuild README's table from results/*.json
    python ledger.py check              say which results are missing or stale
    python ledger.py reproduce [names] [--seeds N] [--jobs N] [--record-times]

`run` executes the scripts that are not up to date, several at a time, and rebuilds the table. `reproduce` runs scripts
again, from an empty cache and into a folder of its own, and compares every value with results/*.json: on the same versions
and kind of CPU they are identical, elsewhere rounding may lead a training astray within the spread of the seeds.
"""
import argparse
import ast
import hashlib
import importlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent


# ---------------------------------------------------------------------------------------------- judging

def quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t distribution."""
    from scipy.special import stdtrit  # a tenth of the import time of scipy.stats
    return float(stdtrit(freedom, probability))


def mean_interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % t interval (nan for one value)."""
    n = len(values)
    mean = sum(values) / n
    return mean, (quantile(0.975, n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan)


def judge(claim, arms: dict) -> dict:
    """A common.Claim against {arm: {metric: [one value a seed]}}: the entry of the results file.

    On paired values, in logarithms for scale "ratio": REPRODUCED when the one-sided 95 % t bound lies on the right side
    of the margin, CONTRADICTED when the opposite one-sided bound lies on the wrong side, else UNDECIDED, as with a
    single seed. `ratio` is the estimate (the geometric mean ratio, or the mean difference) and `interval` its two
    one-sided bounds.
    """
    entry = dict(text=claim.says, metric=claim.metric, left=claim.left, right=claim.right, op=claim.op,
                 margin=claim.margin, scale=claim.scale, ratio=None, interval=[None, None], verdict="UNDECIDED")
    left = arms.get(claim.left, {}).get(claim.metric)
    constant = isinstance(claim.right, (int, float))
    right = [claim.right] * len(left or []) if constant else arms.get(claim.right, {}).get(claim.metric)
    if left is None or right is None:       # the metric does not exist on this data
        return entry
    if claim.scale == "ratio":
        if min(left + right) <= 0:      # no logarithm; a claim that can meet this on its own data is one of differences
            return entry
        values, margin, back = [math.log(a / b) for a, b in zip(left, right)], math.log(claim.margin), math.exp
    else:
        values, margin, back = [a - b for a, b in zip(left, right)], claim.margin, float
    n, mean = len(values), sum(values) / len(values)
    entry["ratio"] = back(mean)
    if n > 1:
        half = quantile(0.95, n - 1) * statistics.stdev(values) / math.sqrt(n)
        low, high = mean - half, mean + half
        entry["interval"] = [back(low), back(high)]
        below, above = high < margin, low > margin
        if below or above:
            entry["verdict"] = "REPRODUCED" if below == (claim.op == "<") else "CONTRADICTED"
    return entry


# ---------------------------------------------------------------------------------------------- describing

HEAD = re.compile(r"^(?P<method>.+?) - (?P<title>.+)\nPaper: (?P<paper>(?s:.+?))\nCode: (?P<code>(?s:.+?))\n"
                  r"Family: (?P<family>.+?)\. Distils: (?P<distils>(?s:.+?))\.\n\n")


def describe(name: str, docstring: str) -> dict:
    """method, title, paper, code, family and distils from the first lines of a script's docstring."""
    found = HEAD.match(docstring)
    if not found:
        raise ValueError(f"methods/{name}.py: the docstring must begin 'NAME - Title', 'Paper: ...', 'Code: ...', "
                         "'Family: .... Distils: ....' and an empty line")
    return {"name": name} | {k: " ".join(v.split()) for k, v in found.groupdict().items()}


def canonical(node, drop: tuple[str, ...] = ()) -> str:
    """A syntax tree as text that is the same on every Python: without docstrings, help texts, claims' wording, pictures
    drawn during training and the presets named in drop."""
    if isinstance(node, list):
        return "[" + ",".join(canonical(n, drop) for n in node) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    if isinstance(node, (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        body = fields["body"]
        if body and isinstance(body[0], ast.Expr) and isinstance(getattr(body[0].value, "value", None), str):
            fields["body"] = body[1:]
    if isinstance(node, ast.Subscript) and getattr(node.value, "id", "") == "Annotated":
        return canonical(node.slice.elts[0], drop)
    if isinstance(node, ast.Call):
        fields["keywords"] = [k for k in node.keywords if k.arg not in ("says", "preview")]
    if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "PRESETS" and isinstance(node.value, ast.Dict):
        pairs = [(k, v) for k, v in zip(node.value.keys, node.value.values) if getattr(k, "value", None) not in drop]
        fields["value"] = ast.Dict([k for k, _ in pairs], [v for _, v in pairs])
    if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "NOTES":
        return ""
    return type(node).__name__ + "(" + ",".join(f"{k}={canonical(v, drop)}" for k, v in fields.items()
                                                if v not in (None, [])) + ")"


def fingerprint(script: Path, data: str = "") -> str:
    """Hash of what can move a script's numbers on this data: its code, its toy data and common.LEDGER. The presets for
    smoke runs do not count, and those for CIFAR only on 32x32 images."""
    import common
    tree = ast.parse(script.read_text())
    drop = ("smoke",) if "cifar" in common.data_kinds(data) else ("smoke", "cifar", "cifar10", "cifar100")
    parts = [str(common.LEDGER).encode(), canonical(tree, drop).encode()]
    words = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    for path in sorted([*(ROOT / "toy_data").glob("*.npz"), *(ROOT / "toy_data").glob("*.txt")]):
        if path.stem in words:
            parts.append(path.read_bytes())
    for path in sorted((ROOT / "toy_data").glob("*.py")):       # domains that are generated on the fly
        if path.stem in words:
            parts.append(canonical(ast.parse(path.read_text())).encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def number(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def measured(claim: dict) -> str:
    """'0.41 [0.38, 0.44], claimed < 0.8' for one judged claim."""
    if claim["ratio"] is None:
        return "no such metric on this data, or a ratio with 0"
    shown = number(claim["ratio"])
    if claim["interval"][0] is not None:
        shown += f" [{number(claim['interval'][0])}, {number(claim['interval'][1])}]"
    return f"{shown}, claimed {claim['op']} {number(claim['margin'])}"


def sentence(claim: dict) -> str:
    """'sw2(dmd) / sw2(regression only)' for one judged claim."""
    right = number(claim["right"]) if isinstance(claim["right"], (int, float)) else claim["right"]
    return f"{claim['metric']}({claim['left']}) {'/' if claim['scale'] == 'ratio' else '-'} {claim['metric']}({right})"


def report(result: dict) -> str:
    """The table of arms and the verdicts as text for the terminal."""
    metrics = list(dict.fromkeys(m for arm in result["arms"].values() for m in arm))
    rows = [["arm", *metrics]]
    for arm, values in result["arms"].items():
        row = [arm]
        for metric in metrics:
            mean, half = mean_interval(values[metric]) if metric in values else (math.nan, math.nan)
            row.append("" if math.isnan(mean) else number(mean) + (f" ±{number(half)}" if not math.isnan(half) else ""))
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
             for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    n = len(result["seeds"])
    lines += ["", f"{result['method']} on {result['data']}, {n} seed{'s' if n > 1 else ''}"
              + (" (mean ± 95 % interval)" if n > 1 else "") + f", {result['seconds']:.0f} s a seed"]
    for claim in result["claims"]:
        verdict = claim["verdict"]
        if n == 1 and claim["ratio"] is not None:
            holds = claim["ratio"] < claim["margin"] if claim["op"] == "<" else claim["ratio"] > claim["margin"]
            verdict = f"{'holds' if holds else 'does not hold'} on this seed (a verdict needs --seeds 2 or more)"
        lines += [f"claim: {claim['text']}", f"   {sentence(claim)} = {measured(claim)}: {verdict}"]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- the table

def methods() -> list[str]:
    """Names of all scripts in methods/."""
    return sorted(p.stem for p in (ROOT / "methods").glob("*.py") if not p.stem.startswith("_"))


def read_results(folder: Path) -> dict[str, dict]:
    """{name: results} of a folder."""
    return {p.stem: json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))}


def cell(text: str) -> str:
    """Text that cannot break a Markdown table."""
    return text.replace("|", "\\|")


def table(results: dict[str, dict]) -> str:
    """README's table, from results files alone: a row a method with its first claim and the count of all verdicts."""
    lines = ["| family | method | paper | what is distilled | central claim | measured | verdict | all claims | s |",
             "|---|---|---|---|---|---|---|---|---|"]
    for name, r in by_family(results):
        first, verdicts = r["claims"][0], [c["verdict"] for c in r["claims"]]
        counts = [f"{verdicts.count(v)} {v.lower()}" for v in ("REPRODUCED", "UNDECIDED", "CONTRADICTED") if v in verdicts]
        lines.append("| " + " | ".join([
            cell(r["family"]), f"[{cell(r['method'])}](methods/{name}.py)", link(cell(r["paper"])), cell(r["distils"]),
            cell(first["text"]), f"{cell(sentence(first))} = {measured(first)}", first["verdict"],
            f"[{', '.join(counts)}](results/README.md#{name})", f"{r['seconds']:.0f}"]) + " |")
    return "\n".join(lines)


def details(results: dict[str, dict]) -> str:
    """results/README.md: all claims of every method with what was measured, and its notes."""
    lines = ["# All claims", "", "Made by `run_all.sh` from the files in this folder, which hold every value of every seed.", ""]
    for name, r in by_family(results):
        lines += [f'<a id="{name}"></a>', f"## {r['method']}", "",
                  f"{r['title']}. {link(r['paper'])}. [methods/{name}.py](../methods/{name}.py), on `{r['data']}`.", "",
                  "| claim | measured | verdict |", "|---|---|---|"]
        lines += [f"| {cell(c['text'])} | {cell(sentence(c))} = {measured(c)} | {c['verdict']} |" for c in r["claims"]]
        lines += ["", *([r["notes"].strip(), ""] if r["notes"] else [])]
    return "\n".join(lines)


def by_family(results: dict[str, dict]) -> list[tuple[str, dict]]:
    """(name, results) sorted by family and name."""
    return sorted(results.items(), key=lambda item: (item[1]["family"], item[0]))


def samples_per_second(result: dict, arm: str, seconds: float | None) -> str:
    """Training samples a second of an arm, the steps of its loop x --batch / its training seconds; '' where the results do
    not tell: no loop of the arm's name, no option --batch, or a teacher, whose batch is another."""
    steps, batch = result.get("steps", {}).get(arm), result.get("config", {}).get("batch")
    return number(steps * batch / seconds) if steps and batch and seconds and not arm.startswith("teacher") else ""


def leaderboard(results: dict[str, dict]) -> str:
    """All arms of results on one data set, ranked: generators by network calls and Frechet distance (with the same
    teacher, data, network, batch and steps), classifiers by accuracy. The generators' floor and teacher are listed once."""
    samples, labels, seen = [], [], set()
    for name, r in sorted(results.items()):
        for arm, values in r["arms"].items():
            mean = {metric: mean_interval(v)[0] for metric, v in values.items()}
            where = f"| [{cell(r['method'])}](../../methods/{name}.py) | {cell(arm)} |"
            speed = samples_per_second(r, arm, mean.get("seconds"))
            if re.match("data|teacher", arm):
                key = arm if "nfe" in mean else (name, arm)     # the generators share one teacher, classifiers do not
                if key in seen:
                    continue
                seen.add(key)
            if "fd" in mean and "nfe" in mean:
                shown = [number(mean[m]) if m in mean else "" for m in ("nfe", "fd", "precision", "recall", "seconds")]
                samples.append((mean["nfe"], mean["fd"], f"{where} {' | '.join([*shown, speed])} |"))
            elif "acc" in mean:
                shown = [number(mean[m]) if m in mean else "" for m in ("acc", "nll", "seconds")]
                labels.append((name, -mean["acc"], f"{where} {' | '.join([*shown, speed])} |"))
    made = sorted({f"{r['device']}, torch {r['torch']}, seeds {r['seeds']}" for r in results.values()})
    lines = [f"Made on {'; '.join(made)}.", "fd: Frechet distance in the features of a classifier trained on the same data (not FID).",
             "samples/s: steps of an arm's loop x batch / its training seconds.", ""]
    if samples:
        lines += ["| method | arm | network calls | fd | precision | recall | training s | samples/s |",
                  "|---|---|---|---|---|---|---|---|"]
        lines += [row for *_, row in sorted(samples)] + [""]
    if labels:
        lines += ["| method | arm | accuracy | nll | training s | samples/s |", "|---|---|---|---|---|---|"]
        lines += [row for *_, row in sorted(labels)] + [""]
    return "\n".join(lines).rstrip()


def link(paper: str) -> str:
    """arXiv ids as links."""
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)


BEGIN, END = "<!-- table: made by run_all.sh -->", "<!-- end of table -->"
BEGIN_CIFAR, END_CIFAR = "<!-- leaderboard: made by run_all.sh --data cifar10 -->", "<!-- end of leaderboard -->"


def readme_with(text: str, rows: str, begin: str = BEGIN, end: str = END) -> str:
    """README's text with these rows between the two markers."""
    before, rest = text.split(begin)
    return f"{before}{begin}\n{rows}\n{end}{rest.split(end)[1]}"


def write_leaderboard(folder: Path) -> None:
    """FOLDER/README.md from the results files in it; that of CIFAR-10 into README.md too."""
    rows = leaderboard(read_results(folder))
    (folder / "README.md").write_text(f"# {folder.name}\n\n{rows}\n")
    path = ROOT / "README.md"
    if folder.resolve() == ROOT / "results" / "cifar10":
        path.write_text(readme_with(path.read_text(), rows.replace("../../methods", "methods"), BEGIN_CIFAR, END_CIFAR))


def refresh(name: str) -> None:
    """Bring the words of an up-to-date results file (title, paper, notes, claims' texts) to those of the script."""
    path = ROOT / "results" / f"{name}.json"
    if problems(name, path.parent):
        return
    sys.path.insert(0, str(ROOT / "methods"))
    module, result = importlib.import_module(name), json.loads(path.read_text())
    result |= describe(name, module.__doc__) | {"notes": getattr(module, "NOTES", "")}
    for claim, entry in zip(module.CLAIMS, result["claims"], strict=True):
        entry["text"] = claim.says
    path.write_text(json.dumps(result, indent=1) + "\n")


def write_table() -> None:
    """Rebuild README's table and results/README.md from results/*.json, after their words were brought up to date."""
    for name in methods():
        refresh(name)
    path = ROOT / "README.md"
    results = read_results(ROOT / "results")
    path.write_text(readme_with(path.read_text(), table(results)))
    (ROOT / "results" / "README.md").write_text(details(results))


def problems(name: str, folder: Path, seeds: int = 1, config: dict | None = None) -> str:
    """Why a results file cannot be relied on, or '' when it is up to date with at least these seeds."""
    path = folder / f"{name}.json"
    if not path.exists():
        return "no results"
    try:
        result = json.loads(path.read_text())
    except ValueError:
        return "results are not JSON"
    if result["hash"] != fingerprint(ROOT / "methods" / f"{name}.py", result["data"]):
        return "results are stale: the script, its data or common.LEDGER changed since"
    if result["seeds"][:seeds] != list(range(seeds)):
        return f"results hold seeds {result['seeds']}, asked for 0..{seeds - 1}"
    for key, value in (config or {}).items():
        if result["config"].get(key) != value:
            return f"results were made with {key} = {result['config'].get(key)}"
    return ""


# ---------------------------------------------------------------------------------------------- running all

def positive(word: str) -> int:
    """argparse type: an integer >= 1."""
    if not word.isdigit() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not an integer >= 1")
    return int(word)


def has_settings(name: str, data: str | None) -> bool:
    """Whether a script has settings of its own for a data set: asked for on 32x32 images only, where they are needed."""
    import common
    if not data or "cifar" not in common.data_kinds(data):
        return True
    return '"cifar": dict(' in (ROOT / "methods" / f"{name}.py").read_text()


def launch(name: str, options: list, environment: dict | None = None) -> tuple[int, float, str]:
    """Run one script with its output in runs/<name>.log; returns exit code, seconds and, after a failure, the log's end."""
    (ROOT / "runs").mkdir(exist_ok=True)
    began, log = time.monotonic(), ROOT / "runs" / f"{name}.log"
    with open(log, "w") as file:
        code = subprocess.run([sys.executable, str(ROOT / "methods" / f"{name}.py"), *map(str, options)], stdout=file, check=False,
                              stderr=subprocess.STDOUT, cwd=ROOT, env=os.environ | (environment or {})).returncode
    last = log.read_text(errors="replace").strip().splitlines()[-1:] if code else []
    return code, time.monotonic() - began, f" ({' '.join(last)}; see {log.relative_to(ROOT)})" if code else ""


def run(args) -> int:
    """Run the scripts whose results are not up to date; returns the exit code."""
    names = args.names or [n for n in methods() if has_settings(n, args.data)]
    home = ROOT / "results"
    folder = Path(args.out) if args.out else home / args.data if args.data else home
    folder.mkdir(parents=True, exist_ok=True)
    todo = [n for n in names if args.force or problems(n, folder, args.seeds, {"data": args.data} if args.data else None)]
    if not args.force:
        for name in sorted(set(names) - set(todo)):
            print(f"{name}: up to date")

    def one(name):
        code, seconds, why = launch(name, ["--seeds", args.seeds, "--threads", args.threads, "--out", folder,
                                           *(["--data", args.data] if args.data else [])])
        print(f"{name}: {f'FAILED with exit code {code}' if code else 'done'} in {seconds:.0f} s{why}", flush=True)
        return code

    with ThreadPoolExecutor(args.jobs) as pool:
        failed = [name for name, code in zip(todo, pool.map(one, todo)) if code]
    if folder.resolve() == home.resolve():
        write_table()
    elif args.data and read_results(folder):
        write_leaderboard(folder)
    if failed:
        print(f"FAILED: {', '.join(failed)}", file=sys.stderr)
        return 1
    return 0


def compare(fresh: dict, kept: dict) -> tuple[bool, str]:
    """Whether all values of fresh arms are as in the kept ones or differ by less than those do between seeds, and a sentence
    on it. {arm: {metric: [one value a seed]}}; training seconds are left out; nine digits are compared."""
    count = equal = 0
    worst, sentence = -1.0, ""
    for arm, metrics in kept.items():
        for metric, values in metrics.items():
            if metric == "seconds":
                continue
            found = fresh.get(arm, {}).get(metric)
            if found is None:
                return False, f"no {metric} of {arm!r}"
            for seed, (new, old) in enumerate(zip(found, values)):
                same = math.isclose(new, old, abs_tol=1e-12)
                count, equal = count + 1, equal + same
                spread = max(values) - min(values) + 1e-6 * abs(old)
                # a nan on one side alone is as far away as can be
                far = 0.0 if same else abs(new - old) / spread if spread and math.isfinite(new - old) else math.inf
                if far > worst:
                    worst = far
                    sentence = f"largest difference: {metric} of {arm!r}, seed {seed}: {new:.6g}, in the results {old:.6g}"
    if equal == count:
        return True, f"all {count} values identical"
    return worst <= 1, f"{equal} of {count} values identical, {sentence}" + ("" if worst <= 1 else ", more than between seeds")


def reproduce(args) -> int:
    """Run scripts again and compare with results/*.json; exit code 1 when one fails or differs by more than its seeds do."""
    names = args.names or methods()
    stale = {n: why for n in names if (why := problems(n, ROOT / "results", args.seeds))}
    for name, why in stale.items():
        print(f"{name}: nothing to compare with: {why}")

    def one(name):
        path = ROOT / "results" / f"{name}.json"
        kept = json.loads(path.read_text())
        with tempfile.TemporaryDirectory() as folder:
            code, _, why = launch(name, ["--seeds", args.seeds, "--threads", kept["config"]["threads"], "--out", folder],
                                  {"DISTILL_CACHE": str(Path(folder) / "cache")})
            if code:
                print(f"{name}: FAILED with exit code {code}{why}", flush=True)
                return False
            fresh = json.loads((Path(folder) / f"{name}.json").read_text())
        good, sentence = compare(fresh["arms"], kept["arms"])
        print(f"{name}: {sentence}; {fresh['seconds']:.0f} s a seed", flush=True)
        if args.record_times and sentence.startswith("all"):
            path.write_text(json.dumps(kept | {"seconds": fresh["seconds"]}, indent=1) + "\n")
        return good

    with ThreadPoolExecutor(args.jobs) as pool:
        good = list(pool.map(one, [n for n in names if n not in stale]))
    return int(bool(stale) or not all(good))


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="run methods that are not up to date and rebuild README's table")
    one.add_argument("names", nargs="*", help="methods (default: all)")
    one.add_argument("--seeds", type=positive, default=5, help="seeds 0..N-1 (default: 5)")
    one.add_argument("--jobs", type=positive, default=1, help="scripts at a time (default: 1)")
    one.add_argument("--threads", type=positive, default=max(1, (os.cpu_count() or 1)), help="CPU threads a script")
    one.add_argument("--out", help="folder for the results (default: results, or results/DATA with --data)")
    one.add_argument("--data", help="run on this data set instead of each script's own")
    one.add_argument("--force", action="store_true", help="run what is up to date too")
    two = commands.add_parser("reproduce", help="run methods again and compare every value with results/*.json")
    two.add_argument("names", nargs="*", help="methods (default: all)")
    two.add_argument("--seeds", type=positive, default=1, help="seeds 0..N-1 (default: 1)")
    two.add_argument("--jobs", type=positive, default=1, help="scripts at a time (default: 1)")
    two.add_argument("--record-times", action="store_true", help="where all is identical, take over the seconds a seed")
    commands.add_parser("table", help="rebuild README's table")
    commands.add_parser("check", help="list missing and stale results")
    args = parser.parse_args()
    if args.command in ("run", "reproduce"):
        unknown = [n for n in args.names if n not in methods()]
        if unknown:
            print(f"error: no method {', '.join(unknown)} (possible: {', '.join(methods())})", file=sys.stderr)
            return 2
        return run(args) if args.command == "run" else reproduce(args)
    if args.command == "table":
        write_table()
        return 0
    found = {name: problems(name, ROOT / "results") for name in methods()}
    for name, problem in found.items():
        if problem:
            print(f"{name}: {problem}")
    return int(any(found.values()))


if __name__ == "__main__":
    raise SystemExit(main())
