"""The pages say what the code says, lead where they point, and quote what exists."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache

import pytest

from tests.bench import operations
from tests.deploy.monitoring import ROOT
from tests.docs.generate import DOCS, PAGES, main, written
from tests.docs.markdown import table, with_section
from tests.docs.meanings import KINDS, MEANINGS
from tests.docs.messages import HOLE, texts
from tests.docs.routes import anchor, used_keys
from tests.docs.series import alert_names

SKIPPED = {"build", "node_modules"}
FILES = sorted(
    file
    for file in ROOT.rglob("*.md")
    if not any(part in SKIPPED or part[0] == "." for part in file.relative_to(ROOT).parts[:-1])
)


@cache
def prose(file):
    """A page's text without its blocks of code and its comments."""
    text = re.sub(r"^```.*?^```$", "", file.read_text(encoding="utf-8"), flags=re.S | re.M)
    return re.sub(r"<!--.*?-->", "", text, flags=re.S)


@cache
def anchors(file):
    """GitHub's names of a page's headings; those that come again are numbered."""
    found = []
    for heading in re.findall(r"^#+ (.+)$", prose(file), flags=re.M):
        name = anchor(re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip())
        again = sum(re.sub(r"-\d+$", "", one) == name for one in found)
        found.append(f"{name}-{again}" if again else name)
    return set(found)


def links(file):
    """(text, target) of every link and picture."""
    return re.findall(r"\[([^]]*)\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(file)))


# -- generated ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_the_code_says(name):
    before = (DOCS / name).read_text(encoding="utf-8")
    assert written(name, before) == before, "run make docs"


def test_the_check_finds_a_stale_page_and_writes_nothing(monkeypatch, tmp_path, capsys):
    for name in PAGES:
        (tmp_path / name).write_text((DOCS / name).read_text(encoding="utf-8"), encoding="utf-8")
    stale = tmp_path / "configuration.md"
    stale.write_text(stale.read_text().replace("port to listen on", "a port"))
    monkeypatch.setattr("tests.docs.generate.DOCS", tmp_path)
    assert main(["--check"]) == 1 and "a port" in stale.read_text()
    assert "configuration.md" in capsys.readouterr().out
    assert main([]) == 0 and "port to listen on" in stale.read_text()
    assert main(["--check"]) == 0


def test_no_meaning_is_left_over():
    assert set(MEANINGS) - used_keys() == set()
    assert set(KINDS) - used_keys() == set()


def test_a_page_without_markers_is_an_error():
    with pytest.raises(SystemExit, match="fields"):
        with_section("# Nothing", "fields", "")
    assert table(("a",), [("x|y",)]).endswith("| x\\|y |")


def test_the_measured_tables_are_what_the_results_say():
    done = subprocess.run(
        [sys.executable, "tests/bench/patterns.py", "--render", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# -- links -------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(file):
    for text, target in links(file):
        if re.match(r"\w+:", target):
            continue
        path, _, name = target.partition("#")
        there = (file.parent / path).resolve() if path else file
        assert there.exists(), f"[{text}]({target}): there is no {path}"
        assert there.is_relative_to(ROOT.resolve()), f"[{text}]({target}) leads out of here"
        if name:
            assert name in anchors(there), f"[{text}]({target}): no heading has this name"


def test_headings_are_named_as_github_names_them(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b_c` (d), e!\n\n## GET /v1/x/{name}\n\n## On\n\n```\n# no\n```\n\n## On\n"
    )
    assert anchors(page) == {"a-b_c-d-e", "get-v1xname", "on", "on-1"}
    another = tmp_path / "another.md"
    another.write_text("[a](nowhere.md) ![b](#c) `[d](e)`\n")
    assert [target for _, target in links(another)] == ["nowhere.md", "#c"]


def test_the_readme_leads_to_every_page():
    listed = {target for _, target in links(ROOT / "README.md")}
    assert {f"docs/{file.name}" for file in DOCS.glob("*.md")} <= listed


# -- the walk-through ---------------------------------------------------------------------------


def test_the_walk_through_is_a_script(tmp_path):
    """`python tests/bench/operations.py` runs it; here it only has to parse."""
    found = operations.blocks(operations.GUIDE.read_text(encoding="utf-8"))
    headings = [heading for heading, _ in found]
    assert headings[0] == operations.SECTION and headings[-1] == operations.LAST
    assert "git clone" in found[1][1] and "saccade serve" in found[2][1]
    text = operations.script(found, tmp_path)
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with pytest.raises(SystemExit, match="must end with one block"):
        operations.script(found[:-1], tmp_path)


# -- what is quoted ----------------------------------------------------------------------------


def quoted(page):
    """Messages of troubleshooting.md: the first cells of its tables, where they are code."""
    for line in page.splitlines():
        if match := re.match(r"\| `(.+?)` \|", line):
            yield match[1]


def exists(message):
    """Whether a text of the source is, or holds, this message."""
    pattern = ".*".join(map(re.escape, message.strip(f" {HOLE}").split(HOLE)))
    return any(re.search(pattern, text, flags=re.S) for text in (*texts(), makefile()))


@cache
def makefile():
    return (ROOT / "Makefile").read_text()


def test_every_message_of_the_troubleshooting_exists():
    messages = list(quoted((DOCS / "troubleshooting.md").read_text(encoding="utf-8")))
    assert len(messages) > 40
    missing = [one for one in messages if one[0] != "/" and not exists(one)]
    assert not missing
    assert not exists("the port is taken by … somebody else")


def test_every_alert_says_what_to_do():
    headings = set(re.findall(r"^### (Saccade\w+)$", prose(DOCS / "operations.md"), flags=re.M))
    assert headings == set(alert_names())


def test_variables_and_flags_that_pages_name_exist():
    fields = (DOCS / "configuration.md").read_text(encoding="utf-8")
    for file in [ROOT / "README.md", *DOCS.glob("*.md")]:
        text = file.read_text(encoding="utf-8")
        for name in re.findall(r"\bSACCADE_[A-Z_]+[A-Z]\b", text):
            assert f"`{name}`" in fields, f"{file.name}: {name}"


def test_commands_in_the_pages_parse():
    """Every `saccade ...` line's options are the command's."""
    from typer.main import get_command

    from service.commands.app import app

    root = get_command(app)
    blocks = [
        block
        for file in [ROOT / "README.md", *DOCS.glob("*.md")]
        for block in re.findall(r"^```(?:sh|bash)\n(.*?)^```", file.read_text(), flags=re.S | re.M)
    ]
    seen = 0
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        words = re.split(r"\s+", re.sub(r"\s#.*", "", line).strip())
        while words and "=" in words[0]:
            words.pop(0)
        if not words or words[0] != "saccade":
            continue
        command, rest = root, words[1:]
        while rest and hasattr(command, "commands") and rest[0] in command.commands:
            command = command.commands[rest.pop(0)]
        options = {name for one in command.params for name in (*one.opts, *one.secondary_opts)}
        given = {word.partition("=")[0] for word in rest if word.startswith("--")}
        assert given <= options | {"--help"}, line
        seen += 1
    assert seen > 10


def test_series_that_pages_name_exist():
    known = (DOCS / "metrics.md").read_text(encoding="utf-8")
    for file in [ROOT / "README.md", *DOCS.glob("*.md")]:
        for name in re.findall(r"`(saccade_[a-z_]+)[`{]", file.read_text(encoding="utf-8")):
            assert f"`{name}`" in known, f"{file.name}: {name}"
