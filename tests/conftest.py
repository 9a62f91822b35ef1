"""Shared by all tests: the project on the import path, scripts as modules, one thread, a cache of their own."""
import importlib.util
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


def script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run methods/<name>.py in a process of its own."""
    command = [sys.executable, str(ROOT / "methods" / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False,
                          stdin=subprocess.DEVNULL, timeout=300)
