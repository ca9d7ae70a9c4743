"""What the fields of requests mean; types, defaults and limits come from the schemas.

By the class that declares a field. In braces stands a limit of the configuration. A field of
`sparsity` that is not here has the configuration's description.
"""

from __future__ import annotations

MEANINGS = {
    "GenerationRequest.model": "the served model's name, as `/v1/models` lists it",
    "GenerationRequest.n": "choices a prompt; at most {n}",
    "GenerationRequest.stream": "answer with server-sent events, a chunk for each piece of text",
    "GenerationRequest.stream_options": "only with `stream`",
    "StreamOptions.include_usage": "a last chunk without choices carries `usage` and `sparsity`",
    "StreamOptions.continuous_usage_stats": "every chunk carries `usage`",
    "GenerationRequest.max_tokens": "most new tokens a choice. By default 16 for a completion "
    "(OpenAI's), and for a chat all that the model's limit leaves. 0 only with `echo`",
    "GenerationRequest.max_completion_tokens": "the same under its newer name; it goes first",
    "GenerationRequest.min_tokens": "no end and no stop before so many new tokens",
    "GenerationRequest.temperature": "0 is greedy; by default what the checkpoint's "
    "generation_config.json proposes, else 1",
    "GenerationRequest.top_p": "sample from the most probable tokens that make so much; by default "
    "the checkpoint's proposal, else 1",
    "GenerationRequest.top_k": "sample from so many tokens; 0 and -1 are off; by default the "
    "checkpoint's proposal, else off",
    "GenerationRequest.min_p": "leave out tokens less probable than this share of the best one's; "
    "by default the checkpoint's proposal, else 0",
    "GenerationRequest.repetition_penalty": "divides the logits of tokens that have been; 1 is "
    "off; by default the checkpoint's proposal, else 1",
    "GenerationRequest.presence_penalty": "subtracted from the logits of tokens that the answer "
    "has",
    "GenerationRequest.frequency_penalty": "the same for each time that a token has been",
    "GenerationRequest.seed": "the same seed and request give the same answer on the same machine",
    "GenerationRequest.stop": "texts that end a choice; at most {stop}, of at most {stop_chars} "
    "characters",
    "GenerationRequest.stop_token_ids": "tokens that end a choice; at most {stop_token_ids}",
    "GenerationRequest.include_stop_str_in_output": "keep the stop text in the answer",
    "GenerationRequest.ignore_eos": "go on behind the model's own end",
    "GenerationRequest.skip_special_tokens": "leave special tokens out of the text",
    "GenerationRequest.cache_salt": "requests of another one share nothing of the prefix cache "
    "with this, so that no time to first token tells of its prompt",
    "GenerationRequest.logit_bias": "added to the logits of tokens, by id; -100 to 100, at most "
    "{logit_bias} entries",
    "GenerationRequest.priority": "requests of a lower one go first, of the same in the order that "
    "they come; under [brownout](operations.md#brownout) lower ones are cut later. -{priority} to "
    "{priority}",
    "CompletionRequest.prompt": "at most {prompts}; ids lie within the vocabulary; prompts times "
    "`n` at most {choices}",
    "CompletionRequest.echo": "the text begins with the prompt; with `logprobs` its "
    "log-probabilities, too, of which prompt tokens x (rivals + 1) x `n` may be at most "
    "{echo_logprobs}",
    "CompletionRequest.logprobs": "log-probabilities of each token and of so many rivals; at most "
    "{logprobs}",
    "CompletionRequest.best_of": "must equal `n`: every choice is returned",
    "CompletionRequest.add_special_tokens": "begin the prompt as the tokenizer does, with its "
    "begin-of-text token, say",
    "ChatRequest.messages": "at most {messages}",
    "Message.role": "`developer` is read as `system`",
    "Message.content": 'a text, or a list of parts `{{"type": "text", "text": ...}}`, which become '
    "lines",
    "ChatRequest.logprobs": "log-probabilities of each token",
    "ChatRequest.top_logprobs": "and of so many rivals; only with `logprobs`; at most {logprobs}",
    "ChatRequest.add_generation_prompt": "must be true",
    "SparsityRequest.policy": "`dynamic`: each step chooses its keys; `fixed`: a pattern does; "
    "`dense`: all are read; `auto` is `dynamic` as yet",
    "SparsityRequest.coverage": "more keys are read until they carry so much of the attention "
    "mass, as estimated",
    "SparsityRequest.min_keys": "a key that carries about 1 / `min_keys` of the mass is read for "
    "certain; where few keys carry it, fewer than `min_keys` are read. 16 sinks and the last 64 to "
    "127 keys count",
    "SparsityRequest.max_keys": "about the most keys that a query and KV head reads: shares are "
    "estimates, and some per cent more may be read. Where attention is spread, at least 512 are "
    "drawn. Given alone, `min_keys` moves along",
    "SparsityRequest.sampled": "keys are drawn by their mass, and each stands for as many as it "
    "should; `false` is plain top-k",
    "SparsityRequest.dense_layers": "so many of the model's first layers attend densely",
    "SparsityRequest.min_coverage": "estimated coverage under which the request goes on densely; 0 "
    "is never. It is a mean over heads, dense layers with 1: choose it by `saccade eval`",
    "SparsityRequest.pattern": "keys of the policy `fixed`, in the [language of "
    "patterns](patterns.md); also what a failed selection falls back to, so that under `dynamic` "
    "every query must see the key before it. The parser takes 256 characters",
    "SparsityRequest.prefill": "how the prompt attends up to its last 128 tokens; by default as "
    "`policy` says",
    "SparsityRequest.prefill_coverage": "where it attends dynamically, 1 less what of a query's "
    "attention mass may be lost; 1 reads everything; by default as `coverage`",
    "SparsityRequest.explain": "`true`: the answer's `sparsity.attended` names the passages of the "
    'prompt that its tokens attended to; `"tokens"`, of a stream: each chunk\'s choice carries '
    "`attended`, what its token attended to",
    "SparsityRequest.explain_layers": "numbers of the layers that this is about; by default all",
    "SparsityRequest.explain_heads": "numbers of the query heads; by default all",
    "ViewRequest.spec": "a pattern or a preset's name; the parser takes 256 characters",
    "ViewRequest.length": "tokens among which it is looked at",
    "ViewRequest.causal": "in place of what the pattern says",
    "ViewRequest.rows": "first query, and one behind the last; by default all",
    "ViewRequest.columns": "likewise of the keys",
    "ViewRequest.cells": "cells of a side that are drawn, at most; of 64 tokens at most",
    "TokenizeRequest.model": "must be the served one's name where it is given",
    "TokenizeRequest.prompt": "a text; give either it or `messages`",
    "TokenizeRequest.messages": "a chat, as of `/v1/chat/completions`",
    "TokenizeRequest.add_special_tokens": "of a prompt",
    "TokenizeRequest.add_generation_prompt": "of a chat: end where the assistant begins",
    "TokenizeRequest.return_token_strs": "also say the text of each token",
    "TokenizeRequest.return_offsets": "also say where each token stands",
    "DetokenizeRequest.model": "must be the served one's name where it is given",
    "DetokenizeRequest.tokens": "ids within the vocabulary",
    "InputRequest.model": "must be the served one's name where it is given",
    "InputRequest.input": "at most {prompts} texts, none empty; ids are taken as they are, special "
    "ones included",
    "InputRequest.global_tokens": "Longformer: places of the tokens that see all and are seen by "
    "all; by default the first for embeddings and classes",
    "EmbeddingRequest.encoding_format": "`base64`: little-endian float32, as OpenAI's client asks",
    "EmbeddingRequest.dimensions": "must be the model's own where it is given",
    "FillRequest.model": "must be the served one's name where it is given",
    "FillRequest.inputs": "each with at least one mask token; at most {prompts}",
    "FillRequest.global_tokens": "Longformer: as above; by default none",
    "FillRequest.parameters": "",
    "FillParameters.top_k": "tokens for each masked place",
    "FillParameters.targets": "only these tokens, or the first ones of these texts",
    "QuestionRequest.model": "must be the served one's name where it is given",
    "QuestionRequest.inputs": "its fields may also stand beside it",
    "QuestionInputs.question": "",
    "QuestionInputs.context": "must fit the model with the question; it is not cut into parts",
    "QuestionRequest.parameters": "",
    "QuestionParameters.top_k": "answers, best first",
    "QuestionParameters.max_answer_len": "tokens of an answer, at most",
    "QuestionParameters.handle_impossible_answer": "an empty answer may be the best",
}

_PROMPTS = "string, list of strings, list of token ids, or list of such lists"
KINDS = {
    "CompletionRequest.prompt": _PROMPTS,
    "InputRequest.input": _PROMPTS,
    "GenerationRequest.stop": "string or list of strings",
    "FillRequest.inputs": "string or list of strings",
    "Message.content": "string or list of objects",
    "DetokenizeRequest.tokens": "list of integers",
}
"""Types of fields whose validators take more than their schema says."""

HIDDEN = {"FillRequest.several"}
"""Fields that a request's own form sets."""
