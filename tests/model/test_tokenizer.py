"""Text to ids and back, and chat templates that may not be trusted."""

import json
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kangaroo.errors import CheckpointError, PromptError
from kangaroo.model.tokenizer import Tokenizer
from tests.tiny import BOS, EOS, VOCAB_SIZE, save_tiny_tokenizer, tiny_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MESSAGES = [{"role": "user", "content": "Hi"}]
TOKENIZER = Tokenizer(tiny_tokenizer(), settings={}, chat_template=None)


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


def test_the_fingerprint_tells_vocabularies_apart(folder: Path) -> None:
    tokenizer, path = Tokenizer.from_folder(folder), folder / "tokenizer.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"post_processor": None}))
    assert Tokenizer.from_folder(folder).fingerprint() == tokenizer.fingerprint()
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))
    assert Tokenizer.from_folder(folder).fingerprint() != tokenizer.fingerprint()


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
