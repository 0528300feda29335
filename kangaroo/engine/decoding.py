"""A request under way: what it has emitted, why it ended, and what that took."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Protocol

from kangaroo.drafters.base import Sequence
from kangaroo.types import Request, Token


class Text(Protocol):
    """The text of one request as its tokens come (model.text.TextStream)."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met, which ends the request."""
        ...

    def feed(self, token_id: int) -> str:
        """The text that may be shown once this token has come."""
        ...

    def finish(self) -> str:
        """What was held back, once no more tokens come."""
        ...


@dataclass(eq=False)
class Decoding:
    """A request from its submission to its end.

    max_tokens: the most its text may hold, prompt included. sequence is None until a slot of the cache is free.
    num_unread: tokens of its prompt that no pass has read. pieces: the text each new token made showable, where a text
    is kept. finish_reason: "stop" (EOS, stop id or stop string), "length", "cancelled" or "error"; None while under
    way. num_steps counts verification passes, without those that read the prompt. accepted_lengths: the tokens each
    emitted. draft_time_s and verify_time_s are parts of decode_time_s, which holds what surrounds them too; a step that
    others took part in counts whole for each of them.
    """

    request: Request
    text: Text | None = None
    max_tokens: int = 0
    sequence: Sequence | None = None
    num_unread: int = field(init=False)
    finish_reason: str | None = None
    error: Exception | None = None
    pieces: list[str] = field(default_factory=list)
    prefill_time_s: float = 0.0
    decode_time_s: float = 0.0
    draft_time_s: float = 0.0
    verify_time_s: float = 0.0
    num_steps: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    accepted_lengths: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_unread = len(self.request.prompt_ids)

    @property
    def is_reading(self) -> bool:
        """Whether the prompt is not yet read to its end."""
        return self.num_unread > 0

    @property
    def new_tokens(self) -> list[int]:
        """The tokens emitted so far."""
        return [] if self.sequence is None else self.sequence.tokens[len(self.request.prompt_ids) :]

    @property
    def room(self) -> int:
        """How many tokens may still be emitted."""
        assert self.sequence is not None, "a request without a slot"
        return self.max_tokens - len(self.sequence.tokens)

    def emitted(self, first: int) -> list[Token]:
        """The tokens emitted from the first-th on, with the text each made showable where one is kept."""
        sequence = self.sequence
        if sequence is None:
            return []
        tokens = self.new_tokens[first:]
        pieces = [""] * len(tokens) if self.text is None else self.pieces[first:]
        return [Token(*one) for one in zip(tokens, pieces, sequence.origins[first:], strict=True)]

    def emit(self, committed: SequenceOf[int]) -> int:
        """Append the tokens a pass committed up to the first stop; returns how many."""
        sequence, text, room = self.sequence, self.text, self.room
        assert sequence is not None, "a request without a slot emits nothing"
        for num_emitted, token in enumerate(committed, 1):
            if text is not None:
                self.pieces.append(text.feed(token))
            sequence.append(token, "bonus" if num_emitted == len(committed) else "draft")
            if token in self.request.stop_ids or (text is not None and text.stopped):
                self.finish("stop")
                return num_emitted
            if num_emitted == room:
                self.finish("length")
                return num_emitted
        return len(committed)

    def finish(self, reason: str) -> None:
        """End the text, once; text still held back belongs to its last token, unless it was cut short.

        Of a text that was cut short its reader has all there is.
        """
        if self.finish_reason is not None:
            return
        self.finish_reason = reason
        is_whole = reason in ("stop", "length")
        if self.text is not None and self.pieces and is_whole and not self.text.stopped:
            self.pieces[-1] += self.text.finish()
            if self.text.stopped:
                self.finish_reason = "stop"

    def fail(self, error: Exception) -> None:
        """End the text with an error, as it stands."""
        self.error, self.finish_reason = error, "error"

    def count(self, num_drafted: int, num_emitted: int) -> None:
        """Count a verification pass."""
        assert self.sequence is not None, "a request without a slot"
        self.num_steps += 1
        self.num_drafted += num_drafted
        self.num_accepted += self.sequence.origins[-num_emitted:].count("draft") if num_emitted else 0
        self.accepted_lengths.append(num_emitted)
