"""Which prompts run together, and in which pages: a document's pages are shared by its prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kernels.page import PAGE
from service.engine.sequence import TAIL
from service.engine.tally import Tally
from service.errors import GenerationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from service.engine.sequence import Fallback
    from service.eval.paper import Dictation, Exam
    from service.eval.room import Room


@dataclass(frozen=True, slots=True)
class Document:
    """Prompts that begin alike.

    Attributes:
        prompts: the tokens of each.
        shared: so many of their first tokens lie in shared pages, all before any prompt's tail.
        behind: most tokens that follow a prompt.
    """

    prompts: tuple[tuple[int, ...], ...]
    shared: int
    behind: int

    @staticmethod
    def of_exam(exam: Exam) -> Document:
        """A prompt for every question."""
        shared = exam.shared.tolist()
        prompts = tuple((*shared, *tail.tolist()) for tail in exam.tails)
        before = max(0, min(map(len, prompts)) - TAIL)
        return Document(prompts, min(len(shared), before) // PAGE * PAGE, exam.answer_tokens)

    @staticmethod
    def of_dictation(dictation: Dictation) -> Document:
        """One prompt, whose tail begins with the token that predicts the first target."""
        first = len(dictation.tokens) - dictation.targets - 1
        prompt = (*dictation.tokens[:first].tolist(), *[0] * TAIL)
        return Document((prompt,), first // PAGE * PAGE, max(0, dictation.targets - TAIL))

    @property
    def pages(self) -> int:
        """That are shared."""
        return self.shared // PAGE

    @property
    def own(self) -> int:
        """Pages that each prompt needs besides, with what follows it."""
        return -(-(max(map(len, self.prompts)) + self.behind) // PAGE) - self.pages


@dataclass(frozen=True, slots=True)
class Front:
    """What the shared tokens of a document's prompts did.

    Attributes:
        prefilled: what they looked at.
        fallbacks: as in a sequence, of their pages and of some behind them.
    """

    prefilled: Tally = field(default_factory=Tally)
    fallbacks: dict[int, Fallback] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Seat:
    """A prompt with its pages; its document lies in the first of them.

    Attributes:
        behind: most tokens that follow it.
        front: what its tokens before the tail did, as far as they are computed.
    """

    prompt: tuple[int, ...]
    shared: int
    behind: int
    pages: list[int]
    front: Front


def groups(documents: Sequence[Document], room: Room) -> Iterator[list[Document]]:
    """Documents, in order, that have room together with all of their prompts.

    One that has more prompts than there is room for stands alone.

    Raises:
        GenerationError: there is no room for one prompt of a document.
    """
    group: list[Document] = []
    pages = prompts = 0  # of the group
    for document in documents:
        own, count = document.own, len(document.prompts)
        if document.pages + own > room.pages:
            raise GenerationError(
                f"a document, a question and its answer need {document.pages + own} pages of "
                f"{PAGE} tokens, and there is memory for {room.pages}"
            )
        wanted = document.pages + own * count
        if group and (pages + wanted > room.pages or prompts + count > room.together):
            yield group
            group, pages, prompts = [], 0, 0
        group.append(document)
        pages, prompts = pages + wanted, prompts + count
    if group:
        yield group


def shared_pages(group: Sequence[Document]) -> list[list[int]]:
    """Where each document of a group lies: neighbouring pages, from the first on."""
    starts = [sum(one.pages for one in group[:number]) for number in range(len(group))]
    return [list(range(start, start + one.pages)) for start, one in zip(starts, group, strict=True)]


def seatings(
    group: Sequence[Document], room: Room, fronts: Sequence[Front]
) -> Iterator[list[Seat]]:
    """The prompts of a group, in order: all at once, or in parts those of a document alone.

    Args:
        group: documents that have room together.
        room: how much that is.
        fronts: of each document.
    """
    front = first = sum(one.pages for one in group)
    seats: list[Seat] = []
    for document, shared, done in zip(group, shared_pages(group), fronts, strict=True):
        own = document.own
        for prompt in document.prompts:
            if len(seats) == room.together or first + own > room.pages:
                yield seats
                seats, first = [], front
            pages = [*shared, *range(first, first + own)]
            seats.append(Seat(prompt, document.shared, document.behind, pages, done))
            first += own
    yield seats
