"""Needles over HTTP: is a planted fact found under each policy, and at what density?

    python tests/bench/retrieval.py --documents 100 --tokens 8192

Starts the service on a free port unless `--url` names one. Documents, key words and numbers are
unlike anything the bundled checkpoint was trained on; depths are random and seeded. Exits with 1
when the table does not show what docs/sparsity.md says of it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from models.tokenizer import Tokenizer  # noqa: E402  (the script also runs uninstalled)
from models.training.filler import prose  # noqa: E402
from models.training.tasks import (  # noqa: E402
    NeedleDocument,
    held_out_key,
    magic_number,
    needle_document,
)
from tests.bench.running import running, standalone  # noqa: E402

START = 120
"""Seconds that the service has to start."""
POLICIES: dict[str, dict[str, object]] = {
    "dense": {"policy": "dense"},
    "dynamic": {"policy": "dynamic"},
    "sinks:16+window:512": {
        "policy": "fixed",
        "pattern": "sinks:16+window:512",
        "prefill": "dense",
    },
}


@dataclass(frozen=True, slots=True)
class Row:
    """One policy over all documents."""

    policy: str
    right: int
    documents: int
    density: float  # mean over documents
    coverage: float  # estimated, mean over documents
    keys: float  # attended a row, mean over documents
    fallbacks: int  # tokens that left the dynamic policy


def documents(count: int, tokens: int, tokenizer: Tokenizer, seed: int) -> list[NeedleDocument]:
    """`count` documents of about `tokens` tokens with one needle each, at random depths."""
    rng = np.random.default_rng(seed)
    return [
        needle_document(
            prose(int(rng.integers(2**31)), tokens * 6, held_out=True),
            lambda text: tokenizer.encode(text, add_special_tokens=False),
            tokens=tokens,
            depth=float(rng.random()),
            key=held_out_key(rng),
            value=magic_number(rng),
        )
        for _ in range(count)
    ]


def ask(client: httpx.Client, model: str, document: NeedleDocument, policy: str) -> dict:
    """One question over HTTP; the answer's text and its sparsity report."""
    reply = client.post(
        "/v1/chat/completions",
        json={
            "model": model,
            "messages": [{"role": "user", "content": document.user_message}],
            "temperature": 0,
            "max_tokens": 48,
            "sparsity": POLICIES[policy],
        },
    )
    reply.raise_for_status()
    body = reply.json()
    return {"text": body["choices"][0]["message"]["content"], **body["sparsity"]}


def evaluate(url: str, asked: list[NeedleDocument], at_once: int) -> list[Row]:
    """Every document under every policy."""
    rows = []
    with httpx.Client(base_url=url, timeout=600) as client:
        model = client.get("/v1/models").json()["data"][0]["id"]
        with (
            ThreadPoolExecutor(at_once) as pool,
            tqdm(total=len(asked) * len(POLICIES), unit="question") as progress,
        ):
            for policy in POLICIES:
                answers = []

                def one(document: NeedleDocument, policy: str = policy) -> dict:
                    answer = ask(client, model, document, policy)
                    progress.update()
                    return answer

                answers = list(pool.map(one, asked))
                rows.append(
                    Row(
                        policy=policy,
                        right=sum(
                            document.correct(answer["text"])
                            for document, answer in zip(asked, answers, strict=True)
                        ),
                        documents=len(asked),
                        density=statistics.fmean(a["density"] for a in answers),
                        coverage=statistics.fmean(a["coverage"] for a in answers),
                        keys=statistics.fmean(a["keys_attended"] for a in answers),
                        fallbacks=sum(
                            n
                            for a in answers
                            for reason, n in a["fallbacks"].items()
                            if reason != "requested"
                        ),
                    )
                )
    return rows


def table(rows: list[Row], tokens: int) -> str:
    """The rows as text."""
    lines = [
        f"one needle in {tokens} tokens, random depth",
        f"{'policy':<22} {'right':>9} {'density':>8} {'keys':>6} {'coverage':>9} {'fallbacks':>10}",
    ]
    lines += [
        f"{r.policy:<22} {r.right:>4}/{r.documents:<4} {r.density:>8.1%} {r.keys:>6.0f} "
        f"{r.coverage:>9.3f} {r.fallbacks:>10}"
        for r in rows
    ]
    return "\n".join(lines)


def holds(rows: list[Row]) -> bool:
    """What docs/sparsity.md says of the table: found densely and dynamically, lost by a window."""
    dense, dynamic, fixed = rows
    n = dense.documents
    return (
        dense.right >= 0.95 * n
        and dynamic.right >= 0.95 * n
        and dynamic.density <= 0.10
        and fixed.right <= 0.20 * n
    )


def main() -> int:
    """Run the evaluation; 0 when the table holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "models/checkpoints/saccade-12m")
    parser.add_argument("--url", help="of a running service; started here when left out")
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--at-once", type=int, default=2, help="requests in flight")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the table there too")
    options = parser.parse_args()
    tokenizer = Tokenizer.from_folder(options.model)
    asked = documents(options.documents, options.tokens, tokenizer, options.seed)
    with contextlib.ExitStack() as stack:
        url = options.url
        if not url:
            url = stack.enter_context(running(standalone(options.model), START)).url
        rows = evaluate(url, asked, options.at_once)
    print(table(rows, options.tokens))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return 0 if holds(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
