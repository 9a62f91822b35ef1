"""Shared by all tests: the project on the import path, scripts as modules, one thread, a cache of their own."""
import contextlib
import importlib.util
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)


def load_method(name: str):
    """methods/<name>.py as a module, under its own name."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "methods" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Teachers made by the tests go into a temporary folder, not into the project's cache."""
    os.environ["DISTILL_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def inline(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """The same as script() without the start of a new Python: for runs that end early."""
    import common
    module, out, err, code = load_method(name), io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        for key, value in environment.items():
            patch.setenv(key, value)
        try:
            common.main(module.run, module.Config, module.CLAIMS, [str(a) for a in arguments])
        except SystemExit as stopped:
            code = stopped.code
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run methods/<name>.py in a process of its own."""
    command = [sys.executable, str(ROOT / "methods" / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False,
                          stdin=subprocess.DEVNULL, timeout=300)
