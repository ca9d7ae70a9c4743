"""The tables of errors in docs/server.md: the tree, and every message that a request can get."""

from __future__ import annotations

import inspect
import re

from service import errors
from service.errors import ServiceError
from service.wording import SENTENCES
from tests.docs.markdown import code, table
from tests.docs.messages import HOLE, raised

FOLDERS = ("service/api", "service/encoders", "service/engine")
"""Where requests are refused; the commands' errors stop them, and are no answers."""

_HELD = re.compile(r"\{\w+\}")
_NAMED = re.compile(rf"[\w.{HOLE}]+: ")


def tree():
    """A row for each error that becomes an answer."""
    found = [
        one
        for _, one in inspect.getmembers(errors, inspect.isclass)
        if issubclass(one, ServiceError)
    ]
    found.sort(key=lambda one: (one.status, one.__name__))
    return table(
        ("error", "status", "`type`", "meaning"),
        [
            (one.__name__, one.status, code(one.type), inspect.cleandoc(one.__doc__).split("\n")[0])
            for one in found
            if one is not ServiceError
        ],
    )


def messages():
    """A row for each message, by status; validation's have the field in front."""
    known = {
        name: one
        for name, one in inspect.getmembers(errors, inspect.isclass)
        if issubclass(one, ServiceError)
    }
    rows = {
        (known[one.error].status, one.code or _own_code(known[one.error]), one.message)
        for one in raised(set(known), *FOLDERS)
    }
    rows |= {
        (400, None, one.message if _NAMED.match(one.message) else f"`field`: {one.message}")
        for one in raised({"ValueError"}, "service/api/schemas.py", "service/encoders/schemas.py")
    }
    rows |= {(400, None, f"`field`: {_HELD.sub(HOLE, words)}") for words in SENTENCES.values()}
    return table(
        ("status", "`code`", "message"),
        [
            (status, "-" if told is None else code(told), message)
            for status, told, message in sorted(
                rows, key=lambda row: (row[0], row[1] or "", row[2])
            )
        ],
    )


def _own_code(error):
    """The code that an error's constructor gives by itself."""
    return None if error.__init__ is ServiceError.__init__ else error("").code
