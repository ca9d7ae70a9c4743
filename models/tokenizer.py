"""Text to tokens and back, whole or as the tokens arrive."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from models.chat_template import ChatTemplate
from models.errors import CheckpointError, ModelError, TemplateError
from models.fields import Fields

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that are no character, or not yet."""

# A character has at most four bytes and a token at least one, so bytes that wait for the rest of
# their character lie in the last three tokens.
_KEPT = 4
_LONGEST = 16

_SPECIAL_NAMES = (
    *("bos_token", "eos_token", "unk_token", "pad_token"),
    *("sep_token", "cls_token", "mask_token"),
)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two texts as tokens.

    Attributes:
        ids: all tokens, special ones included.
        types: which text each belongs to, as the model takes it.
        spans: characters of the second text, begin and end; None for other tokens.
    """

    ids: list[int]
    types: list[int]
    spans: list[tuple[int, int] | None]


class Tokenizer:
    """A checkpoint's tokenizer.json with its special tokens and its chat template.

    Attributes:
        bos_id, eos_id: the tokens that begin and end a text, if the checkpoint names them. A
            model may have more ends: see `ModelConfig.eos_ids`.
        mask_id: the token that an encoder is to fill in, if the checkpoint names it.
        special_ids: tokens that are no text and that decoding can leave out.
        chat_template: None when the checkpoint has none.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        mask_token: str | None = None,
        add_bos: bool = False,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        # Some files ask to cut or pad every text, which is for training batches.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.bos_id = None if bos_token is None else backend.token_to_id(bos_token)
        self.eos_id = None if eos_token is None else backend.token_to_id(eos_token)
        self.mask_id = None if mask_token is None else backend.token_to_id(mask_token)
        self.special_ids = frozenset(
            token for token, added in backend.get_added_tokens_decoder().items() if added.special
        )
        self.chat_template = chat_template
        self._add_bos = add_bos
        # Any ordinary token: decoded in front of another, it keeps that one's leading space.
        self._anchor: list[int] = backend.encode("a", add_special_tokens=False).ids
        self._anchor_text: str = backend.decode(self._anchor)

    @staticmethod
    def from_folder(path: str | Path) -> Tokenizer:
        """Read tokenizer.json, and tokenizer_config.json and a chat template where there are any.

        Raises:
            CheckpointError: when tokenizer.json is missing or a file is not what it should be.
            TemplateError: when the chat template does not parse.
        """
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.exists():
            raise CheckpointError(
                f"{file} is missing; save the tokenizer there with transformers' "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...)."
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises nothing narrower
            raise CheckpointError(
                f"{file} is not a valid tokenizer ({error}); fetch the file again."
            ) from error
        extra = folder / "tokenizer_config.json"
        config = Fields.read(extra) if extra.exists() else Fields({}, str(extra))
        named = folder / "special_tokens_map.json"
        tokens = _special_tokens(Fields.read(named)) if named.exists() else {}
        tokens |= _special_tokens(config)
        return Tokenizer(
            backend,
            bos_token=tokens.get("bos_token"),
            eos_token=tokens.get("eos_token"),
            mask_token=tokens.get("mask_token"),
            add_bos=config.flag("add_bos_token", False),
            chat_template=ChatTemplate.from_folder(folder, config, tokens),
        )

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; the model's embedding may have more rows."""
        size: int = self._backend.get_vocab_size(with_added_tokens=True)
        return size

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text.

        Args:
            text: any text.
            add_special_tokens: begin (and end) as the model was trained, usually with the
                beginning-of-text token. A rendered chat template has them written out already.

        Raises:
            ModelError: when the text holds half of a surrogate pair, which is no character.
        """
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (UnicodeEncodeError, TypeError) as error:
            raise ModelError(
                "The text holds half of a surrogate pair, which is no character; remove it."
            ) from error
        if add_special_tokens and self._add_bos and self.bos_id is not None:
            # tokenizer_config.json may ask for what tokenizer.json leaves out.
            return ids if ids[:1] == [self.bos_id] else [self.bos_id, *ids]
        return ids

    def offsets(self, text: str, add_special_tokens: bool = True) -> list[tuple[int, int]]:
        """Where each token of `encode` stands in the text: first character, and behind the last.

        A token that is no part of the text has two equal numbers.
        """
        encoded = self._backend.encode(text, add_special_tokens=add_special_tokens)
        offsets: list[tuple[int, int]] = encoded.offsets
        missing = len(self.encode(text, add_special_tokens)) - len(offsets)
        return [(0, 0)] * missing + offsets  # a beginning that tokenizer.json leaves out

    def encode_pair(self, first: str, second: str) -> Pair:
        """The tokens of two texts, joined by special tokens as the model was trained.

        Raises:
            ModelError: a text holds half of a surrogate pair, which is no character.
        """
        try:
            found = self._backend.encode(first, second)
        except (UnicodeEncodeError, TypeError) as error:
            raise ModelError(
                "The text holds half of a surrogate pair, which is no character; remove it."
            ) from error
        return Pair(
            ids=found.ids,
            types=found.type_ids,
            spans=[
                span if sequence == 1 else None
                for span, sequence in zip(found.offsets, found.sequence_ids, strict=True)
            ],
        )

    def token_id(self, text: str) -> int | None:
        """The token that is spelled so in the vocabulary, if there is one."""
        token: int | None = self._backend.token_to_id(text)
        return token

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of tokens; ids that are no token count as nothing."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token: int) -> str:
        """The text of one token as it reads inside a text: with its leading space, if it has one.

        Part of a character reads as the replacement character.
        """
        text = self.decode([*self._anchor, token], skip_special_tokens=False)
        return text[len(self._anchor_text) :]

    def is_text(self, token: int, skip_special_tokens: bool) -> bool:
        """Whether a token can contribute to decoded text."""
        if skip_special_tokens and token in self.special_ids:
            return False
        return self._backend.id_to_token(token) is not None

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: object,
    ) -> str:
        """The prompt of a conversation; encode it with `add_special_tokens=False`.

        Raises:
            TemplateError: when there is no template, or it does not accept the messages.
        """
        if self.chat_template is None:
            raise TemplateError(
                "This model has no chat template; use /v1/completions, or add chat_template.jinja "
                "to its folder."
            )
        return self.chat_template.render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables
        )


def _special_tokens(fields: Fields) -> dict[str, str]:
    """Texts of the named special tokens, each a string or an object with its content."""
    tokens = {}
    for name in _SPECIAL_NAMES:
        value = fields.values.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            tokens[name] = text
    return tokens


class Detokenizer:
    """The text of one sequence, token by token.

    The pieces that `push` returns, and `finish` at the end, add up to the text of all tokens.
    Bytes that may still become a character are held back until they do. Each token costs the same
    however long the sequence is: only a short window of tokens is decoded, since decoders look at
    neighbours at most (to drop a leading space, to join bytes).

    Args:
        tokenizer: the tokenizer.
        skip_special_tokens: leave special tokens out.
        prompt: the tokens before the first one pushed. Given, the text continues theirs, with the
            leading space that a decoder drops from the start of a text.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool = True, prompt: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window = self._tail(prompt)
        # Tokens at the front of the window whose text is out, there for the next ones' sake.
        self._context = len(self._window)
        # Characters of the window's text that are out.
        self._sent = len(self._decode())

    def push(self, token_ids: Sequence[int]) -> str:
        """Add tokens.

        Returns:
            The characters that have become certain, often none.
        """
        return "".join(self._push(token) for token in self._visible(token_ids))

    def finish(self) -> str:
        """The text still held back, when no more tokens come."""
        text = self._decode()[self._sent :]
        self._sent += len(text)
        return text

    def _push(self, token: int) -> str:
        self._window.append(token)
        text = self._decode()
        certain = text.rstrip(REPLACEMENT)
        if len(self._window) >= _LONGEST:
            # So many tokens hold whole characters: only the last one's bytes can still change.
            certain = text.removesuffix(REPLACEMENT)
            piece = certain[self._sent :]
            self._restart(self._window[-_KEPT:], held=len(text) - len(certain))
            return piece
        piece = certain[self._sent :]
        if certain == text and piece:
            self._restart(self._window[self._context :], held=0)
        else:
            self._sent += len(piece)
        return piece

    def _restart(self, window: list[int], held: int) -> None:
        """Keep `window` alone, all of its text out but for the last `held` characters."""
        self._window, self._context = window, len(window)
        self._sent = len(self._decode()) - held

    def _tail(self, prompt: Sequence[int]) -> list[int]:
        """The fewest last tokens that are whole characters; none, if they end in half of one."""
        visible = self._visible(prompt[-_LONGEST:])
        tail: list[int] = []
        for start in range(len(visible) - 1, -1, -1):
            text = self._tokenizer.decode(visible[start:], self._skip)
            if REPLACEMENT not in text:
                tail = visible[start:]
                if text:
                    break
        return tail

    def _visible(self, token_ids: Sequence[int]) -> list[int]:
        return [token for token in token_ids if self._tokenizer.is_text(token, self._skip)]

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, self._skip)
