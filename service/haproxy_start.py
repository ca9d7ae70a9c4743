"""Run in HAProxy's place: corrects the configuration that Ray wrote, then becomes HAProxy.

    haproxy_start.py PROGRAM LISTEN FOLDER LIMIT -f CONFIGURATION ...

LISTEN is the public address, FOLDER holds an answer for each status (400.http and so on), LIMIT is
of `haproxy_sessions`. The standard library alone, since it runs with every reload.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
from pathlib import Path

# Isolated, it has no path to the package that it lies in.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from service.haproxy_sessions import with_sessions

_PR_SET_PDEATHSIG = 1
_DROPPED = ("frontend prometheus", "listen stats")
"""Sections that listen on all interfaces for what nobody asks here: Ray uses the control socket."""


class TemplateError(Exception):
    """Ray's configuration is not as this version of it should be; nothing was started."""


def corrected(text: str, listen: str, folder: Path) -> str:
    """Ray's configuration, listening on `listen` alone and with the answers in `folder`.

    Raises:
        TemplateError: it does not have the sections and lines that are to be changed.
    """
    sections = re.split(r"^(?=\S)", text, flags=re.MULTILINE)
    kept = [one for one in sections if one.split("\n", 1)[0].strip() not in _DROPPED]
    if len(sections) - len(kept) != len(_DROPPED):
        raise TemplateError("the sections for statistics are missing")
    text = "".join(kept)
    answers = "".join(
        f"\n    errorfile {file.stem} {file}" for file in sorted(folder.glob("*.http"))
    )
    for pattern, replacement in (
        (r"^ +bind .*$", f"    bind {listen}"),
        (r"^defaults$", f"defaults{answers}"),
        (r"( mode )666( level admin )", r"\g<1>600\2"),
        # Access logs, to whoever listens to UDP on this machine.
        (r"^ +log \S+ local0 info\n", ""),
        # The default backend: no application is up.
        (r"return status 404 content-type .*$", "return status 503 default-errorfiles"),
    ):
        text, found = re.subn(pattern, replacement, text, flags=re.MULTILINE)
        if found != 1:
            raise TemplateError(f"{found} lines, not one, match {pattern!r}")
    return re.sub(
        r"^ +errorfile \d+ (?!" + re.escape(str(folder)) + r"/\d+\.http$).*\n",
        "",
        text,
        flags=re.MULTILINE,
    )


def main() -> None:
    """Correct the file behind -f, and become HAProxy."""
    program, listen, folder, limit, *arguments = sys.argv[1:]
    file = Path(arguments[arguments.index("-f") + 1])
    text = file.read_text(encoding="utf-8")
    text = with_sessions(corrected(text, listen, Path(folder)), int(limit))
    file.write_text(text, encoding="utf-8")
    # HAProxy ends with Ray's process that started it, however that ends.
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the process that started this has ended")
    os.execv(program, [program, *arguments])


if __name__ == "__main__":
    main()
