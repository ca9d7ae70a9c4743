"""An engine that says what a test tells it to."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

from models.generation import GenerationDefaults
from service.engine.types import Delta, Health, SparsityReport
from service.metrics import Metrics

REPORT = SparsityReport(
    policy="dynamic",
    density=0.1,
    coverage=0.98,
    coverage_p5=0.9,
    keys_attended=100.0,
    fallbacks={"low_coverage": 1},
)


def delta(text="", index=0, finish=None, **fields):
    """A delta of one token, or of none when it has no text."""
    tokens = (ord(text[0]),) if text else ()
    sparsity = REPORT if finish in ("stop", "length") else None
    return Delta(index, text, tokens, (), finish, **({"sparsity": sparsity} | fields))


class Letters:
    """One token a character."""

    special_ids = frozenset()

    def encode(self, text, add_special_tokens=True):
        return [ord(letter) % 256 for letter in text]

    def decode(self, ids, skip_special_tokens=True):
        return "".join(map(chr, ids))

    def token_text(self, token):
        return chr(token)

    def render_chat(self, messages, add_generation_prompt=True):
        return "".join(message["content"] for message in messages)


class FakeStream:
    """Plays a script, whose steps are deltas, lists of deltas that arrive at once, or errors."""

    def __init__(self, script):
        self.script = list(script)
        self.late = []
        self.closed = False

    def __aiter__(self):
        return self

    async def __anext__(self):
        if self.late:
            return self.late.pop(0)
        if not self.script:
            raise StopAsyncIteration
        step = self.script.pop(0)
        if step == "hang":
            await asyncio.Event().wait()
        if isinstance(step, BaseException):
            raise step
        await asyncio.sleep(0)
        if isinstance(step, list):
            step, *self.late = step
        return step

    def more(self):
        late, self.late = self.late, []
        return late

    def close(self):
        self.closed = True


class FakeEngine:
    """Each submitted prompt plays the next script; an exception as script refuses the prompt."""

    model_name = "fake"
    max_model_len = 100
    tokenizer = Letters()

    def __init__(self, *scripts, health=None, generation=None):
        self.config = SimpleNamespace(vocab_size=256, generation=generation or GenerationDefaults())
        self.metrics = Metrics("fake")
        self.scripts = list(scripts)
        self.submitted = []
        self.streams = []
        self._health = health or Health(True, 0.0)

    def check_room(self, choices):
        assert choices > 0

    def submit(self, prompt, sampling, sparsity, *, n=1, priority=0, request_id, cache_salt=""):
        script = self.scripts.pop(0)
        if isinstance(script, BaseException):
            raise script
        self.submitted.append(
            SimpleNamespace(
                prompt=list(prompt),
                sampling=sampling,
                sparsity=sparsity,
                n=n,
                priority=priority,
                id=request_id,
                cache_salt=cache_salt,
            )
        )
        self.streams.append(FakeStream(script))
        return self.streams[-1]

    def health(self):
        return self._health
