"""What the answers of each route hold; tests/docs/test_answers.py asks the applications.

A field's name is its path: `choices[].text` is of each entry of the list `choices`. Of an "object
by ..." the names within it are not known beforehand.
"""

from __future__ import annotations

from tests.docs.answer_parts import (
    CHAT_LOGPROBS,
    CHUNK_END,
    COMPLETION_LOGPROBS,
    ENDING,
    INDEX,
    LISTED,
    LOOK,
    MODEL,
    OPEN_ENDING,
    OWN,
    SPARSITY,
    USAGE,
    head,
)

_TEXT = "A text, of the media type {}."

ANSWERS = {
    ("POST", "/v1/completions"): {
        "Answer": {
            **head("text_completion"),
            **INDEX,
            "choices[].text": ("string", "the continuation; with `echo` behind its prompt"),
            **ENDING,
            **COMPLETION_LOGPROBS,
            **OWN,
            **USAGE,
            **SPARSITY,
        },
        "A chunk, with `stream`": {
            **head("text_completion"),
            **INDEX,
            "choices[].text": ("string", "a piece"),
            **OPEN_ENDING,
            **COMPLETION_LOGPROBS,
            **LOOK,
            **OWN,
            **CHUNK_END,
        },
    },
    ("POST", "/v1/chat/completions"): {
        "Answer": {
            **head("chat.completion"),
            **INDEX,
            "choices[].message.role": ("string", "`assistant`"),
            "choices[].message.content": ("string", "the answer"),
            "choices[].message.refusal": ("null", ""),
            **ENDING,
            **CHAT_LOGPROBS,
            **OWN,
            **USAGE,
            **SPARSITY,
        },
        "A chunk, with `stream`": {
            **head("chat.completion.chunk"),
            **INDEX,
            "choices[].delta.role": ("string", "`assistant`, on a choice's first chunk"),
            "choices[].delta.content": ("string", "a piece"),
            **OPEN_ENDING,
            **CHAT_LOGPROBS,
            **LOOK,
            **OWN,
            **CHUNK_END,
        },
    },
    ("GET", "/v1/models"): {
        "Answer": {
            "object": ("string", "`list`"),
            "data": ("array", "one model"),
            **{f"data[].{name}": told for name, told in MODEL.items()},
        }
    },
    ("GET", "/v1/models/{name}"): {"Answer": MODEL},
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
        "Ray": "Under Ray Serve it is about all replicas: 200 while one lives, the oldest "
        "heartbeat, and `replicas`, how many live.",
    },
    ("GET", "/version"): {"Answer": {"version": ("string", "Saccade's")}},
    ("GET", "/metrics"): {
        "Answer": _TEXT.format("`text/plain; version=...`") + " See [metrics.md](metrics.md). "
        "Under Ray Serve all replicas' series, else this process's."
    },
    ("GET", "/explorer"): {"Answer": _TEXT.format("`text/html`")},
    ("GET", "/explorer/{name}"): {"Answer": "A file of the page, with its media type, or 404."},
    ("POST", "/v1/embeddings"): {
        "Answer": {
            **LISTED,
            "data[].object": ("string", "`embedding`"),
            "data[].index": ("integer", "of the text"),
            "data[].embedding": ("array or string", "a string where `base64` is asked for"),
            "data[].embedding[]": ("number", ""),
        }
    },
    ("POST", "/classify"): {
        "Answer": {
            **LISTED,
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

QUERIES = {
    ("GET", "/v1/patterns/auto"): [
        ("`task`", "one of `tasks` of `/v1/patterns`", "required", "what the pattern is for"),
        ("`tokens`", "a number", "4096", "how long the texts are"),
        ("`rows`, `cols`", "numbers", "", "sides of a grid; `image` and `video` need them"),
        ("`causal`", "`true` or `false`", "true", "whether queries see keys behind them"),
    ],
    ("GET", "/v1/sample"): [
        ("`tokens`", "64 to 32768, and what the model takes less 256", "8192", "of the document"),
        ("`facts`", "1 to 16", "3", "planted in it"),
        ("`seed`", "0 to 2^31 - 1", "0", "the same seed makes the same document"),
    ],
}
