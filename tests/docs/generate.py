"""Writes what the pages in docs/ have from the code: `python tests/docs/generate.py`, or make docs.

    python tests/docs/generate.py --check   # 1 when a page is not what would be written

Each page is written by hand around sections between markers. Their tables come from the
applications' routes and schemas, the configuration, the errors, the registry of metrics and
Prometheus's rules. The measured tables have commands of their own, which make docs runs, too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.docs import errors, routes, series, settings  # noqa: E402
from tests.docs.markdown import with_section  # noqa: E402

DOCS = ROOT / "docs"
PAGES = {
    "server.md": {
        "routes": routes.index,
        "sections": routes.sections,
        "shared": routes.shared,
        "unsupported": routes.unsupported,
        "errors": errors.tree,
        "messages": errors.messages,
    },
    "configuration.md": {"fields": settings.fields},
    "metrics.md": {"series": series.series, "rules": series.rules},
}
"""What is written into which section of which page."""


def written(name, text):
    """A page with all its sections anew."""
    for section, make in PAGES[name].items():
        text = with_section(text, section, make())
    return text


def main(arguments=None):
    """Write or check; 0 when the pages are what they should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    given = parser.parse_args(arguments)
    stale = []
    for name in PAGES:
        before = (DOCS / name).read_text(encoding="utf-8")
        after = written(name, before)
        if after != before:
            stale.append(name)
            if not given.check:
                (DOCS / name).write_text(after, encoding="utf-8")
    for name in stale:
        print(f"docs/{name} {'is not what the code says: make docs' if given.check else 'written'}")
    return int(given.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
