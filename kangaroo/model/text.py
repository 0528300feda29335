"""The text of one request as its tokens come: whole characters only, cut before the first stop string."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from kangaroo.errors import SettingsError

if TYPE_CHECKING:
    import tokenizers

    from kangaroo.model.tokenizer import Tokenizer

BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class TextStream:
    """The text of one request as its tokens come, cut before the first stop string.

    Once finished or stopped, what feed() and finish() returned joins to exactly `text`: Tokenizer.decode() of all
    tokens fed, cut where the first of its stop strings begins. Text is held back while its end may be the beginning
    of a stop string, and where StreamDecoder holds it back. A stop string is met at the very token after which
    decode() contains it, byte-fallback pieces included: as it ends the text, no later token can change it. Only the
    U+FFFD of an unfinished character is no text before later tokens, or finish(), have settled it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        """Raises SettingsError for an empty stop string."""
        if not all(stop):
            raise SettingsError(f"stop strings must not be empty, got {list(stop)!r}; leave the empty one out")
        self._decoder = tokenizer.stream_decoder()
        self._stops = [_StopString(one) for one in stop]
        # Of every stop string, the number of characters that end the text; the same with the decoder's preview.
        self._matched = [0] * len(stop)
        self._previewed = [0] * len(stop)
        self._held = ""
        self._shown: list[str] = []
        self._stop: str | None = None

    @property
    def text(self) -> str:
        """All that was returned so far: the final text once finished or stopped."""
        return "".join(self._shown)

    @property
    def stop(self) -> str | None:
        """The stop string that was met."""
        return self._stop

    @property
    def stopped(self) -> bool:
        return self._stop is not None

    def feed(self, token_id: int) -> str:
        """The text that may be shown after this token; once stopped, no more tokens may be fed."""
        assert self._stop is None, "a token was fed after the stop string"
        text = self._decoder.step(token_id)
        if self._stops:
            if text:
                text = self._take(text)
            elif self._decoder.preview and self._stops_in_preview():
                text = self._take(self._decoder.finish())
        self._shown.append(text)
        return text

    def finish(self) -> str:
        """What was held back, once no more tokens come; call it once. It may contain a stop string and be cut."""
        if self._stop is not None:
            return ""
        text = self._take(self._decoder.finish()) + self._held
        self._held = ""
        self._shown.append(text)
        return text

    def _take(self, text: str) -> str:
        """The part of the held and this text that may be shown, the rest being held or, after a stop, dropped."""
        found = []
        for index, one in enumerate(self._stops):
            self._matched[index], end = one.advance(self._matched[index], text)
            if end is not None:
                found.append((end - len(one.text), one.text))
        pending = self._held + text
        if found:
            begin, self._stop = min(found)
            text, self._held = pending[: len(self._held) + begin], ""
            return text
        self._previewed = self._matched.copy()
        num_shown = len(pending) - max(self._matched, default=0)
        self._held = pending[num_shown:]
        return pending[:num_shown]

    def _stops_in_preview(self) -> bool:
        """Whether the text contains a stop string if no more tokens come."""
        ends = []
        for index, one in enumerate(self._stops):
            self._previewed[index], end = one.advance(self._previewed[index], self._decoder.preview)
            ends.append(end)
        if all(end is None for end in ends):
            return False
        # The preview does not know of a space stripped where the text begins: decode() has the last word.
        rest = self._held + self._decoder.finish()
        return any(one.text in rest for one in self._stops)


class StreamDecoder:
    """Tokens of one text to the text they complete; what step() and finish() return joins to decode() of all.

    Only as much is held back as later tokens may still change: a last U+FFFD, which may be an unfinished character,
    and a run of byte-fallback pieces, which is spelled as a whole. Every token is decoded behind the same few before
    it: they give it its leading space, and 8 tokens surely hold a whole character of at most 4 bytes.

    preview: the character that the last step completed of the byte-fallback pieces held back, else "".
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._special_ids = {key for key, token in backend.get_added_tokens_decoder().items() if token.special}
        self._context: deque[int] = deque(maxlen=8)
        self._held: list[int] = []
        self._unfinished = b""
        self.preview = ""

    def step(self, token_id: int) -> str:
        """The text that this token completes; "" while a character is unfinished."""
        self.preview = ""
        piece = None if token_id in self._special_ids else self._backend.id_to_token(token_id)
        if not piece:
            return ""
        self._held.append(token_id)
        if byte := BYTE_PIECE.fullmatch(piece):
            self._spell(bytes.fromhex(byte[1]))
            return ""
        text = self.finish().removesuffix("\ufffd")
        self._context.extend(self._held)
        self._held.clear()
        self._unfinished = b""
        return text

    def finish(self) -> str:
        """The text held back, if no more tokens come."""
        before = self._backend.decode(list(self._context)).removesuffix("\ufffd")
        return self._backend.decode([*self._context, *self._held])[len(before) :]

    def _spell(self, byte: bytes) -> None:
        # No character has 5 bytes, so 5 that never spelled one stand for a broken run.
        self._unfinished = (self._unfinished + byte)[:5]
        with suppress(UnicodeDecodeError):
            self.preview = self._unfinished.decode("utf-8")
            self._unfinished = b""


class _StopString:
    """One stop string, searched for in a text that comes in pieces (Knuth, Morris and Pratt 1977)."""

    def __init__(self, text: str) -> None:
        self.text = text
        # For every beginning of the stop string, its longest proper end that is a beginning too.
        self._fallback = [0]
        for character in text[1:]:
            self._fallback.append(self.advance(self._fallback[-1], character)[0])

    def advance(self, matched: int, text: str) -> tuple[int, int | None]:
        """Characters matched after text, up to its first whole match, and where in text that ends, if there is one.

        matched: characters of the stop string that end what came before text.
        """
        for end, character in enumerate(text, 1):
            while matched and (matched == len(self.text) or self.text[matched] != character):
                matched = self._fallback[matched - 1]
            matched += self.text[matched] == character
            if matched == len(self.text):
                return matched, end
        return matched, None
