"""What is to be measured: a task at a context, and each of its documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.eval.passages import PassageTask
from service.eval.tasks import TASKS

if TYPE_CHECKING:
    from service.eval.policies import NamedPolicy


@dataclass(frozen=True, slots=True)
class Cell:
    """A task at a context, and the policies to compare there.

    Attributes:
        context: tokens of a prompt.
        documents: how many.
        own_text: whether the documents are made of the user's texts, where there are any;
            otherwise of generated prose.
    """

    task: str
    context: int
    documents: int
    policies: tuple[NamedPolicy, ...]
    own_text: bool = True

    @property
    def passages(self) -> bool:
        """Whether its documents are passages, which are predicted and not answered."""
        return isinstance(TASKS[self.task], PassageTask)


@dataclass(frozen=True, slots=True)
class Item:
    """One document of a cell; what is measured of it depends on nothing else, but for rounding."""

    cell: Cell
    document: int


def documents_for(task: str, documents: int, questions: int, answers: int) -> int:
    """Documents of a task: at least `documents`, and enough for `answers` answers.

    Args:
        task: its name.
        documents: fewest.
        questions: most questions a document.
        answers: fewest answers; passages have none.
    """
    kind = TASKS[task]
    if isinstance(kind, PassageTask):
        return documents
    return max(documents, kind.documents(answers, questions))
