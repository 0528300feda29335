"""Text to ids and back, streamed or whole, and chat templates that may not be trusted."""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from kangaroo.errors import CheckpointError, PromptError
from kangaroo.model.tokenizer import Tokenizer
from tests.tiny import BOS, EOS, VOCAB_SIZE, save_tiny_tokenizer, tiny_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MESSAGES = [{"role": "user", "content": "Hi"}]
TOKENIZER = Tokenizer(tiny_tokenizer(), settings={}, chat_template=None)
SAMPLES = [
    "the kangaroo \U0001f998\U0001f998 jumps \U0001f44d\U0001f3fd",
    "\u4f60\u597d\u4e16\u754c caf\u00e9 \ufffd",
    "\u65e5\u672c\u8a9e \U0001f469\u200d\U0001f680",
]


def byte_level() -> tokenizers.Tokenizer:
    """A byte-level BPE whose merges join bytes within and across characters."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, min_frequency=1, special_tokens=[EOS], initial_alphabet=alphabet,
                                  show_progress=False)  # fmt: skip
    backend.train_from_iterator(SAMPLES, trainer)
    return backend


def sentencepiece_like() -> tokenizers.Tokenizer:
    """Spaces as U+2581 with the first one stripped, and bytes where there is no piece, as in Llama 2."""
    pieces = [
        "<unk>",
        EOS,
        "\u2581",
        "\u2581a",
        "a",
        "b",
        "\u2581bc",
        "\u4f60",
        "\ufffd",
        *(f"<0x{n:02X}>" for n in range(256)),
    ]
    backend = tokenizers.Tokenizer(models.BPE(vocab={piece: n for n, piece in enumerate(pieces)}, merges=[],
                                              unk_token="<unk>", byte_fallback=True))  # fmt: skip
    backend.add_special_tokens(["<unk>", EOS])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


BYTE_LEVEL = Tokenizer(byte_level(), settings={}, chat_template=None)
SENTENCEPIECE_LIKE = Tokenizer(sentencepiece_like(), settings={}, chat_template=None)


def spell(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """What a stream gives for every token, and at its end."""
    decoder = tokenizer.stream_decoder()
    return [*map(decoder.step, ids), decoder.finish()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny_tokenizer(tmp_path)
    return tmp_path


def with_template(template: str) -> Tokenizer:
    return Tokenizer(
        tiny_tokenizer(), settings={"bos_token": BOS, "eos_token": {"content": EOS}}, chat_template=template
    )


def test_special_tokens_follow_the_checkpoint(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.vocab_size == VOCAB_SIZE
    assert tokenizer.encode("ab")[0] == 256
    assert tokenizer.encode("ab")[1:] == tokenizer.encode("ab", add_special_tokens=False)
    assert tokenizer.decode([*tokenizer.encode("ab"), 257]) == "ab"


@given(text=st.text())
def test_round_trip(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert TOKENIZER.decode(ids) == text


@given(text=st.text())
def test_stream_completes_characters(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert "".join(spell(TOKENIZER, ids)) == text


def test_stream_holds_back_an_unfinished_character() -> None:
    ids = TOKENIZER.encode("aé🦘", add_special_tokens=False)
    assert spell(TOKENIZER, ids) == ["a", "", "é", "", "", "", "🦘", ""]
    assert spell(TOKENIZER, ids[:-1]) == ["a", "", "é", "", "", "", "\ufffd"]


@given(ids=st.lists(st.integers(0, VOCAB_SIZE + 2), max_size=40))
@example(ids=TOKENIZER.encode("🦘" * 3, add_special_tokens=False)[1:-1])
def test_stream_of_any_bytes_joins_to_the_text(ids: list[int]) -> None:
    assert "".join(spell(TOKENIZER, ids)) == TOKENIZER.decode(ids)


@given(ids=st.lists(st.integers(0, BYTE_LEVEL.vocab_size), max_size=40))
def test_stream_of_any_merged_bytes_joins_to_the_text(ids: list[int]) -> None:
    assert "".join(spell(BYTE_LEVEL, ids)) == BYTE_LEVEL.decode(ids)


@given(text=st.lists(st.one_of(st.sampled_from(SAMPLES), st.text(max_size=8))).map("".join), cut=st.integers(0, 5))
def test_stream_of_a_text_cut_anywhere_joins_to_the_text(text: str, cut: int) -> None:
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False)
    ids = ids[: max(0, len(ids) - cut)]
    assert "".join(spell(BYTE_LEVEL, ids)) == BYTE_LEVEL.decode(ids)


def test_merges_of_the_test_tokenizer_end_inside_characters() -> None:
    texts = [BYTE_LEVEL.decode([token_id]) for token_id in range(BYTE_LEVEL.vocab_size)]
    assert any(re.fullmatch(".+\ufffd", text) for text in texts)


@given(ids=st.lists(st.one_of(st.integers(0, 8), st.integers(0, SENTENCEPIECE_LIKE.vocab_size)), max_size=40))
@example(ids=[3, *SENTENCEPIECE_LIKE.encode("🦘"), 9 + 0xFF, 4])
def test_stream_of_byte_fallback_pieces_joins_to_the_text(ids: list[int]) -> None:
    assert "".join(spell(SENTENCEPIECE_LIKE, ids)) == SENTENCEPIECE_LIKE.decode(ids)


def test_stream_keeps_the_spaces_between_words() -> None:
    assert spell(SENTENCEPIECE_LIKE, [3, 4, 3, 1, 6]) == ["a", "a", " a", "", " bc", ""]


def test_stream_costs_the_same_for_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    class Counting:
        def __init__(self, backend: tokenizers.Tokenizer) -> None:
            self.backend = backend

        def __getattr__(self, name: str) -> object:
            return getattr(self.backend, name)

        def decode(self, ids: list[int]) -> str:
            lengths.append(len(ids))
            return self.backend.decode(ids)

    # Torn bytes only, so that no character ever ends.
    ids = TOKENIZER.encode("🦘", add_special_tokens=False)[-1:] * 200
    counted = Tokenizer(Counting(tiny_tokenizer()), settings={}, chat_template=None)  # type: ignore[arg-type]
    assert "".join(spell(counted, ids)) == "\ufffd" * 200
    assert max(lengths) <= 9


def test_two_streams_do_not_mix() -> None:
    left, right = TOKENIZER.stream_decoder().step, TOKENIZER.stream_decoder().step
    first, second = TOKENIZER.encode("é", add_special_tokens=False)
    assert [left(first), right(first), left(second), right(second)] == ["", "", "é", "é"]


def test_saved_truncation_and_padding_are_not_applied(folder: Path) -> None:
    backend = tiny_tokenizer()
    backend.enable_truncation(4)
    backend.enable_padding(length=6)
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.decode(tokenizer.encode("a longer text")) == "a longer text"
    assert len(tokenizer.encode("a")) == 2


def test_converted_tokenizer_is_not_truncated_or_padded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = tiny_tokenizer()
    backend.enable_truncation(4)
    backend.enable_padding(length=6)
    (folder / "tokenizer.json").unlink()
    monkeypatch.setattr("kangaroo.model.tokenizer._convert", lambda folder: backend)
    assert [len(Tokenizer.from_folder(folder).encode(text)) for text in ("a", "a longer text")] == [2, 14]


def test_text_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(PromptError, match=r"must be valid UTF-8, got '\\udce9' at character 3"):
        TOKENIZER.encode("caf\udce9")


def test_chat_template() -> None:
    tokenizer = with_template(TEMPLATE)
    assert tokenizer.render_chat(MESSAGES) == f"{BOS}<user>Hi<assistant>"
    assert tokenizer.render_chat(MESSAGES, add_generation_prompt=False) == f"{BOS}<user>Hi"
    ids = tokenizer.encode_chat(MESSAGES)
    assert ids.count(256) == 1
    assert tokenizer.decode(ids) == "<user>Hi<assistant>"


@pytest.mark.parametrize("where", ["jinja", "settings", "named"])
def test_chat_template_is_found(folder: Path, where: str) -> None:
    settings: dict[str, object] = {"bos_token": BOS}
    if where == "jinja":
        (folder / "chat_template.jinja").write_text(TEMPLATE)
        settings["chat_template"] = "not this one"
    else:
        named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": TEMPLATE}]
        settings["chat_template"] = TEMPLATE if where == "settings" else named
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert Tokenizer.from_folder(folder).render_chat(MESSAGES) == f"{BOS}<user>Hi<assistant>"


def test_no_chat_template(folder: Path) -> None:
    with pytest.raises(PromptError, match="no chat template"):
        Tokenizer.from_folder(folder).encode_chat(MESSAGES)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ 1 // 0 }}",
        "{% for %}",
        "{{ strftime_now.__globals__['json'] }}",
        "{{ strftime_now(5) }}",
        "{{ messages[7].content }}",
        "{{ [].pop() }}",
        "{{ 10.0 ** 400 }}",
        "{% break %}",
        "{% generation %}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    ],
)
def test_templates_that_fail_or_reach_out_are_refused(template: str) -> None:
    with pytest.raises(PromptError, match="the chat template refuses these messages"):
        with_template(template).render_chat(MESSAGES)


def test_templates_may_use_loop_controls_and_json() -> None:
    template = "{% for m in messages %}{{ m | tojson }}{% break %}{% endfor %}"
    assert with_template(template).render_chat([*MESSAGES, *MESSAGES]) == json.dumps(MESSAGES[0])


def test_templates_may_ask_for_the_date_and_mark_generations() -> None:
    marked = "{% generation %}{% set x = 1 %}{{ messages[0].content }}{% endgeneration %}"
    template = "{{ strftime_now('%d %b %Y') }}|" + marked + "|{{ x }}"
    text = with_template(template).render_chat(MESSAGES)
    assert re.fullmatch(r"\d\d \S+ \d{4}\|Hi\|", text)


def test_templates_get_every_special_token_there_is() -> None:
    settings = {"bos_token": "<b>", "eos_token": {"content": "<e>"}, "pad_token": "<p>", "unk_token": None}
    template = "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token is defined }}"
    tokenizer = Tokenizer(tiny_tokenizer(), settings=settings, chat_template=template)
    assert tokenizer.render_chat(MESSAGES) == "<b><e><p>False"


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"model": {"type": "BPE"}}'])
def test_malformed_tokenizer(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="is no readable tokenizer"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("content", [b"{", b"\xff"])
def test_malformed_settings(folder: Path, content: bytes) -> None:
    (folder / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is n"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("template", [3, {"default": TEMPLATE}, [{"name": "default", "template": 4}]])
def test_malformed_template(folder: Path, template: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(CheckpointError, match="chat_template must be text"):
        Tokenizer.from_folder(folder)


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer transformers can convert"):
        Tokenizer.from_folder(tmp_path)


def test_no_tokenizer_and_no_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CheckpointError, match="install transformers"):
        Tokenizer.from_folder(tmp_path)
