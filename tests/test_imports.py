"""Imports run one way, and each layer works without the ones above it."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RANK = {"kernels": 0, "models": 1, "service": 2}
SCRIPTS = sorted((ROOT / "tests").glob("b*/*.py"))  # pytest collects neither bench nor browser
SOURCES = [path for top in RANK for path in sorted((ROOT / top).rglob("*.py"))]
# Pure Python by design: a scheduler can be read and tested without a tensor.
TORCH_FREE = ["sequence", "pages", "prefix", "scheduler", "types", "stream"]


def imported(path):
    """Top-level names that a file imports, type-checking blocks included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_from_service_to_models_to_kernels(path):
    own = RANK[path.relative_to(ROOT).parts[0]]
    above = {name for name in imported(path) if RANK.get(name, own) > own}
    assert not above
    assert "transformers" not in set(imported(path))


def test_no_top_folder_is_a_regular_package():
    assert not [top for top in RANK if (ROOT / top / "__init__.py").exists()]


def run(code, *blocked):
    """Run code in a fresh interpreter in which importing a blocked package fails."""
    guard = f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", guard + code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_kernels_run_without_the_rest():
    run(
        """
import torch
from kernels.cache import LayerCache, Rows
from kernels.dynamic import attend
from kernels.policy import Dynamic
cache = LayerCache.allocate(4, 2, 16, torch.float32, "cpu")
slots = torch.arange(200)
cache.write(slots, torch.randn(200, 2, 16), torch.randn(200, 2, 16))
cache.code(torch.arange(3))
rows = Rows(torch.arange(4)[None], torch.tensor([200]), torch.tensor([0]))
query = torch.randn(1, 4, 16)
found = attend(query, cache, rows, Dynamic(max_keys=150, min_keys=0), 0.25)
assert found.output.shape == (1, 4, 16) and (found.coverage > 0).all()
import kernels.patterns.pattern, kernels.reference
""",
        *("models", "service", "ray", "fastapi", "pydantic", "tokenizers", "transformers"),
    )


def test_the_models_run_without_the_service():
    run("import models.decoder, models.loader, models.tokenizer", "service", "ray", "fastapi")


def test_the_commands_load_without_triton():
    run("import models.graph, service.commands.app", "triton")


def test_the_engine_and_the_application_run_without_ray():
    run("import service.engine.build, service.api.app", "ray")


@pytest.mark.parametrize("name", TORCH_FREE)
def test_the_scheduler_needs_no_torch(name):
    run(f"import service.engine.{name}", "torch")


def test_the_training_tasks_need_no_torch():
    run("import models.training.tasks, models.training.filler", "torch")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_script_takes_from_others_exists(path):
    importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
