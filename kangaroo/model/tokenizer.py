"""Text to token ids and back: tokenizer.json through `tokenizers`, chat templates through sandboxed jinja2."""

import hashlib
import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import tokenizers
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kangaroo.errors import CheckpointError, PromptError
from kangaroo.model.text import StreamDecoder

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# What a template, which is the checkpoint's own program, can fail with inside the sandbox.
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError,
                   RecursionError, SyntaxError)  # fmt: skip


class Tokenizer:
    """A checkpoint's tokenizer, with its chat template where it has one."""

    def __init__(self, backend: tokenizers.Tokenizer, *, settings: dict[str, Any], chat_template: str | None) -> None:
        """settings: the content of tokenizer_config.json, {} where there is none."""
        self._backend = backend
        self._settings = settings
        self._chat_template = chat_template

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Read tokenizer.json; a checkpoint without one is converted by transformers, if that is installed.

        Raises CheckpointError where neither works.
        """
        settings = _read_json(folder / "tokenizer_config.json")
        template_file = folder / "chat_template.jinja"
        template = settings.get("chat_template")
        if template_file.exists():
            template = _read_text(template_file)
        if isinstance(template, list):
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default")
        if not isinstance(template, str | None):
            raise CheckpointError(f"{folder}: chat_template must be text, got {type(template).__name__}")
        path = folder / "tokenizer.json"
        backend = _read_backend(path) if path.exists() else _convert(folder)
        # Both are kept in the file with whatever training last set, and would change prompts silently.
        backend.no_truncation()
        backend.no_padding()
        return cls(backend, settings=settings, chat_template=template)

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def vocab(self) -> dict[str, int]:
        """The id of every token, added ones included."""
        ids: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        return ids

    def fingerprint(self) -> str:
        """Short hash of which id stands for which token."""
        vocabulary = sorted(self.vocab().items(), key=lambda entry: entry[1])
        return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of text; the checkpoint's own rule adds its special tokens, such as a leading BOS.

        Raises PromptError for lone surrogates, which a command line that is not UTF-8 leaves in its arguments.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            at = f"{text[error.start]!r} at character {error.start}"
            raise PromptError(f"text must be valid UTF-8, got {at}; convert it to UTF-8") from error
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self._backend.decode(list(token_ids), skip_special_tokens=True)

    def stream_decoder(self) -> StreamDecoder:
        """A decoder of one text's tokens as they come."""
        return StreamDecoder(self._backend)

    def encode_chat(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of messages ({"role", "content"}) written by the checkpoint's chat template."""
        return self.encode(self.render_chat(messages, add_generation_prompt=add_generation_prompt),
                           add_special_tokens=False)  # fmt: skip

    def render_chat(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
        """Text of messages under the chat template; raises PromptError where there is none or it refuses them."""
        if self._chat_template is None:
            raise PromptError("this checkpoint has no chat template; leave out --chat or use an instruct checkpoint")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
        )
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        specials = {name: _special_text(self._settings[name]) for name in SPECIAL_TOKENS if self._settings.get(name)}
        try:
            return environment.from_string(self._chat_template).render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **specials
            )
        except TEMPLATE_ERRORS as error:
            raise PromptError(f"the chat template refuses these messages: {error}") from error


class _GenerationTag(Extension):
    """{% generation %}, with which training templates mark the assistant's words: its body, as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _special_text(token: Any) -> Any:
    return token.get("content", "") if isinstance(token, dict) else token


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every malformed file
        raise CheckpointError(f"{path} is no readable tokenizer: {error}") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is no readable UTF-8 text: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(_read_text(path))
    except ValueError as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _convert(folder: Path) -> tokenizers.Tokenizer:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise CheckpointError(
            f"{folder} has no tokenizer.json; install transformers to convert its older tokenizer files"
        ) from error
    try:
        backend = AutoTokenizer.from_pretrained(str(folder), use_fast=True, trust_remote_code=False).backend_tokenizer
    except (OSError, ValueError, AttributeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{folder} has no tokenizer transformers can convert: {reason}") from error
    assert isinstance(backend, tokenizers.Tokenizer)
    return backend
