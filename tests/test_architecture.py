"""Who may import whom: read off the sources by import-linter, and checked once by importing."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_import_contracts() -> None:
    lint = "from importlinter.cli import lint_imports_command as lint; lint(['--no-cache'])"
    done = subprocess.run(
        [sys.executable, "-c", lint], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("shike_core.config shike_core.recipes", "torch pandas pyarrow kfp mlflow"),
        ("shike_core.stages", "torch torchvision kfp mlflow"),
        ("shike_core.data.sources shike_core.data.manifest", "torch torchvision kfp mlflow"),
        ("shike_core.train shike_core.evaluate", "kfp mlflow"),
    ],
)
def test_importing_does_not_bring_in(modules: str, absent: str) -> None:
    program = f"""
import importlib, sys
for module in {modules.split()}:
    importlib.import_module(module)
print(*sorted(set({absent.split()}) & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_benchmarks_for_a_gpu_need_nothing_but_torch_and_tables() -> None:
    """As on a bare machine: PyTorch with what it requires, pandas and pyarrow."""
    absent = "tqdm matplotlib scipy sklearn tyro psutil kfp mlflow pooch kubeflow"
    program = f"""
import sys
import torch, torchvision, pandas  # which look for some of them themselves
for name in {absent.split()}:
    sys.modules[name] = None
from benchmarks import compare_recipes, gpu_engine, gpu_headline, heads, reproduce
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
