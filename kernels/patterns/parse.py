"""Reading patterns: `"sinks:16+(window:512&strided:4)@bidirectional"`.

    pattern:   preset, or union, or union "@" ("causal" or "bidirectional")
    union:     intersection "+" intersection ...
    intersection: operand "&" operand ...
    operand:   primitive, or "(" union ")"
    primitive: name, or name ":" number "," number ...

Blanks may stand between any two of these. Time is linear in the length, which is limited.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from kernels.errors import PatternError
from kernels.patterns.axial import Axial
from kernels.patterns.blocks import BlockLocal
from kernels.patterns.expression import Intersection, Union
from kernels.patterns.fixed import Fixed
from kernels.patterns.full import Full
from kernels.patterns.global_tokens import Global
from kernels.patterns.primitive import LARGEST
from kernels.patterns.published import SPECS
from kernels.patterns.random_blocks import Random
from kernels.patterns.sinks import Sinks
from kernels.patterns.strided import Strided
from kernels.patterns.window import Dilated, Window

if TYPE_CHECKING:
    from typing import Never

    from kernels.patterns.expression import Expression
    from kernels.patterns.primitive import Primitive

LENGTH = 256
"""Characters that a pattern may have."""
DEPTH = 16
"""Parentheses that may be open at once."""
MOST = 16
"""Primitives that a pattern may have: what each of them sees is looked at for every key."""
PRIMITIVES: tuple[type[Primitive], ...] = (
    Full,
    Window,
    Dilated,
    Global,
    Strided,
    Fixed,
    BlockLocal,
    Axial,
    Random,
    Sinks,
)
EXAMPLE = "such as sinks:16+window:1024"
TOKEN = re.compile(r"[ \t]*([a-z_][a-z_-]*|[0-9]+|[-+&():,@]|.|\Z)", re.DOTALL)


def parse(text: str) -> tuple[Expression, bool]:
    """Read a pattern or the name of a preset: the expression, and whether it is causal.

    Raises:
        PatternError: naming the character that is wrong, with a line that points at it, and what to
            write there.
    """
    if len(text) > LENGTH:
        raise PatternError(
            f"the pattern has {len(text)} characters: write at most {LENGTH}, {EXAMPLE}"
        )
    reader = _Reader(SPECS.get(text.strip(), text))
    expression = reader.union(0)
    causal = reader.ending()
    return expression, causal


@dataclass(slots=True)
class _Reader:
    """A place in a text, which moves on as it is read."""

    text: str
    at: int = 0
    primitives: int = 0  # read so far

    def union(self, depth: int) -> Expression:
        parts = [self.intersection(depth)]
        while self.takes("+"):
            parts.append(self.intersection(depth))
        return Union(tuple(parts)) if len(parts) > 1 else parts[0]

    def intersection(self, depth: int) -> Expression:
        parts = [self.operand(depth)]
        while self.takes("&"):
            parts.append(self.operand(depth))
        return Intersection(tuple(parts)) if len(parts) > 1 else parts[0]

    def operand(self, depth: int) -> Expression:
        token, place = self.token()
        if token != "(":
            return self.primitive()
        if depth == DEPTH:
            self.fail(place, f"close some parentheses first, at most {DEPTH} may be open")
        self.takes("(")
        inside = self.union(depth + 1)
        if not self.takes(")"):
            self.fail(self.token()[1], "write + or & and another primitive, or )")
        return inside

    def primitive(self) -> Primitive:
        name, place = self.token()
        kind = next((kind for kind in PRIMITIVES if kind.name == name), None)
        if kind is None:
            forms = ", ".join(kind.form for kind in PRIMITIVES)
            self.fail(
                place,
                f"write one of {forms}, joined by + or &, {EXAMPLE}; or nothing but the name of a "
                f"preset, {', '.join(SPECS)}",
            )
        self.primitives += 1
        if self.primitives > MOST:
            self.fail(place, f"leave some primitives out, a pattern has at most {MOST}")
        self.takes(name)
        numbers: list[int] = []
        for field in fields(kind):
            if not self.takes("," if numbers else ":"):
                self.fail(self.token()[1], f"write {kind.form} with numbers for its letters")
            digits, at = self.token()
            least = kind.least(field.name)
            if not digits.isascii() or not digits.isdigit() or not least <= int(digits) <= LARGEST:
                self.fail(at, f"write {kind.form} with numbers from {least} to {LARGEST}")
            numbers.append(int(digits))
            self.takes(digits)
        try:
            return kind(*numbers)
        except PatternError as error:
            self.fail(place, str(error))

    def ending(self) -> bool:
        """Whether the pattern is causal, by what stands behind its expression."""
        token, place = self.token()
        if not token:
            return True
        if token != "@":
            self.fail(place, "write + or & and another primitive, @bidirectional, or nothing")
        self.takes("@")
        word, place = self.token()
        if word not in ("causal", "bidirectional"):
            self.fail(place, "write bidirectional or causal")
        self.takes(word)
        if self.token()[0]:
            self.fail(self.token()[1], f"write nothing behind @{word}")
        return word == "causal"

    def token(self) -> tuple[str, int]:
        """The next token, "" at the end, and where it begins."""
        found = TOKEN.match(self.text, self.at)
        assert found is not None  # it matches any character, and the end
        return found[1], found.start(1)

    def takes(self, token: str) -> bool:
        """Move on if this is the next token."""
        following, place = self.token()
        if following == token:
            self.at = place + len(token)
        return following == token

    def fail(self, place: int, remedy: str) -> Never:
        """Point at a character; what cannot be printed, and would move the mark, shows as a dot."""
        shown = "".join(x if x.isascii() and x.isprintable() else "." for x in self.text)
        self.at = place
        what = repr(self.token()[0]) if place < len(self.text) else "the end"
        raise PatternError(
            f"cannot read the pattern at {what}, character {place + 1}: {remedy}\n"
            f"  {shown}\n"
            f"  {' ' * place}^"
        )
