"""Every script in methods/ follows the anatomy; results/, README and scripts agree. Found by glob."""
import ast
import dataclasses
import json
import re
import sys
import typing

import pytest
from conftest import ROOT, load_method, script

import common
import ledger

METHODS = ledger.methods()
ALLOWED = {"torch", "numpy", "scipy", "torchvision", "PIL", "tqdm", "common"} | set(sys.stdlib_module_names)
README = (ROOT / "README.md").read_text()


@pytest.fixture(params=METHODS)
def name(request):
    return request.param


def tree(name):
    return ast.parse((ROOT / "methods" / f"{name}.py").read_text())


def test_imports_are_the_allowed_ones(name):
    for node in ast.walk(tree(name)):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else \
            [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for module in modules:
            assert module.split(".")[0] in ALLOWED, f"{name} imports {module}"


def test_docstring_names_paper_code_and_commands(name):
    doc = ast.get_docstring(tree(name), clean=False)
    found = ledger.describe(name, doc)
    assert re.search(r"arXiv:\d{4}\.\d{4,5}|doi:|https?://", found["paper"]), "the paper's arXiv id"
    assert f"python methods/{name}.py" in doc, "the run command"
    assert re.search(r"\d+ s", doc), "the expected time"


def test_config_explains_every_option(name):
    config = load_method(name).Config
    assert issubclass(config, common.Config)
    for field, hint in typing.get_type_hints(config, include_extras=True).items():
        if field in {f.name for f in dataclasses.fields(config)}:
            assert typing.get_origin(hint) is typing.Annotated and isinstance(typing.get_args(hint)[1], str), field
    for preset in config.PRESETS.values():
        assert set(preset) <= {f.name for f in dataclasses.fields(config)}, "a preset names an unknown option"


def test_functions_above_the_loops_are_described_and_pure(name):
    """Module-level functions that take no cfg are the part that people copy: each has a docstring."""
    for node in tree(name).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in ("run", "Config"):
            arguments = [a.arg for a in node.args.args] if isinstance(node, ast.FunctionDef) else ["cfg"]
            if "cfg" not in arguments:
                assert ast.get_docstring(node), f"{name}.{node.name} has no docstring"


def test_length_and_leftovers(name):
    source = (ROOT / "methods" / f"{name}.py").read_text()
    assert source.count("\n") <= 320
    assert not re.search(r"TODO|FIXME|XXX|NotImplementedError", source)
    assert "np.random" not in source and "import random" not in source, "randomness comes from torch's stream alone"


def test_claims_are_claims_and_their_arms_exist(name):
    module = load_method(name)
    result = json.loads((ROOT / "results" / f"{name}.json").read_text())
    assert module.CLAIMS
    for claim in module.CLAIMS:
        assert isinstance(claim, common.Claim) and claim.op in "<>" and claim.says
        assert claim.metric in result["arms"][claim.left]
        assert not isinstance(claim.right, str) or claim.metric in result["arms"][claim.right]


def test_results_are_up_to_date_and_judged_right(name):
    assert not ledger.problems(name, ROOT / "results", seeds=5)
    result = json.loads((ROOT / "results" / f"{name}.json").read_text())
    module = load_method(name)
    assert result["claims"] == [json.loads(json.dumps(ledger.judge(c, result["arms"]))) for c in module.CLAIMS]
    assert {k: result[k] for k in ("method", "title", "paper")}.items() <= ledger.describe(name, module.__doc__).items()
    assert result["seeds"] == [0, 1, 2, 3, 4]
    assert all(len(values) == 5 for arm in result["arms"].values() for values in arm.values())


def test_results_keep_the_promised_shape(name):
    result = json.loads((ROOT / "results" / f"{name}.json").read_text())
    assert {"method", "paper", "data", "seeds", "arms", "claims", "notes", "config", "seconds", "device", "torch",
            "hash"} <= set(result)
    for claim in result["claims"]:
        assert {"text", "metric", "left", "right", "margin", "ratio", "interval", "verdict"} <= set(claim)
        assert claim["verdict"] in ("REPRODUCED", "UNDECIDED", "CONTRADICTED")


def test_smoke_run(name, tmp_path):
    done = script(name, "--smoke", "--threads", "1", "--out", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / f"{name}.png").stat().st_size > 1000
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert len(result["claims"]) == len(load_method(name).CLAIMS)
    assert "claim: " in done.stdout and str(tmp_path / f"{name}.png") in done.stdout
    committed = json.loads((ROOT / "results" / f"{name}.json").read_text())
    numberless = [{re.sub(r"[\d.]+", "N", arm) for arm in r["arms"]} for r in (result, committed)]
    assert numberless[0] == numberless[1], "the arms of the ledger are not those of the script"


def test_readme_table_is_made_from_the_results():
    results = ledger.read_results(ROOT / "results")
    assert README == ledger.readme_with(README, ledger.table(results))
    assert (ROOT / "results" / "README.md").read_text() == ledger.details(results)


def test_every_script_has_results_and_a_row_and_the_converse():
    assert {p.stem for p in (ROOT / "results").glob("*.json")} == set(METHODS)
    for name in METHODS:
        assert f"](methods/{name}.py)" in README


def test_nothing_names_a_machine_path_or_a_registry():
    for path in [*ROOT.glob("*.*"), *ROOT.glob("methods/*.py"), *ROOT.glob("results/*.json"), *ROOT.glob("toy_data/*.py")]:
        if path.suffix in (".py", ".md", ".json", ".txt", ".toml", ".sh"):
            assert not re.search(r"/work/|/root/|\.\./shared|/home/\w", path.read_text()), path


def test_common_stays_small():
    assert (ROOT / "common.py").read_text().count("\n") <= 1000
