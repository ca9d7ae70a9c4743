"""The recipes for other load generators: scripts parse, and what they name is there."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import yaml

from service.config import BUNDLED_CHECKPOINT
from tests.deploy.monitoring import ROOT

FOLDER = ROOT / "deploy" / "loadtest"


@pytest.mark.parametrize("script", sorted(FOLDER.glob("*.sh")), ids=lambda file: file.name)
def test_a_recipe_parses_and_takes_its_arguments(script, tmp_path):
    """Run with a stand-in for the program that prints what it is given."""
    name = {"lm-eval": "lm_eval"}.get(script.stem, script.stem)
    stand_in = tmp_path / name
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for arguments, model in (
        ([], "saccade-12m"),
        (["http://h:1", str(BUNDLED_CHECKPOINT), "m"], "m"),
    ):
        done = subprocess.run(
            [script, *arguments], env=environment, capture_output=True, text=True, check=True
        )
        assert (arguments[0] if arguments else "http://127.0.0.1:8000") in done.stdout
        assert model in done.stdout
    done = subprocess.run(
        [script, "http://h:1", str(BUNDLED_CHECKPOINT), "m", "--more", "x"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.endswith("--more\nx\n")


def test_lm_evals_task_reads_a_file_that_is_there():
    task = yaml.safe_load((FOLDER / "lm_eval_task" / "saccade_endings.yaml").read_text())
    lines = (ROOT / task["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) >= 8
    assert all(0 <= row["right"] < len(row["endings"]) for row in rows)


def test_the_locustfile_compiles_and_is_no_dependency():
    file = FOLDER / "locustfile.py"
    compile(file.read_text(), file, "exec")
    locks = (ROOT / "requirements.lock").read_text() + (ROOT / "requirements-dev.lock").read_text()
    assert "locust" not in locks
