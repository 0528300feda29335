"""Text to token ids and back: tokenizer.json through `tokenizers`, chat templates through sandboxed jinja2."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers.decoders import DecodeStream

from kangaroo.errors import CheckpointError, PromptError


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
        if not path.exists():
            return cls(_convert(folder), settings=settings, chat_template=template)
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every malformed file
            raise CheckpointError(f"{path} is no readable tokenizer: {error}") from error
        return cls(backend, settings=settings, chat_template=template)

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of text; the checkpoint's own rule adds its special tokens, such as a leading BOS."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self._backend.decode(list(token_ids), skip_special_tokens=True)

    def stream_decoder(self) -> Callable[[int], str]:
        """A function from the next token id to the text it completes; "" while a character is unfinished."""
        stream = DecodeStream(skip_special_tokens=True)
        return lambda token_id: stream.step(self._backend, token_id) or ""

    def encode_chat(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of messages ({"role", "content"}) written by the checkpoint's chat template."""
        return self.encode(self.render_chat(messages, add_generation_prompt=add_generation_prompt),
                           add_special_tokens=False)  # fmt: skip

    def render_chat(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
        """Text of messages under the chat template; raises PromptError where there is none or it refuses them."""
        if self._chat_template is None:
            raise PromptError("this checkpoint has no chat template; leave out --chat or use an instruct checkpoint")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        specials = {name: _special_text(self._settings.get(name)) for name in ("bos_token", "eos_token", "unk_token")}
        try:
            return environment.from_string(self._chat_template).render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **specials
            )
        except Exception as error:  # the template is the checkpoint's own program and may fail in any way
            raise PromptError(f"the chat template refuses these messages: {error}") from error


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _special_text(token: Any) -> str:
    return token.get("content", "") if isinstance(token, dict) else token or ""


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
