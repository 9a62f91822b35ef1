"""Verdicts, hashes, the table, and running again."""
import ast
import json
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import load_method
from scipy import stats

import common
import ledger


def judge(left, right, **claim):
    arms = {"a": {"m": left}, "b": {"m": right}} if isinstance(right, list) else {"a": {"m": left}}
    other = "b" if isinstance(right, list) else right
    return ledger.judge(common.Claim(**({"left": "a", "op": "<", "right": other, "metric": "m", "says": "-"} | claim)), arms)


def test_verdicts_of_clear_cases():
    better, worse = [0.5, 0.52, 0.48, 0.51, 0.5], [1.0, 1.02, 0.97, 1.0, 1.01]
    assert judge(better, worse, margin=0.8)["verdict"] == "REPRODUCED"
    assert judge(worse, better, margin=0.8)["verdict"] == "CONTRADICTED"
    assert judge(better, worse, margin=0.5)["verdict"] == "UNDECIDED"        # on the margin
    assert judge(worse, better, op=">", margin=1.5)["verdict"] == "REPRODUCED"
    assert judge(better, worse, op=">", margin=1.5)["verdict"] == "CONTRADICTED"
    assert judge([0.5], [1.0])["verdict"] == "UNDECIDED"                      # one seed has no interval


def test_interval_is_the_one_sided_t_bound_on_paired_log_ratios():
    a, b = [1.0, 2.0, 4.0, 3.0], [2.0, 3.0, 9.0, 7.0]
    entry = judge(a, b)
    d = np.log(np.array(a) / b)
    low = d.mean() - stats.t.ppf(0.95, 3) * d.std(ddof=1) / 2
    assert entry["ratio"] == pytest.approx(math.exp(d.mean()))
    assert entry["interval"][0] == pytest.approx(math.exp(low))
    # scipy's one-sided paired test says the same as the bound
    p = stats.ttest_rel(np.log(a), np.log(b), alternative="less").pvalue
    assert (p < 0.05) == (entry["verdict"] == "REPRODUCED")


def test_differences_and_constants():
    a, b = [0.90, 0.92, 0.91], [0.85, 0.88, 0.86]
    assert judge(a, b, op=">", margin=0.02, scale="difference")["verdict"] == "REPRODUCED"
    assert judge(a, b, op=">", margin=0.2, scale="difference")["verdict"] == "CONTRADICTED"
    assert judge(a, 0.7, op=">", margin=0.0, scale="difference")["ratio"] == pytest.approx(0.21)
    assert judge([0.0, 0.0], [0.5, 0.4], margin=0.0, scale="difference")["verdict"] == "REPRODUCED"
    assert judge([0.0, 0.1], [0.5, 0.4])["verdict"] == "UNDECIDED"      # a ratio of zero says nothing


def test_identical_pairs_have_a_point_interval():
    entry = judge([0.3, 0.5], [0.6, 1.0], margin=0.8)
    assert entry["interval"] == pytest.approx([0.5, 0.5]) and entry["verdict"] == "REPRODUCED"


def test_a_metric_that_the_data_do_not_have_is_said_so():
    entry = ledger.judge(common.Claim("a", "<", "b", "coverage", "-"), {"a": {"m": [1.0]}, "b": {"m": [1.0]}})
    assert entry["verdict"] == "UNDECIDED" and "no such metric" in ledger.measured(entry)


def hashed(source):
    return ledger.canonical(ast.parse(source))


def test_the_hash_sees_code_and_not_words():
    base = 'class C:\n    """doc"""\n    a: Annotated[int, "help"] = 3\n\ndef f(x):\n    "doc"\n    return g(x, says="s")  # why\nNOTES = "n"\n'
    same = 'class C:\n    """other"""\n    a: Annotated[int, "other help"] = 3\ndef f(x):\n    return g(x, says="t")\nNOTES = "m"\n'
    assert hashed(base) == hashed(same)
    for a, b in (("= 3", "= 4"), ("return g", "return h"), ("int", "float"), ("x, says", "x + 1, says")):
        assert hashed(base) != hashed(base.replace(a, b)), (a, b)


def test_docstrings_in_the_wrong_form_are_refused():
    with pytest.raises(ValueError, match="docstring must begin"):
        ledger.describe("x", "Just words.")


def test_table_rows_come_from_results_alone():
    claim = judge([0.5, 0.52], [1.0, 1.02], margin=0.8, says="a | b")
    other = claim | dict(text="second", verdict="CONTRADICTED")
    result = dict(family="f", method="M", title="T", paper="A, arXiv:2001.00001", distils="x", claims=[claim, other],
                  seconds=3.2, data="d", notes="tried this")
    row = ledger.table({"m": result}).splitlines()[-1]
    assert row.count("|") == 11 and "a \\| b" in row and "| REPRODUCED |" in row and "](methods/m.py)" in row
    assert "[1 reproduced, 1 contradicted](results/README.md#m)" in row and "https://arxiv.org/abs/2001.00001" in row
    page = ledger.details({"m": result})
    assert '<a id="m"></a>' in page and "second" in page and "CONTRADICTED" in page and "tried this" in page
    text = ledger.readme_with(f"x{ledger.BEGIN}\nold\n{ledger.END}y", row)
    assert text.startswith("x") and text.endswith("y") and "old" not in text


def test_leaderboard_shows_samples_a_second_where_the_results_tell():
    def cells(metric, **changes):
        result = dict(method="M", arms={"teacher": metric, "arm": metric}, steps={"arm": 1000, "teacher": 50}, device="cpu",
                      torch="2", seeds=[0, 1], config={"batch": 128}) | changes
        rows = [line.split("|") for line in ledger.leaderboard({"m": result}).splitlines() if line.startswith("|")]
        assert len({len(row) for row in rows}) == 1 and rows[0][-2] == " samples/s "
        return {row[2].strip(): row[-2].strip() for row in rows[2:]}
    trained = dict(seconds=[100.0, 156.0])
    for metric in (dict(fd=[1.0, 1.0], nfe=[1, 1]), dict(acc=[0.9, 0.9])):
        assert cells(metric | trained) == {"arm": "1000", "teacher": ""}     # 1000 x 128 / the mean of 128 s
        assert cells(metric | trained, steps={"another": 7})["arm"] == ""
        assert cells(metric | trained, config={"batch_real": 5})["arm"] == ""
        assert cells(metric | dict(seconds=[0.0, 0.0]))["arm"] == "" == cells(metric)["arm"]
    old = dict(method="M", arms={"arm": dict(acc=[0.9], seconds=[1.0])}, device="cpu", torch="2", seeds=[0])
    assert ledger.leaderboard({"m": old}).endswith("| 1 |  |"), "results from before steps were recorded"


def test_results_hold_the_steps_that_each_arm_trained(tmp_path):
    found = []

    def run(cfg, log):
        for arm, steps in {"half": 2, "whole": None, "helper": 3}.items():
            for _ in common.loop(cfg, arm, steps):
                found.append(arm)
        log("half", acc=0.5)
        log("whole", acc=0.5)
        log("untrained", acc=0.5)
    run.__module__ = "kd"
    result = common.execute(run, load_method("kd").Config(steps=4, out=str(tmp_path)), [], None)
    assert result["steps"] == {"half": found.count("half"), "whole": found.count("whole")} == {"half": 2, "whole": 4}


def test_leaderboard_lists_the_generators_teacher_once_and_each_classifiers():
    def rows(metric):
        result = dict(method="M", arms={"teacher": metric, "student": metric}, device="cpu", torch="2", seeds=[0])
        lines = ledger.leaderboard({"a": result, "b": result}).splitlines()
        return sum("| teacher |" in line for line in lines), sum("| student |" in line for line in lines)
    assert rows(dict(fd=[1.0], nfe=[1])) == (1, 2) and rows(dict(acc=[0.9])) == (2, 2)


def test_a_teacher_that_some_seeds_had_in_the_cache(tmp_path):
    def run(cfg, log):
        if cfg.seed == 0:
            for _ in common.loop(cfg, "teacher"):
                pass
        log("teacher", acc=0.5)
    run.__module__ = "kd"
    for seed in (0, -1):        # trained in the first seed alone, in the second alone
        cfg = load_method("kd").Config(steps=2, seeds=2, out=str(tmp_path))
        cfg.seed = seed
        assert common.execute(run, cfg, [], None)["arms"] == {"teacher": {"acc": [0.5, 0.5]}}


def test_compare_finds_the_largest_difference_in_units_of_the_seeds_spread():
    kept = {"a": {"acc": [0.5, 0.7, 0.6], "seconds": [1.0, 1.0, 1.0]}, "b": {"sw2": [1.0, 9.0, 5.0]}}
    def fresh(acc=0.5, sw2=1.0):
        return {"a": {"acc": [acc], "seconds": [7.0]}, "b": {"sw2": [sw2]}}
    assert ledger.compare(fresh(), kept) == (True, "all 2 values identical")
    assert ledger.compare(fresh(sw2=1 + 1e-11), kept) == (True, "all 2 values identical"), "a sum in another order"
    assert ledger.compare(fresh(sw2=1 + 1e-7), kept)[1].startswith("1 of 2")
    good, said = ledger.compare(fresh(acc=0.6, sw2=2.0), kept)      # half of the spread of acc, an eighth of that of sw2
    assert good and said == "0 of 2 values identical, largest difference: acc of 'a', seed 0: 0.6, in the results 0.5"
    good, said = ledger.compare(fresh(sw2=9.5), kept)
    assert not good and said.startswith("1 of 2") and "sw2 of 'b'" in said and said.endswith("more than between seeds")
    assert not ledger.compare(fresh(acc=float("nan")), kept)[0]
    assert ledger.compare({"a": fresh()["a"]}, kept) == (False, "no sw2 of 'b'")
    constant = {"a": {"nfe": [1, 1, 1]}}
    assert ledger.compare({"a": {"nfe": [1]}}, constant)[0] and not ledger.compare({"a": {"nfe": [2]}}, constant)[0]


def test_reproduce_runs_from_an_empty_cache_and_compares(monkeypatch, tmp_path, capsys):
    """With a script that hands out the kept values, other values, or fails."""
    (tmp_path / "results").mkdir()
    kept = dict(arms={"a": {"acc": [0.5, 0.6]}}, seconds=99.0, config={"threads": 3})
    path = tmp_path / "results" / "kd.json"
    monkeypatch.setattr(ledger, "ROOT", tmp_path)
    monkeypatch.setattr(ledger, "methods", lambda: ["kd", "pld"])
    monkeypatch.setattr(ledger, "problems", lambda name, folder, seeds: "" if name == "kd" else "no results")

    def reproduce(value, *options, code=0):
        def launch(name, arguments, environment):
            folder = Path(arguments[arguments.index("--out") + 1])
            assert arguments[:4] == ["--seeds", 1, "--threads", 3] and str(folder) in environment["DISTILL_CACHE"]
            (folder / f"{name}.json").write_text(json.dumps(dict(arms={"a": {"acc": [value]}}, seconds=7.0)))
            return code, 1.0, " (why)" if code else ""
        monkeypatch.setattr(ledger, "launch", launch)
        monkeypatch.setattr("sys.argv", ["ledger.py", "reproduce", *options])
        path.write_text(json.dumps(kept))
        return ledger.main(), capsys.readouterr().out.strip(), json.loads(path.read_text())["seconds"]
    assert reproduce(0.5, "kd") == (0, "kd: all 1 values identical; 7 s a seed", 99.0)
    assert reproduce(0.5, "kd", "--record-times")[2] == 7.0
    code, said, seconds = reproduce(0.55, "kd", "--record-times")
    assert code == 0 and "0 of 1" in said and seconds == 99.0, "times are of these results only"
    assert reproduce(0.9, "kd")[0] == 1
    assert reproduce(0.5, "kd", code=3)[:2] == (1, "kd: FAILED with exit code 3 (why)")
    assert reproduce(0.5, "pld")[:2] == (1, "pld: nothing to compare with: no results")
    assert reproduce(0.5, "nope")[0] == 2


def test_report_shows_means_and_intervals():
    result = dict(arms={"a": {"m": [1.0, 2.0, 3.0]}}, seeds=[0, 1, 2], method="M", data="d", seconds=1, claims=[])
    half = stats.t.ppf(0.975, 2) * 1 / math.sqrt(3)
    assert f"2 ±{half:.3g}" in ledger.report(result)
