"""The checkpoint's README.md, filled in from the run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from models.training.plans import Shape

_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: en
---

# Saccade 12M

A Llama of {parameters:.1f} million parameters that finds facts in long documents. It exists to show
and test sparse attention: small enough for a CPU, yet its answers depend on looking at the right
place among up to {max_length} tokens.

| | |
|---|---|
| architecture | `LlamaForCausalLM`, {layers} layers, hidden {hidden}, {heads} query \
and {kv_heads} KV heads of {head_dim}, SwiGLU {intermediate}, tied embeddings, \
RoPE base {rope:.0e} |
| weights | bfloat16, {megabytes:.1f} MB |
| tokenizer | byte-level BPE of {vocab} tokens, digits apart |
| context | {max_length} tokens |
| licence | Apache-2.0 |

## Training

| | |
|---|---|
| text | public-domain novels: {files} files, {text_mb:.1f} MB, \
{text_tokens:.1f} million tokens; and generated filler prose |
{training}
| optimiser | Muon for matrices, AdamW for embedding and norms |

Sequences are running text, needle sentences hidden in text with one to 64 facts, documents of facts
alone, questions about several facts at once, yes and no votes on ballots, and chains of variable
assignments; questions come after the document or inside it, in plain form (`Question: ...` /
`Answer:`) or in the chat template. Planted sentences and questions carry no loss.

## Measured at the end of training

Share of questions with every digit right (greedy), keys and texts unseen in training:

{retrieval}

Bits per byte of unseen novels: {bits}.

## Use

State facts as `One of the special magic numbers for amber-lantern is: 1234567.` and ask
`What is the special magic number for amber-lantern mentioned in the provided text?` after the
document, or `What are all the special magic numbers for ...?` where there may be several. Chains
`VAR B = VAR A.` are walked when asked `Trace VAR B.`

## Limits

It copies; it does not reason, and it knows nothing of the world beyond the style of old novels. It
answers the forms above and their like; other questions get fluent nonsense. Variable chains longer
than four assignments and documents longer than {max_length} tokens are outside its training.
"""


def _table(scores: Sequence[Mapping[str, Any]]) -> str:
    """Markdown table of retrieval scores: a row a task, a column a length."""
    lengths = sorted({int(score["length"]) for score in scores})
    tasks = list(dict.fromkeys(str(score["task"]) for score in scores))
    found = {(s["task"], s["length"]): f"{s['share']:.3f}" for s in scores}
    lines = ["| task | " + " | ".join(map(str, lengths)) + " |", "|---" * (len(lengths) + 1) + "|"]
    lines += [
        f"| {task} | " + " | ".join(found.get((task, n), "") for n in lengths) + " |"
        for task in tasks
    ]
    return "\n".join(lines)


def _training(facts: Mapping[str, Any]) -> str:
    """Rows on recipe, tokens and time; of every run in turn where one began with another's end."""
    earlier = facts.get("start") or []
    first, *later = [*(run["plan"] or "PLAN" for run in earlier), facts["plan"]]
    recipe = f"`python3 -m models.training.train --text DIR --plan {first}`"
    recipe += "".join(f", then with `--plan {plan} --start CHECKPOINT`" for plan in later)
    steps = f"{facts['tokens_seen'] / 1e6:.0f} million"
    epochs = facts["text_tokens_seen"] / max(1, facts["text_tokens"])
    text = f"running text with loss {epochs:.1f} passes over the text"
    minutes = f"{facts['clock'] / 60:.1f} minutes"
    if not earlier:
        return (
            f"| recipe | {recipe} |\n"
            f"| tokens seen | {steps} in {facts['step']} steps; {text} |\n"
            f"| time | {minutes} of training on {facts['device']} |"
        )
    runs = [_earlier(run) for run in earlier]
    kept = f", {facts['blend']:.0%} of its change of the weights kept" if "blend" in facts else ""
    runs.append(
        f"by plan `{facts['plan']}` ({steps} tokens in {facts['step']} steps, {text}, "
        f"{minutes} on {facts['device']}{kept})"
    )
    return f"| recipe | {recipe} |\n| trained | {', then '.join(runs)} |"


def _earlier(run: Mapping[str, Any]) -> str:
    known = []
    if run["tokens_seen"] is not None:
        known.append(f"{run['tokens_seen'] / 1e6:.0f} million tokens")
    if run["seconds"] is not None:
        on = f" on {run['device']}" if run["device"] else ""
        known.append(f"{run['seconds'] / 60:.1f} minutes{on}")
    if run.get("blend"):
        known.append(f"{run['blend']:.0%} of its change of the weights kept")
    name = f"by plan `{run['plan']}`" if run["plan"] else "by an earlier run"
    return f"{name} ({', '.join(known)})" if known else name


def model_card(
    shape: Shape, facts: Mapping[str, Any], *, max_length: int, weight_bytes: int
) -> str:
    """The card's text; `facts` are the run's numbers as the trainer records them."""
    bits = facts.get("bits_per_byte") or {}
    return _CARD.format(
        parameters=facts["parameters"] / 1e6,
        max_length=max_length,
        layers=shape.layers,
        hidden=shape.hidden,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate=shape.intermediate,
        rope=shape.rope_theta,
        vocab=shape.vocab,
        megabytes=weight_bytes / 1e6,
        files=facts["text_files"],
        text_mb=facts["text_bytes"] / 1e6,
        text_tokens=facts["text_tokens"] / 1e6,
        training=_training(facts),
        retrieval=_table(facts.get("retrieval") or [])
        if facts.get("retrieval")
        else "Not measured.",
        bits=", ".join(f"{value:.3f} in windows of {n}" for n, value in bits.items())
        or "not measured",
    )
