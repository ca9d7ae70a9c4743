"""Tables and sections of the generated pages."""

from __future__ import annotations

BEGIN = "<!-- {name}: written by make docs -->"
END = "<!-- end of {name} -->"


def table(names, rows):
    """A table in Markdown; cells are texts."""
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    lines += [f"| {' | '.join(map(cell, row))} |" for row in rows]
    return "\n".join(lines)


def cell(text):
    """A text within a table."""
    return " ".join(str(text).split()).replace("|", "\\|")


def code(value):
    """As code; a backtick within would end it."""
    return f"`{value}`"


def with_section(page, name, body):
    """A page with what stands between the markers of `name` anew.

    Raises:
        SystemExit: the page has no such markers.
    """
    begin, end = BEGIN.format(name=name), END.format(name=name)
    head, found, rest = page.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"a page must hold the lines {begin} and {end}")
    return f"{head}{begin}\n{body}\n{end}{tail}"
