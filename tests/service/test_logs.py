"""What other processes log is shown, whole lines and once."""

from __future__ import annotations

import logging
import os
import time

import pytest

from service import logs


@pytest.fixture
def logger():
    ours = logging.getLogger("saccade")
    before = list(ours.handlers)
    yield logging.getLogger("saccade.engine")
    for handler in set(ours.handlers) - set(before):
        handler.close()
        ours.removeHandler(handler)


def test_a_process_writes_where_it_is_looked_for(tmp_path, monkeypatch, capsys, logger):
    monkeypatch.setenv(logs.FOLDER, str(tmp_path))
    with logs.shown(tmp_path):
        logs.to_folder()
        try:
            raise ValueError("a kernel failed")
        except ValueError:
            logger.exception("request %s failed", 7)
    said = capsys.readouterr().err
    assert "ERROR request 7 failed\nTraceback" in said
    assert said.count("ValueError: a kernel failed\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == [f"{os.getpid()}.log"]


def test_nobody_looks_nothing_is_written(tmp_path, monkeypatch, logger):
    monkeypatch.delenv(logs.FOLDER, raising=False)
    before = list(logging.getLogger("saccade").handlers)
    logs.to_folder()
    assert logging.getLogger("saccade").handlers == before


def test_a_line_is_shown_when_it_is_whole_and_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(logs, "EVERY", 0.01)
    one, other = tmp_path / "1.log", tmp_path / "2.log"
    shown = ""

    def until(text):
        nonlocal shown
        deadline = time.monotonic() + 30
        while text not in shown:
            assert time.monotonic() < deadline
            time.sleep(0.01)
            shown += capsys.readouterr().err

    with logs.shown(tmp_path):
        one.write_text("first \u00fc\nhal")
        until("first \u00fc\n")
        other.write_text("second\n")
        until("second\n")
        with one.open("a") as more:
            more.write("f\n")
        until("half\n")
    assert shown + capsys.readouterr().err == "first \u00fc\nsecond\nhalf\n"
