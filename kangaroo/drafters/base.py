"""What the engine and a drafter share: the batch, and the protocol every drafter follows.

Shapes: B sequences, N draft nodes (padded), R packed rows.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from kangaroo.model.cache import KVCache, Segment
from kangaroo.model.transformer import Transformer
from kangaroo.sampling import Prefix, needs_logits
from kangaroo.types import Draft, Outcome, Request, TokenLogprobs

# The most nodes of a draft, its root included: caches hold this many slots behind the text.
MAX_NODES = 64


@dataclass(eq=False)
class Sequence:
    """A text being decoded: its committed tokens, whose last is the root of the next draft.

    slot is its row in the target's cache, which holds every committed token but the last;
    max_draft bounds the depth of guesses worth making: at most what may still be emitted, less the bonus token; while
    its prompt is read, 0 where drafting is not likely to pay.
    prefix counts the tokens for the processors of the request. needs_logits: whether the target's choice is more than
    the argmax (sampling.needs_logits). error: what went wrong with it alone, which ends it.
    """

    request: Request
    slot: int
    tokens: list[int] = field(init=False)
    prefix: Prefix = field(init=False)
    needs_logits: bool = field(init=False)
    max_draft: int = 0
    origins: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_ids)
        self.prefix = Prefix(self.tokens, stop_ids=self.request.stop_ids)
        self.needs_logits = needs_logits(self.request.params)

    @property
    def num_new_tokens(self) -> int:
        return len(self.origins)

    def append(self, token: int, origin: str) -> None:
        """Commit a token; origin as in types.Token."""
        self.tokens.append(token)
        self.origins.append(origin)


class Prices(NamedTuple):
    """The chance of being accepted at which one more node pays for itself.

    branch: for a guess beside others, and for one of a tree that is known as a whole. chain: for the next token of a
    chain behind its first, judged by the confidences on the way to it; 0 leaves chains to the stopping rule.
    """

    branch: float = 0.05
    chain: float = 0.0


# Until they have been measured.
DEFAULT_PRICES = Prices()


@dataclass(frozen=True)
class Batch:
    """The sequences of one step, with the target, the cache that a self-drafting drafter shares, and prices.

    taps: the layers whose entering states are wanted where the drafter has the target read its draft in the same call
    (types.Draft.verified); None where it must leave that to the engine.
    """

    target: Transformer
    cache: KVCache
    sequences: SequenceOf[Sequence]
    prices: Prices = DEFAULT_PRICES
    taps: tuple[int, ...] | None = None

    def segment(
        self, row: int, *, num_rows: int, first_node: int = 0, parents: SequenceOf[int] | None = None
    ) -> Segment:
        """Nodes of the row-th sequence behind its cached tokens; a chain without parents."""
        slot = self.sequences[row].slot
        return place_nodes(self.cache, slot, num_rows=num_rows, first_node=first_node, parents=parents)


def place_nodes(
    cache: KVCache, slot: int, *, num_rows: int, first_node: int = 0, parents: SequenceOf[int] | None = None
) -> Segment:
    """Nodes first_node and on behind what a cache holds of a sequence; parents are those of all nodes up to them."""
    shape = None if parents is None or is_chain(parents) else tuple(parents)
    return Segment(slot, cache.lengths[slot], num_rows, shape, first_node)


class Drafter(Protocol):
    """Guesses continuations; whatever it guesses, the text stays the target's own.

    taps are the layers whose entering states it needs: every target pass, prefill included, hands those of
    the committed tokens to accept(). They may change where texts begin or end.
    """

    name: str

    @property
    def taps(self) -> tuple[int, ...]: ...

    def begin(self, sequences: SequenceOf[Sequence], *, num_slots: int) -> None:
        """Make room for new sequences of at most num_slots tokens, drafts included; each starts empty."""
        ...

    def draft(self, batch: Batch) -> Draft:
        """Guess for every sequence of the batch, at most max_draft tokens deep, after its last committed token."""
        ...

    def accept(self, sequences: SequenceOf[Sequence], outcome: Outcome) -> None:
        """Learn which nodes of the last draft, or tokens of a prefill, were committed."""
        ...

    def end(self, sequences: SequenceOf[Sequence]) -> None:
        """Free what was held for these sequences."""
        ...


def is_chain(parents: SequenceOf[int]) -> bool:
    """Whether a draft's nodes follow one another without branches."""
    return list(parents) == list(range(-1, len(parents) - 1))


def draft_roots(batch: Batch) -> Draft:
    """The draft that guesses nothing."""
    return Draft([sequence.tokens[-1:] for sequence in batch.sequences], [[-1]] * len(batch.sequences))
