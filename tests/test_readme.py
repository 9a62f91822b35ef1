"""README does what it says: its commands, its example, its links."""
import re
import subprocess
import sys

from conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_the_example_runs_and_trains():
    code = re.search(r"```python\n(.+?)```", README, re.DOTALL)[1]
    check = "assert not torch.equal(generator.weight, teacher.weight) and not torch.equal(fake.weight, teacher.weight)\n"
    check += "print('trained')"
    done = subprocess.run([sys.executable, "-c", code + check], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "trained" in done.stdout, done.stderr


def test_commands_name_files_and_options_that_exist():
    for path in re.findall(r"(?:python |\./)((?:methods/|tests/)?\w+\.(?:py|sh))", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\(((?!http|#)[^)]+)\)", README):
        path, _, anchor = path.partition("#")
        assert (ROOT / path).exists(), path
        assert not anchor or f'<a id="{anchor}"></a>' in (ROOT / path).read_text(), anchor
    shown = subprocess.run([sys.executable, "methods/dmd.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for option in set(re.findall(r"methods/dmd\.py.*?(--[a-z-]+)", README)) - {"--help"}:
        assert option in shown.stdout


def test_the_test_command_is_what_ci_calls():
    assert re.search(r"^    python -m pytest", README, re.MULTILINE)
    assert "python -m pytest" in (ROOT / ".ci" / "run").read_text()


def test_data_sets_of_the_readme_are_those_of_the_code():
    import common
    names = set(common.data_names()) - {"cifar10", "cifar100"}
    assert all(f"`{name}`" in README for name in names)
