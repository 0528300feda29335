"""Prompt lookup: what followed the last few tokens earlier in the text, or in a reference, is guessed to follow again.

Prompt lookup decoding (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding); with reference documents it is
LLMA (Yang et al. 2023, arXiv 2304.04487).
Shapes are the host's: a draft is made of lists, and no model is run.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from kangaroo.drafters.base import MAX_NODES, Batch, Sequence
from kangaroo.drafters.depths import DraftDepths
from kangaroo.drafters.ngrams import BREAK, NgramIndex, confidence_of
from kangaroo.drafters.settings import PromptLookupSettings
from kangaroo.drafters.stopping import choose_stopping
from kangaroo.drafters.tree import merge
from kangaroo.errors import SettingsError
from kangaroo.model.cache import depths_of
from kangaroo.types import Draft, Outcome

if TYPE_CHECKING:
    from kangaroo.model.checkpoint import LoadedModel

# Earlier matches that are looked at for different continuations.
MAX_MATCHES = 64
# Tokens a match is followed back for.
MAX_MATCH = 32
# The confidence of the token behind a match, by how many tokens that has.
_CONFIDENCES = [confidence_of(length) for length in range(MAX_MATCH + MAX_NODES)]


def build(model: LoadedModel, settings: PromptLookupSettings) -> PromptLookupDrafter:
    """The drafter these settings ask for; raises SettingsError where one is out of range or a reference unreadable."""
    references = [_read(path, model) for path in settings.references]
    return PromptLookupDrafter(settings, references)


class PromptLookupDrafter:
    """Drafts what followed the newest earlier match of the longest n-gram that ends the text."""

    name = "prompt_lookup"
    taps: tuple[int, ...] = ()

    def __init__(self, settings: PromptLookupSettings, references: SequenceOf[SequenceOf[int]] = ()) -> None:
        """references: the token ids of each reference document. Raises SettingsError for settings out of range."""
        _check(settings)
        self._settings = settings
        self._stopping = choose_stopping(settings.num_tokens, settings.eta)
        # No match reaches from one document into the next.
        tokens = [token for reference in references for token in (*reference, BREAK)]
        self._references = NgramIndex(tokens, settings.max_ngram)
        self._references.update()
        self._indexes: dict[Sequence, NgramIndex] = {}
        self._depths = DraftDepths(self._stopping)

    def begin(self, sequences: SequenceOf[Sequence], *, num_slots: int) -> None:
        """Start an index of every text."""
        for sequence in sequences:
            self._indexes[sequence] = NgramIndex(sequence.tokens, self._settings.max_ngram)

    def draft(self, batch: Batch) -> Draft:
        """Index what is new, then merge every sequence's continuations into a tree.

        Every node has the confidence of the first match and the guesses before it, taken for one match.
        """
        tokens, parents, confidences = [], [], []
        for sequence in batch.sequences:
            length, continuations = self._continue(sequence)
            if _CONFIDENCES[length] < self._stopping.threshold:
                continuations = [continuation[:1] for continuation in continuations]
            if len(continuations) == 1:
                depth = len(continuations[0])
                tokens.append([sequence.tokens[-1], *continuations[0]])
                parents.append(list(range(-1, depth)))
                confidences.append([1.0, *_CONFIDENCES[length : length + depth]])
            else:
                tree = merge(sequence.tokens[-1], continuations)
                depths = depths_of(tree[1])
                depth = max(depths)
                tokens.append(tree[0])
                parents.append(tree[1])
                confidences.append([1.0] + [_CONFIDENCES[length + one - 1] for one in depths[1:]])
            self._depths.note(sequence, depth)
        return Draft(tokens, parents, confidence=confidences)

    def accept(self, sequences: SequenceOf[Sequence], outcome: Outcome) -> None:
        """Tell the stopping rule how much of the last drafts was accepted; the next ones read the texts themselves."""
        self._depths.settle(sequences, outcome)

    def end(self, sequences: SequenceOf[Sequence]) -> None:
        """Forget these sequences."""
        for sequence in sequences:
            self._indexes.pop(sequence, None)
        self._depths.forget(sequences)

    def _continue(self, sequence: Sequence) -> tuple[int, list[tuple[int, ...]]]:
        """Different continuations of the text, best first: those behind the longest n-gram that has any.

        Also how long a match the first of them follows, up to MAX_MATCH tokens.
        """
        settings, params = self._settings, sequence.request.params
        depth = min(self._stopping.max_length, sequence.max_draft)
        if depth <= 0:
            return 0, []
        index = self._indexes[sequence]
        index.update()
        in_references = self._references.locate(sequence.tokens[-settings.max_ngram :])
        # Block verification takes chains only.
        num_wanted = 1 if params.rule == "block" else settings.num_siblings
        longest = max(len(index.suffixes), len(in_references)) - 1
        for length in range(longest, settings.min_ngram - 1, -1):
            found: dict[tuple[int, ...], int] = {}
            for tokens, end in islice(self._find(index, in_references, length=length), MAX_MATCHES):
                continuation = _follow(tokens, end, depth=depth, repeats=tokens is index.tokens)
                if continuation and continuation not in found:
                    found[continuation] = length if found else _extend(tokens, end, text=index.tokens, length=length)
                if len(found) == num_wanted:
                    break
            if found:
                return next(iter(found.values())), list(found)
        return 0, []

    def _find(
        self, index: NgramIndex, in_references: SequenceOf[int], *, length: int
    ) -> Iterator[tuple[list[int], int]]:
        """The tokens in which the text's last `length` ones occur and where, newest first and the references last."""
        if length < len(index.suffixes):
            # The first match is the end of the text itself.
            for end in islice(index.ends(index.suffixes[length], length), 1, None):
                yield index.tokens, end
        if length < len(in_references):
            for end in self._references.ends(in_references[length], length):
                yield self._references.tokens, end


def _follow(tokens: list[int], end: int, *, depth: int, repeats: bool) -> tuple[int, ...]:
    """At most depth tokens behind a match, those of one document, or those of a text that repeats itself on and on."""
    continuation = tokens[end + 1 : end + 1 + depth]
    if repeats:
        # As in LZ77.
        return tuple(continuation if len(continuation) == depth else (continuation * depth)[:depth])
    return tuple(continuation[: continuation.index(BREAK)] if BREAK in continuation else continuation)


def _extend(tokens: SequenceOf[int], end: int, *, text: SequenceOf[int], length: int) -> int:
    """How many tokens up to and with `end` are the last of the text, as length of them are; at most MAX_MATCH."""
    longest = min(MAX_MATCH, end + 1, len(text))
    if tokens[end + 1 - longest : end + 1] == text[-longest:]:
        return longest
    while tokens[end - length] == text[-1 - length]:
        length += 1
    return length


def _check(settings: PromptLookupSettings) -> None:
    for name, highest in (("max_ngram", None), ("num_tokens", MAX_NODES - 1), ("num_siblings", None)):
        value: int = getattr(settings, name)
        if value < 1 or (highest is not None and value > highest):
            allowed = "at least 1" if highest is None else f"in 1..{highest}"
            raise SettingsError(f"{name} must be {allowed}, got {value}")
    if not 1 <= settings.min_ngram <= settings.max_ngram:
        raise SettingsError(f"min_ngram must be in 1..{settings.max_ngram} (max_ngram), got {settings.min_ngram}")


def _read(path: str, model: LoadedModel) -> list[int]:
    """Token ids of a reference document."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"references must be readable files of UTF-8 text, got {path}: {error}") from error
    token_ids = model.tokenizer.encode(text, add_special_tokens=False)
    vocab_size = model.target.config.vocab_size
    if max(token_ids, default=0) >= vocab_size:
        raise SettingsError(f"token ids must be in 0..{vocab_size - 1}, got {max(token_ids)} in reference {path}")
    return token_ids
