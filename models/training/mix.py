"""What training sequences are drawn from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mix:
    """Shares of sequences by kind; the rest is variable tracking.

    Attributes:
        plain: text alone.
        needles: facts in a text, asked for one by one.
        key_value: facts and nothing else.
        several: facts in a text, asked for several at once.
        majority: votes on ballots.
        four_values: of `needles`, those in which every key has four values, as in RULER: the
            question does not tell how many there are.
        generated: of documents, those whose text is the generated filler.
        chat: of question sequences, those in the chat template's form.
        repeated: of plain sequences, those with a repeated span.
        interleaved: of question sequences, those that ask in the middle of the document.
    """

    plain: float = 0.20
    needles: float = 0.28
    key_value: float = 0.16
    several: float = 0.12
    majority: float = 0.10
    four_values: float = 0.4
    generated: float = 0.12
    chat: float = 0.5
    repeated: float = 0.5
    interleaved: float = 0.5
