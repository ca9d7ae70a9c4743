"""What the HTTP application and the engine say to each other; pure Python, no torch.

The application fills `SamplingParams` and `SparsityParams`, the engine answers with `Delta`s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]
PolicyName = Literal["dynamic", "fixed", "dense"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends.

    Attributes:
        max_tokens: most new tokens a choice.
        temperature: 0 is greedy.
        top_k: 0 is off.
        stop: strings that end a choice.
        stop_token_ids: tokens that end a choice.
        include_stop_str_in_output: keep the stop string at the end of the text.
        logprobs: None for none; k >= 0 for the sampled token's and those of the k best.
        prompt_logprobs: the same for the prompt's tokens.
        logit_bias: pairs of token id and a number added to its logit.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    skip_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class Explain:
    """What an answer tells of the keys that its tokens attended to.

    Attributes:
        tokens: whether it tells so of each token, as it comes; else of all together, at the end.
        layers: numbers of the layers that count; None: all.
        heads: numbers of their query heads that count; None: all.
    """

    tokens: bool
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Head:
    """What one head of one layer attended to for one token.

    Attributes:
        layer: number of the layer.
        head: number of the query head.
        keys: keys that its KV head read.
        coverage: share of the attention mass on them, as estimated; 1 where dense, 0: unknown.
        positions: of the keys of the greatest weights.
        weights: their weights in the sum over values; all of the head's make 1.
    """

    layer: int
    head: int
    keys: int
    coverage: float
    positions: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class TokenLook:
    """What was attended to for one token: by the token before it, which it is sampled from.

    Attributes:
        visible: keys that there were.
        density: keys read over keys visible, mean over all layers.
        coverage: mean over all layers and heads.
        heads: those that are to be explained.
    """

    visible: int
    density: float
    coverage: float
    heads: tuple[Head, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """A passage of the prompt that an answer's tokens attended to.

    Attributes:
        start: its first token's position.
        end: of the one behind its last.
        text: what it says.
        mass: its keys' weights, mean over the answer's tokens and the heads that count.
    """

    start: int
    end: int
    text: str
    mass: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SparsityParams:
    """Where one request's attention looks; resolved, so that every field has a value.

    Attributes:
        coverage: share of the attention mass that the selected keys should carry, 0 to 1.
        min_keys: how fine a sample is at the least, see `kernels.policy.Dynamic`.
        max_keys: about the most keys a query row and KV head.
        sampled: whether keys are drawn, so that they stand for the others; else plain top-k.
        dense_layers: so many of the model's first layers attend densely.
        min_coverage: estimated coverage under which the request falls back to dense; 0 is never.
        pattern: the fixed pattern, "sinks:16+window:1024"; also where a kernel error falls back to.
        allow_brownout: under overload the budget of this request may be cut.
        prefill: how the prompt up to its tail attends.
        prefill_coverage: see `kernels.policy.Pages`, where the prompt attends dynamically.
        explain: what the answer tells of where its tokens looked; None: nothing.
    """

    policy: PolicyName
    coverage: float
    min_keys: int
    max_keys: int
    sampled: bool
    dense_layers: int
    min_coverage: float
    pattern: str
    allow_brownout: bool
    prefill: PolicyName = "dense"
    prefill_coverage: float = 0.98
    explain: Explain | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, its log-probability (natural log) and its best rivals'.

    Attributes:
        token: text of this token alone.
        logprob: None for a prompt's first token, which nothing predicts.
        top: (id, text, logprob), best first.
    """

    token_id: int
    token: str
    logprob: float | None
    top: tuple[tuple[int, str, float], ...]


@dataclass(frozen=True, slots=True)
class PrefillReport:
    """What the attention of a prompt did, but for its tail.

    Attributes:
        policy: how it was asked to attend.
        density: keys read over keys visible, mean over layers, KV heads and tokens.
        coverage: attention mass on the keys read, mean over layers and heads; None: unknown.
    """

    policy: str
    density: float
    coverage: float | None


@dataclass(frozen=True, slots=True)
class SparsityReport:
    """What one choice's attention did; see the design for density and coverage.

    Attributes:
        policy: the policy that the choice ran under.
        density: keys attended over keys visible, mean over layers, KV heads and decode rows.
        coverage: attention mass on the attended keys, mean over layers and heads; None: unknown.
        coverage_p5: its 5th percentile.
        keys_attended: keys a row, mean over layers and KV heads.
        fallbacks: tokens that went elsewhere, by reason.
        prefill: what the prompt's tokens before its tail did; None: there were none.
        attended: passages of the prompt, most mass first; None: nobody asked.
    """

    policy: str
    density: float
    coverage: float | None
    coverage_p5: float | None
    keys_attended: float
    fallbacks: dict[str, int]
    prefill: PrefillReport | None = None
    attended: tuple[Span, ...] | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """One event of one choice.

    Attributes:
        index: number of the choice, 0 <= index < n.
        text: new text, may be empty.
        token_ids: new tokens.
        logprobs: one for each new token, where asked for.
        finish_reason: set on the choice's last delta and on no other.
        stop_reason: the stop string or token id that matched.
        error: a sentence, with finish_reason "error".
        sparsity: on the last delta.
        prompt_logprobs: on the first delta of choice 0, where asked for.
        cached_tokens: of the prompt, found in the prefix cache; on the first delta of choice 0.
        look: what its token attended to, where asked for.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None
    error: str | None = None
    sparsity: SparsityReport | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    cached_tokens: int = 0
    look: TokenLook | None = None


@dataclass(frozen=True, slots=True)
class Health:
    """Whether the engine's step loop advances.

    Attributes:
        alive: the loop's thread runs and beats.
        heartbeat_age: seconds since its last beat.
        degraded: it serves, but through a fallback (a kernel that failed, say).
        reason: one sentence where it is dead or degraded.
    """

    alive: bool
    heartbeat_age: float
    degraded: bool = False
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """What an engine has before it and how busy it is, to decide how many replicas are needed.

    Attributes:
        queued_tokens: prompt tokens yet to be prefilled, of waiting and running requests; what the
            prefix cache has of those that wait is none of them.
        queued_prompts: sequences that they belong to.
        kv_usage: share of the KV pages in use, 0 to 1; what the cache keeps for later is not.
        slots: sequences that run over the most that may, 0 to 1.
        prefill_seconds: time since the start that went into steps with prompt tokens.
    """

    queued_tokens: int = 0
    queued_prompts: int = 0
    kv_usage: float = 0.0
    slots: float = 0.0
    prefill_seconds: float = 0.0
