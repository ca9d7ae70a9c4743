"""Fields that the answers of several routes have in common; see tests/docs/answers.py."""

from __future__ import annotations

HEAD = {
    "id": ("string", "the request's, new each time"),
    "object": ("string", "`{}`"),
    "created": ("integer", "Unix time, seconds"),
    "model": ("string", "the served model's name"),
    "system_fingerprint": ("string", "Saccade's version"),
}
USAGE = {
    "usage.prompt_tokens": ("integer", "over all prompts"),
    "usage.completion_tokens": ("integer", "over all choices"),
    "usage.total_tokens": ("integer", "both"),
    "usage.prompt_tokens_details.cached_tokens": (
        "integer",
        "of the prompts', found in the [prefix cache](operations.md#the-prefix-cache)",
    ),
}
SPARSITY = {
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
ENDING = {
    "choices[].finish_reason": (
        "string",
        "`stop`: the model's end, or a stop text or token; `length`: the budget",
    ),
    "choices[].stop_reason": (
        "string, integer or null",
        "the stop text or token that matched",
    ),
}
OPEN_ENDING = {
    "choices[].finish_reason": ("string or null", "null but on the choice's last chunk"),
    "choices[].stop_reason": ENDING["choices[].stop_reason"],
}
INDEX = {"choices[].index": ("integer", "choice c of prompt p is p x `n` + c")}
OWN = {
    "choices[].sparsity": (
        "object by field",
        "where there are several choices, each has its own; the answer's are means, of "
        "`coverage_p5` the least, of `fallbacks` sums",
    )
}
COMPLETION_LOGPROBS = {
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


CHAT_LOGPROBS = {
    "choices[].logprobs": ("object or null", "null without `logprobs`"),
    "choices[].logprobs.content": ("array", "an entry for each token"),
    **_entry("choices[].logprobs.content"),
    "choices[].logprobs.content[].top_logprobs": ("array", "the best tokens"),
    **_entry("choices[].logprobs.content[].top_logprobs"),
    "choices[].logprobs.refusal": ("null", ""),
}
LOOK = {
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
CHUNK_END = {
    "choices": ("array", "empty on the last chunk with `include_usage`"),
    "usage.prompt_tokens": ("integer", "with `include_usage` on a last chunk without choices"),
    "usage.completion_tokens": ("integer", "with `continuous_usage_stats` on every chunk"),
    "usage.total_tokens": ("integer", ""),
    "usage.prompt_tokens_details.cached_tokens": ("integer", ""),
    "usage": ("object or null", "null on the chunks before, with `include_usage`"),
    "sparsity": ("object by field", "what a whole answer has; on the last chunk"),
}


def head(kind):
    return {name: (type_, text.format(kind)) for name, (type_, text) in HEAD.items()}


MODEL = {
    "id": ("string", "the name in requests"),
    "object": ("string", "`model`"),
    "created": ("integer", "when the service started, Unix time, seconds"),
    "owned_by": ("string", "`saccade`"),
    "root": ("string", "the same as `id`"),
    "parent": ("null", ""),
    "max_model_len": ("integer", "most tokens of a prompt and its answer"),
}
LISTED = {
    "object": ("string", "`list`"),
    "model": ("string", "the served model's name"),
    "usage.prompt_tokens": ("integer", "over all texts"),
    "usage.total_tokens": ("integer", "the same"),
}

PARTS = {"an answer's sparsity": SPARSITY, "what a token attended to": LOOK}
"""Fields that several tables have, by the heading under which they are told once."""
