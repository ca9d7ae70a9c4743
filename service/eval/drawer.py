"""Draws documents and writes them as papers; needs a tokenizer and text, and no model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from models.tokenizer import Tokenizer
from service.eval.free_text import Continuation, FreeTask
from service.eval.paper import Dictation, Exam
from service.eval.prompts import prompt_tokens, split
from service.eval.source import Source
from service.eval.tasks import TASKS, Document, Task

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from service.eval.cell import Item
    from service.eval.paper import Paper
    from service.eval.passages import PassageTask


@dataclass(frozen=True, slots=True)
class Drawing:
    """What a process needs to draw documents.

    Attributes:
        model: checkpoint folder, for its tokenizer.
        questions: most questions to ask about a document.
        seed: of the documents; a task and a context have documents of their own.
        texts: the user's own; empty for generated prose.
    """

    model: Path
    questions: int
    seed: int
    texts: tuple[str, ...] = ()

    def drawer(self) -> Drawer:
        """Load the tokenizer.

        Raises:
            ModelError: it cannot be loaded.
        """
        return Drawer(Tokenizer.from_folder(self.model), self.questions, self.seed, self.texts)


class Drawer:
    """Draws documents; each depends on its item alone.

    Args:
        tokenizer: the model's.
        questions, seed, texts: as in `Drawing`.
    """

    def __init__(
        self, tokenizer: Tokenizer, questions: int, seed: int, texts: tuple[str, ...] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._questions = questions
        self._seed = seed
        self._generated = Source(self._encode)
        self._own = Source(self._encode, texts)
        self._reserves: dict[str, int] = {}

    def __call__(self, item: Item) -> Paper:
        """An item's document and what to do with it.

        Raises:
            ConfigError: there is too little text for this.
        """
        task = TASKS[item.cell.task]
        source = self._own if item.cell.own_text else self._generated
        if isinstance(task, Task):
            return self._exam(task, source, item)
        if isinstance(task, FreeTask):
            return self._free(task, source, item)
        return self._dictation(task, source, item)

    def _exam(self, task: Task, source: Source, item: Item) -> Exam:
        rng = np.random.default_rng(
            [self._seed, _number(task.name), item.cell.context, item.document]
        )
        document = task.make(rng, source, item.cell.context - self._reserve(task), self._questions)
        shared, tails = split(prompt_tokens(self._tokenizer, document))
        return Exam(shared, tails, document.questions, task.answer_tokens)

    def _free(self, task: FreeTask, source: Source, item: Item) -> Exam:
        rng, first = self._anywhere(task.name, item), self._first()
        text = task.make(rng, source, item.cell.context - len(first) - task.answer_tokens)
        prompt = np.array([*first, *text], dtype=np.int32)
        # A continuation's seed does not depend on how many there are.
        seeds = rng.integers(2**63, size=task.questions).tolist()[: self._questions]
        shared, tails = split([prompt] * len(seeds))
        wanted = (Continuation(),) * len(seeds)
        return Exam(shared, tails, wanted, task.answer_tokens, tuple(seeds))

    def _dictation(self, task: PassageTask, source: Source, item: Item) -> Dictation:
        rng, first = self._anywhere(task.name, item), self._first()
        passage = task.make(rng, source, item.cell.context - len(first))
        return Dictation(
            np.array([*first, *passage.tokens], dtype=np.int32),
            passage.targets,
            passage.skipped,
            self._bytes(passage.tokens, passage.targets - passage.skipped),
        )

    def _anywhere(self, task: str, item: Item) -> np.random.Generator:
        """A generator for every context alike: whatever the length, the text ends the same."""
        return np.random.default_rng([self._seed, _number(task), item.document])

    def _first(self) -> list[int]:
        """What running text begins with."""
        return [] if self._tokenizer.bos_id is None else [self._tokenizer.bos_id]

    def _reserve(self, task: Task) -> int:
        """Tokens that are not the document's: of its longest question, the template, the answer."""
        if task.name not in self._reserves:
            some = task.make(np.random.default_rng(0), Source(self._encode), 2048, 1)
            [prompt] = prompt_tokens(self._tokenizer, Document("", some.questions))
            self._reserves[task.name] = len(prompt) + 16 + task.answer_tokens
        return self._reserves[task.name]

    def _bytes(self, tokens: Sequence[int], counted: int) -> int:
        """Bytes of text in the last `counted` tokens."""
        # With some tokens before: a decoder may drop a text's leading space.
        before = list(tokens[-counted - 16 : -counted])
        both = self._tokenizer.decode([*before, *tokens[-counted:]])
        return len(both.encode()) - len(self._tokenizer.decode(before).encode())

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


def _number(name: str) -> int:
    return int.from_bytes(name.encode()[-8:], "big")
