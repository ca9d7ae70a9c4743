"""Tokens, text as it arrives, and chat templates."""

from __future__ import annotations

import itertools
import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from models.errors import CheckpointError, ModelError, TemplateError
from models.tokenizer import REPLACEMENT, Detokenizer, Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dog does not mind, the fox is quick.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "こんにちは世界。世界は広い。 Привет, мир! Мир велик.",
    "def f(x):\n    return x + 1\n\n    return x + 2\n",
    "🙂🙂 👩‍👩‍👧 é ñ",
]
SPECIAL = ["<s>", "</s>", "<|user|>"]


def byte_level():
    """A byte-level BPE, as of Llama 3 and Qwen."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def byte_fallback():
    """A BPE over characters that spells unknown ones in bytes, as of Llama 2 and Mistral."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=150,
        limit_alphabet=60,
        special_tokens=["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    content = json.loads(backend.to_str())
    content["model"] |= {"byte_fallback": True, "fuse_unk": True}
    content["added_tokens"] = [t for t in content["added_tokens"] if "<0x" not in t["content"]]
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return backend


def metaspace():
    """A Unigram with a Metaspace decoder, as converted from SentencePiece."""
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", *SPECIAL], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


BACKENDS = {"byte-level": byte_level, "byte-fallback": byte_fallback, "metaspace": metaspace}


@pytest.fixture(scope="module", params=BACKENDS)
def tokenizer(request):
    return Tokenizer(BACKENDS[request.param](), bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def bytes_tokenizer():
    return Tokenizer(byte_level(), bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def fallback_tokenizer():
    return Tokenizer(byte_fallback(), bos_token="<s>", eos_token="</s>")


# U+FFFD itself is left out: in a stream it cannot be told from half of a character.
TEXT = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"], exclude_characters=REPLACEMENT),
        st.sampled_from(" \n\t aeoné字世界мир🙂👩‍🚀\u0301\u200d\ufe0f🇩🇪"),
        st.sampled_from("thequickbrownfox  ..,"),
    ),
    max_size=60,
)


def split(ids, cuts):
    edges = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    return [ids[a:b] for a, b in itertools.pairwise(edges)]


@given(text=TEXT, cuts=st.lists(st.integers(0, 1000), max_size=20))
@settings(max_examples=150, deadline=None)
def test_pieces_add_up_to_the_whole_text(tokenizer, text, cuts):
    ids = tokenizer.encode(text)
    stream = Detokenizer(tokenizer)
    pieces = [stream.push(part) for part in split(ids, cuts)]
    # Whatever is out stays: no piece ends in half a character.
    assert all(REPLACEMENT not in piece for piece in pieces)
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)
    assert stream.finish() == ""


@given(text=TEXT)
@settings(max_examples=150, deadline=None)
def test_every_split_gives_the_same_text_and_whole_characters_do_not_wait(tokenizer, text):
    ids = tokenizer.encode(text)
    stream, out = Detokenizer(tokenizer), ""
    for place, token in enumerate(ids):
        out += stream.push([token])
        so_far = tokenizer.decode(ids[: place + 1])
        assert out == so_far.rstrip(REPLACEMENT) or REPLACEMENT in so_far
    assert out == tokenizer.decode(ids)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_bytes_at_all_decode_as_a_whole_would(bytes_tokenizer, data):
    token = st.integers(0, bytes_tokenizer.vocab_size + 5)
    # Byte tokens come first after the special ones; they make most sequences invalid UTF-8.
    ids = data.draw(st.lists(st.one_of(token, st.integers(3, 258)), max_size=80))
    skip = data.draw(st.booleans())
    stream = Detokenizer(bytes_tokenizer, skip_special_tokens=skip)
    text = "".join(stream.push([token]) for token in ids) + stream.finish()
    assert text == bytes_tokenizer.decode(ids, skip)


@given(prompt=TEXT, text=TEXT)
@settings(max_examples=150, deadline=None)
def test_a_stream_continues_its_prompt(tokenizer, prompt, text):
    ids, more = tokenizer.encode(prompt), tokenizer.encode(text)
    stream = Detokenizer(tokenizer, prompt=ids)
    out = "".join(stream.push([token]) for token in more) + stream.finish()
    assert tokenizer.decode(ids) + out == tokenizer.decode(ids + more)


def test_the_leading_space_of_a_continuation_is_kept(fallback_tokenizer):
    prompt = fallback_tokenizer.encode("The dog")
    more = fallback_tokenizer.encode("is")  # "▁is"
    assert Detokenizer(fallback_tokenizer).push(more) == "is"
    assert Detokenizer(fallback_tokenizer, prompt=prompt).push(more) == " is"


def test_a_character_appears_with_its_last_byte(fallback_tokenizer):
    ids = fallback_tokenizer.encode("x🦊y")
    stream = Detokenizer(fallback_tokenizer)
    pieces = [stream.push([token]) for token in ids]
    assert "".join(pieces) == "x🦊y"
    assert pieces[-5:] == ["", "", "", "🦊", "y"]


def test_half_a_character_at_the_end_comes_out_at_finish(bytes_tokenizer):
    ids = bytes_tokenizer.encode("🙂\U00010348")[:-1]
    stream = Detokenizer(bytes_tokenizer)
    assert stream.push(ids) == "🙂"
    assert stream.finish() == REPLACEMENT


class Counting:
    """A tokenizer that counts the tokens it is asked to decode."""

    def __init__(self, tokenizer):
        self.tokenizer, self.decoded = tokenizer, 0

    def is_text(self, *args):
        return self.tokenizer.is_text(*args)

    def decode(self, ids, *args):
        self.decoded += len(ids)
        return self.tokenizer.decode(ids, *args)


@pytest.mark.parametrize("what", ["words", "special tokens", "unknown ids", "broken bytes"])
def test_a_token_costs_the_same_however_long_the_sequence(bytes_tokenizer, what):
    ids = {
        "words": bytes_tokenizer.encode(" ".join(CORPUS)),
        "special tokens": [bytes_tokenizer.eos_id],
        "unknown ids": [100_000],
        "broken bytes": bytes_tokenizer.encode("🦊")[:1],
    }[what]
    stream = Detokenizer(counting := Counting(bytes_tokenizer))
    count = 4000
    for i in range(count):
        stream.push([ids[i % len(ids)]])
    assert counting.decoded <= 25 * count


def test_special_tokens_are_left_out_or_written(tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("the dog"), tokenizer.eos_id]
    assert "<s>" not in tokenizer.decode(ids)
    for skip, end in ((True, "dog"), (False, "</s>")):
        stream = Detokenizer(tokenizer, skip_special_tokens=skip)
        text = stream.push(ids) + stream.finish()
        assert text.endswith(end)
        assert text == tokenizer.decode(ids, skip)


def test_the_text_of_one_token_keeps_its_space(tokenizer):
    first, *rest = tokenizer.encode("the dog the dog")
    texts = [tokenizer.token_text(token) for token in (first, *rest)]
    assert "".join(texts).strip() == "the dog the dog"
    assert any(text.startswith(" ") for text in texts)
    assert tokenizer.token_text(tokenizer.eos_id) == "</s>"


def test_part_of_a_character_reads_as_the_replacement(bytes_tokenizer):
    assert bytes_tokenizer.token_text(bytes_tokenizer.encode("🦊")[0]) == REPLACEMENT


def test_encoding_adds_special_tokens_only_when_asked(tmp_path):
    backend = byte_level()
    bos = backend.token_to_id("<s>")
    plain = Tokenizer(backend).encode("dog")
    asked = Tokenizer(backend, bos_token="<s>", add_bos=True)
    assert asked.encode("dog") == [bos, *plain]
    assert asked.encode("dog", add_special_tokens=False) == plain
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    for add_bos in (False, True):
        both = Tokenizer(backend, bos_token="<s>", add_bos=add_bos)
        assert both.encode("dog") == [bos, *plain]
        assert both.encode("dog", add_special_tokens=False) == plain


def test_training_leftovers_do_not_cut_or_pad_texts():
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    tokenizer = Tokenizer(backend)
    text = "The quick brown fox jumps over the lazy dog"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_half_of_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(ModelError, match="surrogate"):
        tokenizer.encode("a\ud83db")


@pytest.fixture
def folder(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(folder, name, content):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def test_a_folder_with_tokenizer_json_alone(folder):
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.vocab_size == 360
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, None)
    assert tokenizer.decode(tokenizer.encode("the dog")) == "the dog"
    with pytest.raises(TemplateError, match="no chat template"):
        tokenizer.render_chat([{"role": "user", "content": "hi"}])


def test_special_tokens_come_in_either_form(folder):
    write(folder, "special_tokens_map.json", {"bos_token": {"content": "<s>"}, "eos_token": "<s>"})
    write(folder, "tokenizer_config.json", {"eos_token": "</s>", "add_bos_token": True})
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.encode("a")[0] == 0
    assert tokenizer.special_ids == {0, 1, 2}


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing.*save_pretrained"):
        Tokenizer.from_folder(tmp_path)
    write(tmp_path, "tokenizer.json", "{")
    with pytest.raises(CheckpointError, match="not a valid tokenizer"):
        Tokenizer.from_folder(tmp_path)


CHATML = (
    "{{ bos_token }}"
    "{% for message in messages %}\n"
    "    {% if message.role == 'nobody' %}\n"
    "        {{ raise_exception('unknown role ' + message.role) }}\n"
    "    {% endif %}\n"
    "<|{{ message['role'] }}|>{{ message.content | trim }}</s>\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
HELLO = [{"role": "user", "content": " hello "}]


@pytest.fixture
def chat(folder):
    def chat(template, **kwargs):
        write(folder, "tokenizer_config.json", {"bos_token": "<s>", "chat_template": template})
        return Tokenizer.from_folder(folder).render_chat(kwargs.pop("messages", HELLO), **kwargs)

    return chat


def test_a_template_renders_with_tokens_and_the_prompt_of_the_answer(chat):
    assert chat(CHATML) == "<s><|user|>hello</s>\n<|assistant|>"
    assert chat(CHATML, add_generation_prompt=False) == "<s><|user|>hello</s>\n"


def test_templates_render_as_in_transformers(chat):
    from transformers.utils.chat_template_utils import render_jinja_template

    tools = [{"type": "function", "function": {"name": "f", "description": "<é>"}}]
    messages = [*HELLO, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "x"}]
    template = (
        "{%- if tools %}\n{{ tools | tojson(indent=2) }} {{ strftime_now('%d') | length }}\n"
        "{%- endif %}\n"
        "{% set ns = namespace(seen=0) %}\n"
        "{% for message in messages %}\n"
        "  {% if loop.index0 > 2 %}{% break %}{% endif %}\n"
        "  {% set ns.seen = ns.seen + 1 %}\n"
        "  {% generation %}{{ message.role }}: {{ message.content }}{% endgeneration %}\n"
        "{% endfor %}\n"
        "{{ ns.seen }} {{ style }}{{ missing }}{{ messages[0].get('nothing') }}\n"
    )
    expected, _ = render_jinja_template(
        [messages], chat_template=template, tools=tools, style="brief", add_generation_prompt=True
    )
    assert chat(template, messages=messages, tools=tools, style="brief") == expected[0]


def test_where_templates_are_found(folder):
    def text():
        return Tokenizer.from_folder(folder).render_chat(HELLO)

    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named"}]
    write(folder, "tokenizer_config.json", {"chat_template": named})
    assert text() == "named"
    write(folder, "chat_template.json", {"chat_template": "wrapped"})
    assert text() == "wrapped"
    write(folder, "chat_template.jinja", "file")
    assert text() == "file"


def test_a_template_that_does_not_parse_stops_the_loading(chat):
    with pytest.raises(TemplateError, match=r"tokenizer_config\.json is not a valid chat template"):
        chat("{% for %}")


def test_a_refusal_is_passed_on(chat):
    with pytest.raises(TemplateError, match="refuses these messages: unknown role nobody"):
        chat(CHATML, messages=[{"role": "nobody", "content": ""}])


@pytest.mark.parametrize(
    "template",
    ["{{ messages[0].content + 1 }}", "{{ nothing.at.all }}", "{{ 1 / 0 }}", "{{ messages[9].x }}"],
)
def test_a_failing_template_is_one_sentence(chat, template):
    with pytest.raises(TemplateError, match="fails on these messages") as caught:
        chat(template)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
    ],
)
def test_templates_run_in_a_sandbox(chat, template):
    with pytest.raises(TemplateError):
        chat(template)


def test_messages_are_data_and_never_templates(chat):
    messages = [{"role": "user", "content": "{{ bos_token }}{% for x in y %}"}]
    assert "{{ bos_token }}{% for x in y %}" in chat(CHATML, messages=messages)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10 ** 10 }}",
        "{{ 'a' * 9999999999 }}",
        "{{ [1] * 9999999999 }}",
        "{% set x = 'a' * 50000000 %}{{ x + x }}",
    ],
)
def test_a_template_builds_nothing_that_fills_the_memory(chat, template):
    with pytest.raises(TemplateError, match="fails on these messages"):
        chat(template)


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}BODY{% endfor %}{% endfor %}"


@pytest.mark.parametrize("body", ["x", "{% set x = messages[0] %}", "{% set x = range(2) %}"])
def test_rendering_is_bounded_in_time(folder, body):
    write(folder, "chat_template.jinja", LOOP.replace("BODY", body))
    tokenizer = Tokenizer.from_folder(folder)
    tokenizer.chat_template.limit = 0.05
    with pytest.raises(TemplateError, match="took longer than"):
        tokenizer.render_chat(HELLO)
