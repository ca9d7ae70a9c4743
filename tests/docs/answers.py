"""What the answers of each route hold; tests/docs/test_answers.py asks the applications.

A field's name is its path: `choices[].text` is of each entry of the list `choices`. Of an "object
by ..." the names within it are not known beforehand.
"""

from __future__ import annotations

_HEAD = {
    "id": ("string", "the request's, new each time"),
    "object": ("string", "`{}`"),
    "created": ("integer", "Unix time, seconds"),
    "model": ("string", "the served model's name"),
    "system_fingerprint": ("string", "Saccade's version"),
}
_USAGE = {
    "usage.prompt_tokens": ("integer", "over all prompts"),
    "usage.completion_tokens": ("integer", "over all choices"),
    "usage.total_tokens": ("integer", "both"),
}
_SPARSITY = {
    "sparsity.policy": ("string", "as asked for: `dynamic`, `fixed` or `dense`"),
    "sparsity.density": (
        "number",
        "keys read over keys that could be read, mean over layers, KV heads and tokens; 1 is "
        "everything",
    ),
    "sparsity.coverage": (
        "number or null",
        "share of the attention mass on the keys read, as estimated, mean over layers and heads; "
        "null: unknown",
    ),
    "sparsity.coverage_p5": (
        "number or null",
        "its 5th percentile over layers and heads: the most diffuse head",
    ),
    "sparsity.keys_attended": ("number", "keys read a token, mean over layers and KV heads"),
    "sparsity.fallbacks": (
        "object by reason",
        "tokens that did not follow the dynamic policy, the prompt's included; see "
        "[Fallbacks](sparsity.md#fallbacks)",
    ),
    "sparsity.prefill": (
        "object or null",
        "the same of the prompt up to its last 128 tokens; null: it has no more",
    ),
    "sparsity.prefill.policy": ("string", "how the prompt was asked to attend"),
    "sparsity.prefill.density": ("number", "as above"),
    "sparsity.prefill.coverage": ("number or null", "null for a pattern"),
    "sparsity.attended": ("array", "only with `explain`: passages of the prompt, most mass first"),
    "sparsity.attended[].start": ("integer", "position of its first token"),
    "sparsity.attended[].end": ("integer", "of the token behind its last"),
    "sparsity.attended[].text": ("string", "what it says"),
    "sparsity.attended[].mass": ("number", "its keys' weights, mean over tokens and heads"),
}
_ENDING = {
    "choices[].finish_reason": (
        "string",
        "`stop`: the model's end, or a stop text or token; `length`: the budget",
    ),
    "choices[].stop_reason": (
        "string, integer or null",
        "the stop text or token that matched",
    ),
}
_OPEN_ENDING = {
    "choices[].finish_reason": ("string or null", "null but on the choice's last chunk"),
    "choices[].stop_reason": _ENDING["choices[].stop_reason"],
}
_INDEX = {"choices[].index": ("integer", "choice c of prompt p is p x `n` + c")}
_OWN = {
    "choices[].sparsity": (
        "object by field",
        "where there are several choices, each has its own; the answer's are means, of "
        "`coverage_p5` the least, of `fallbacks` sums",
    )
}
_COMPLETION_LOGPROBS = {
    "choices[].logprobs": ("object or null", "null without `logprobs`"),
    "choices[].logprobs.tokens": ("array", ""),
    "choices[].logprobs.tokens[]": ("string", "the token's text"),
    "choices[].logprobs.token_logprobs": ("array", ""),
    "choices[].logprobs.token_logprobs[]": (
        "number or null",
        "natural logarithm; null for an echo's first token",
    ),
    "choices[].logprobs.top_logprobs": ("array", ""),
    "choices[].logprobs.top_logprobs[]": (
        "null, or object by token",
        "the best tokens', and the token's own",
    ),
    "choices[].logprobs.text_offset": ("array", ""),
    "choices[].logprobs.text_offset[]": ("integer", "where the token begins in the text"),
}


def _entry(path):
    return {
        f"{path}[].token": ("string", "the token's text"),
        f"{path}[].logprob": ("number", "natural logarithm, at least -9999"),
        f"{path}[].bytes": ("array", ""),
        f"{path}[].bytes[]": ("integer", "its text in UTF-8"),
    }


_CHAT_LOGPROBS = {
    "choices[].logprobs": ("object or null", "null without `logprobs`"),
    "choices[].logprobs.content": ("array", "an entry for each token"),
    **_entry("choices[].logprobs.content"),
    "choices[].logprobs.content[].top_logprobs": ("array", "the best tokens"),
    **_entry("choices[].logprobs.content[].top_logprobs"),
    "choices[].logprobs.refusal": ("null", ""),
}
_LOOK = {
    "choices[].attended": (
        "object",
        'only with `"explain": "tokens"`: what the chunk\'s token attended to',
    ),
    "choices[].attended.visible": ("integer", "keys that there were"),
    "choices[].attended.density": ("number", "mean over all layers"),
    "choices[].attended.coverage": ("number", "mean over all layers and heads"),
    "choices[].attended.heads": ("array", "those that were asked about"),
    "choices[].attended.heads[].layer": ("integer", ""),
    "choices[].attended.heads[].head": ("integer", "of the query heads"),
    "choices[].attended.heads[].keys": ("integer", "keys that its KV head read"),
    "choices[].attended.heads[].coverage": ("number", "as estimated; 1: dense, 0: unknown"),
    "choices[].attended.heads[].positions": ("array", ""),
    "choices[].attended.heads[].positions[]": (
        "integer",
        "its heaviest keys: 16, fewer where more than 256 heads are asked about",
    ),
    "choices[].attended.heads[].weights": ("array", ""),
    "choices[].attended.heads[].weights[]": ("number", "theirs; all of the head's make 1"),
}
_CHUNK_END = {
    "choices": ("array", "empty on the last chunk with `include_usage`"),
    "usage.prompt_tokens": ("integer", "with `include_usage` on a last chunk without choices"),
    "usage.completion_tokens": ("integer", "with `continuous_usage_stats` on every chunk"),
    "usage.total_tokens": ("integer", ""),
    "usage": ("object or null", "null on the chunks before, with `include_usage`"),
    "sparsity": ("object by field", "what a whole answer has; on the last chunk"),
}


def _head(kind):
    return {name: (type_, text.format(kind)) for name, (type_, text) in _HEAD.items()}


_MODEL = {
    "id": ("string", "the name in requests"),
    "object": ("string", "`model`"),
    "created": ("integer", "when the service started, Unix time, seconds"),
    "owned_by": ("string", "`saccade`"),
    "root": ("string", "the same as `id`"),
    "parent": ("null", ""),
    "max_model_len": ("integer", "most tokens of a prompt and its answer"),
}
_LISTED = {
    "object": ("string", "`list`"),
    "model": ("string", "the served model's name"),
    "usage.prompt_tokens": ("integer", "over all texts"),
    "usage.total_tokens": ("integer", "the same"),
}
_TEXT = "A text, of the media type {}."

ANSWERS = {
    ("POST", "/v1/completions"): {
        "Answer": {
            **_head("text_completion"),
            **_INDEX,
            "choices[].text": ("string", "the continuation; with `echo` behind its prompt"),
            **_ENDING,
            **_COMPLETION_LOGPROBS,
            **_OWN,
            **_USAGE,
            **_SPARSITY,
        },
        "A chunk, with `stream`": {
            **_head("text_completion"),
            **_INDEX,
            "choices[].text": ("string", "a piece"),
            **_OPEN_ENDING,
            **_COMPLETION_LOGPROBS,
            **_LOOK,
            **_OWN,
            **_CHUNK_END,
        },
    },
    ("POST", "/v1/chat/completions"): {
        "Answer": {
            **_head("chat.completion"),
            **_INDEX,
            "choices[].message.role": ("string", "`assistant`"),
            "choices[].message.content": ("string", "the answer"),
            "choices[].message.refusal": ("null", ""),
            **_ENDING,
            **_CHAT_LOGPROBS,
            **_OWN,
            **_USAGE,
            **_SPARSITY,
        },
        "A chunk, with `stream`": {
            **_head("chat.completion.chunk"),
            **_INDEX,
            "choices[].delta.role": ("string", "`assistant`, on a choice's first chunk"),
            "choices[].delta.content": ("string", "a piece"),
            **_OPEN_ENDING,
            **_CHAT_LOGPROBS,
            **_LOOK,
            **_OWN,
            **_CHUNK_END,
        },
    },
    ("GET", "/v1/models"): {
        "Answer": {
            "object": ("string", "`list`"),
            "data": ("array", "one model"),
            **{f"data[].{name}": told for name, told in _MODEL.items()},
        }
    },
    ("GET", "/v1/models/{name}"): {"Answer": _MODEL},
    ("GET", "/v1/patterns"): {
        "Answer": {
            "object": ("string", "`patterns`"),
            "primitives[].name": ("string", ""),
            "primitives[].form": ("string", "how it is spelled"),
            "primitives[].description": ("string", ""),
            "primitives[].details": ("string", ""),
            "primitives[].growth": ("string", "of its pairs, as a letter of the class"),
            "primitives[].example": ("string", ""),
            "primitives[].parameters": ("array", ""),
            "primitives[].parameters[].name": ("string", ""),
            "primitives[].parameters[].letter": ("string", "in `form`"),
            "primitives[].parameters[].least": ("integer", ""),
            "primitives[].parameters[].most": ("integer", ""),
            "primitives[].parameters[].example": ("integer", ""),
            "operators[].symbol": ("string", ""),
            "operators[].name": ("string", ""),
            "operators[].description": ("string", ""),
            "presets[].name": ("string", ""),
            "presets[].spec": ("string", "what it stands for"),
            "presets[].causal": ("boolean", ""),
            "presets[].complexity": ("string", ""),
            "presets[].length": ("integer", "tokens of which it leaves out most pairs"),
            "presets[].primitives[].name": ("string", ""),
            "presets[].primitives[].spec": ("string", ""),
            "presets[].primitives[].numbers": ("array", ""),
            "presets[].primitives[].numbers[]": ("integer", ""),
            "tasks[]": ("string", "of `/v1/patterns/auto`"),
            "very_long": ("integer", "tokens from which `auto` chooses for length"),
            "limits.characters": ("integer", "of a pattern"),
            "limits.primitives": ("integer", ""),
            "limits.parentheses": ("integer", "one within another"),
        }
    },
    ("POST", "/v1/patterns"): {
        "Answer": {
            "object": ("string", "`pattern.view`"),
            "spec": ("string", "the pattern, spelled out"),
            "causal": ("boolean", ""),
            "length": ("integer", "tokens"),
            "primitives[].name": ("string", ""),
            "primitives[].spec": ("string", ""),
            "primitives[].numbers[]": ("integer", ""),
            "terms": (
                "array or null",
                "the primitives from left to right; null where there are parentheses",
            ),
            "terms[].operator": ("string", "before it: `+` or `&`, of the first empty"),
            "terms[].name": ("string", ""),
            "terms[].spec": ("string", ""),
            "terms[].numbers[]": ("integer", ""),
            "complexity": ("string", "how the work grows"),
            "formula": ("string", "the same with the pattern's numbers"),
            "recognised": ("string or null", "the published pattern that it is"),
            "keeps_previous": ("boolean", "whether every query sees the key before it"),
            "pairs": ("integer", "of a query and a key that it sees"),
            "visible": ("integer", "pairs that there are"),
            "density": ("number", "pairs over visible"),
            "sparsity": ("number", "1 less that"),
            "keys_mean": ("number", "keys a query"),
            "keys_most": ("number", "of groups of queries"),
            "keys_per_query.step": ("integer", "queries of a group"),
            "keys_per_query.values[]": ("number", "keys a query, mean over each group"),
            "mask.rows[]": ("integer", "first query drawn, and one behind the last"),
            "mask.columns[]": ("integer", "likewise of the keys"),
            "mask.step": ("integer", "tokens of a cell's side"),
            "mask.shape[]": ("integer", "cells"),
            "mask.primitive": (
                "string",
                "base64, a byte a cell: the number of the primitive that lit most of its pairs, "
                "from 1; 0 for none",
            ),
            "mask.share": ("string", "base64, a byte a cell: what of it is seen; 255 is all"),
            "mask.lit": (
                "string",
                "base64, two bytes a cell, little end first: a bit for each primitive that lit any",
            ),
            "summary": ("string", "the mask in words"),
        }
    },
    ("GET", "/v1/patterns/auto"): {
        "Answer": {
            "object": ("string", "`pattern`"),
            "spec": ("string", "what suits the task"),
        }
    },
    ("GET", "/v1/sample"): {
        "Answer": {
            "object": ("string", "`sample`"),
            "text": ("string", "the document"),
            "facts[].key": ("string", "what the fact is about"),
            "facts[].value": ("string", "a number"),
            "facts[].start": ("integer", "where the fact stands, in characters"),
            "facts[].end": ("integer", "behind it"),
            "questions[]": ("string", "one for each fact"),
        }
    },
    ("POST", "/tokenize"): {
        "Answer": {
            "count": ("integer", "tokens"),
            "max_model_len": ("integer", "most tokens of a prompt and its answer"),
            "tokens[]": ("integer", "ids"),
            "token_strs[]": ("string", "with `return_token_strs`"),
            "text": ("string", "with `return_offsets`: what the offsets are of"),
            "offsets[][]": ("integer", "first character and one behind the last, in code points"),
        }
    },
    ("POST", "/detokenize"): {
        "Answer": {"prompt": ("string", "the text, special tokens included")}
    },
    ("GET", "/health"): {
        "Answer": {
            "status": ("string", "`ok`; `degraded`: it serves, but through a fallback"),
            "reason": ("string or null", "one sentence where it is degraded"),
            "heartbeat_age_seconds": ("number", "since the engine's loop last turned"),
        },
        "Dead": "503 with an error of the code `engine_dead` when the engine's loop does not turn.",
    },
    ("GET", "/version"): {"Answer": {"version": ("string", "Saccade's")}},
    ("GET", "/metrics"): {
        "Answer": _TEXT.format("`text/plain; version=...`") + " See [metrics.md](metrics.md)."
    },
    ("GET", "/explorer"): {"Answer": _TEXT.format("`text/html`")},
    ("GET", "/explorer/{name}"): {"Answer": "A file of the page, with its media type, or 404."},
    ("POST", "/v1/embeddings"): {
        "Answer": {
            **_LISTED,
            "data[].object": ("string", "`embedding`"),
            "data[].index": ("integer", "of the text"),
            "data[].embedding": ("array or string", "a string where `base64` is asked for"),
            "data[].embedding[]": ("number", ""),
        }
    },
    ("POST", "/classify"): {
        "Answer": {
            **_LISTED,
            "id": ("string", "new each time"),
            "created": ("integer", "Unix time, seconds"),
            "data[].index": ("integer", "of the text"),
            "data[].label": ("string", "the most probable"),
            "data[].probs": ("array", "one for each label; a regression's numbers as they are"),
            "data[].probs[]": ("number", ""),
            "data[].num_classes": ("integer", ""),
        }
    },
    ("POST", "/fill-mask"): {
        "Answer: a list; of lists where there are several masks, or several texts": {
            "[].score": ("number", "probability"),
            "[].token": ("integer", "its id"),
            "[].token_str": ("string", "its text"),
            "[].sequence": ("string", "the text with it"),
        }
    },
    ("POST", "/question-answering"): {
        "Answer: a list where `top_k` is more than 1": {
            "score": ("number", "probability"),
            "start": ("integer", "first character in the context"),
            "end": ("integer", "behind the last"),
            "answer": ("string", "what stands there"),
        }
    },
}

PARTS = {"an answer's sparsity": _SPARSITY, "what a token attended to": _LOOK}
"""Fields that several tables have, by the heading under which they are told once."""

QUERIES = {
    ("GET", "/v1/patterns/auto"): [
        ("`task`", "one of `tasks` of `/v1/patterns`", "required", "what the pattern is for"),
        ("`tokens`", "a number", "4096", "how long the texts are"),
        ("`rows`, `cols`", "numbers", "", "sides of a grid, for images"),
        ("`causal`", "`true` or `false`", "true", "whether queries see keys behind them"),
    ],
    ("GET", "/v1/sample"): [
        ("`tokens`", "64 to 32768, and what the model takes less 256", "8192", "of the document"),
        ("`facts`", "1 to 16", "3", "planted in it"),
        ("`seed`", "0 to 2^31 - 1", "0", "the same seed makes the same document"),
    ],
}
