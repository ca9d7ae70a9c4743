"""Users for Locust (`pip install locust`), who ask streaming questions of a length that varies.

    locust -f deploy/loadtest/locustfile.py --host http://127.0.0.1:8000            # with a page
    locust -f deploy/loadtest/locustfile.py --host http://127.0.0.1:8000 --headless \
        --users 8 --spawn-rate 2 --run-time 60s

Locust is a closed loop: a user asks again when the last answer has ended, so a slow service gets
fewer requests. `saccade bench serve --rate` is the open loop. The rows of type STREAM are the
figures: to the first token, the longest pause between two, the whole answer. The row POST counts
failures; its times end with the answer's headers.

Variables: SACCADE_LOAD_MODEL (the first of /v1/models), SACCADE_LOAD_KEY, SACCADE_LOAD_WORDS (of a
prompt, 600), SACCADE_LOAD_TOKENS (of an answer, 64), SACCADE_LOAD_POLICY (the service's).
"""

from __future__ import annotations

import itertools
import json
import os
import random
import time

from locust import HttpUser, between, task

_WORDS = """
    the a old quiet river letter harbour station walked found carried behind under before evening
    morning window lamp bridge garden nobody someone again slowly green heavy small road
""".split()  # noqa: SIM905  a list to read
_NAME = "/v1/completions"


class Reader(HttpUser):
    """One who asks, reads the answer as it comes, and thinks for a second."""

    wait_time = between(0.5, 1.5)

    def on_start(self) -> None:
        """Learn the model's name."""
        key = os.environ.get("SACCADE_LOAD_KEY")
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.model = os.environ.get("SACCADE_LOAD_MODEL")
        if self.model is None:
            models = self.client.get("/v1/models", headers=self.headers).json()
            self.model = models["data"][0]["id"]

    @task
    def ask(self) -> None:
        """Send one question and time its tokens."""
        most = int(os.environ.get("SACCADE_LOAD_WORDS", "600"))
        body = {
            "model": self.model,
            "prompt": " ".join(random.choices(_WORDS, k=random.randint(max(1, most // 2), most))),
            "max_tokens": int(os.environ.get("SACCADE_LOAD_TOKENS", "64")),
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if policy := os.environ.get("SACCADE_LOAD_POLICY"):
            body["sparsity"] = {"policy": policy}
        start, times = time.perf_counter(), []
        with self.client.post(
            _NAME, json=body, headers=self.headers, stream=True, catch_response=True
        ) as answer:
            if answer.status_code != 200:
                answer.failure(f"status {answer.status_code}")
                return
            error = self._read(answer, times)
            if error is None:
                answer.success()
            else:
                answer.failure(error)
        if times:
            self._report("first token", times[0] - start)
            self._report("whole answer", times[-1] - start)
        if len(times) > 1:
            pauses = [late - early for early, late in itertools.pairwise(times)]
            self._report("longest pause between tokens", max(pauses))

    def _read(self, answer, times: list[float]) -> str | None:
        """Note when tokens come; what went wrong, if anything did."""
        for line in answer.iter_lines():
            if not line.startswith(b"data: "):
                continue
            if line == b"data: [DONE]":
                return None
            chunk = json.loads(line[6:])
            if "error" in chunk:
                return str(chunk["error"].get("message"))
            if chunk["choices"]:
                times.append(time.perf_counter())
        return "the answer was cut short"

    def _report(self, name: str, seconds: float) -> None:
        self.environment.events.request.fire(
            request_type="STREAM",
            name=name,
            response_time=seconds * 1e3,
            response_length=0,
            exception=None,
            context={},
        )
