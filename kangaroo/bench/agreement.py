"""How often a drafter guesses right on the target's own texts, from one teacher-forced pass, and the steps that makes.

Shapes: M guessed positions of a text, K guesses a position.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from kangaroo.bench.divergence import run_full_pass
from kangaroo.bench.texts import Text
from kangaroo.drafters.adapter import Adapter
from kangaroo.drafters.base import Prices
from kangaroo.drafters.tree import Branching, Guesses, Tree
from kangaroo.model.cache import CachedPass, Segment
from kangaroo.model.transformer import Transformer

# Rows of one product with the head, which holds as many rows of logits.
HEAD_ROWS = 128


class Judged(NamedTuple):
    """For every position [M] of a text whether the guess was right, and its confidence.

    ranks: which guess of several was right, K where none was; chances: the draft's probability of each [M, K].
    """

    agrees: list[bool]
    confidences: list[float]
    ranks: Sequence[int] = ()
    chances: Sequence[Sequence[float]] = ()


class Step(NamedTuple):
    """A step of one sequence: tokens drafted, levels they were guessed on, and those accepted.

    A last level whose guess did not pay holds no token of the draft.
    """

    num_drafted: int
    num_levels: int
    num_accepted: int


class Counts(NamedTuple):
    """What decoding would take: tokens behind the first, and for every length of draft the steps that had it."""

    num_tokens: int
    num_accepted: int
    drafts: Counter[int]

    @property
    def num_steps(self) -> int:
        return self.drafts.total()

    @property
    def num_drafted(self) -> int:
        return sum(length * count for length, count in self.drafts.items())

    @property
    def tokens_per_step(self) -> float:
        return self.num_tokens / self.num_steps


@torch.inference_mode()
def judge_adapter(target: Transformer, adapter: Adapter, *, text: Text, num_guesses: int = 1) -> Judged:
    """What the adapter guesses at every position of a text, given the true tokens before it: all in one pass.

    A guess is right that is the target's own choice there, so that the text need not be the target's.
    """
    if text.num_guessed <= 0:
        return Judged([], [])
    layer, num_prompt, head = adapter.config.exit_layer, text.num_prompt, adapter.head(target)
    chosen, tapped = run_full_pass(target, text.token_ids[:-1], taps=(layer,))
    cache = adapter.new_cache(target, num_sequences=1, num_slots=len(text.token_ids))
    attention = CachedPass(cache, [Segment(0, 0, len(text.token_ids) - 1)])
    # The state of a token guesses the next; the first new token is the prefill's.
    states = adapter.run(tapped[layer], attention=attention)[num_prompt:]
    ranks, chances = list[int](), list[list[float]]()
    for rows, deep in zip(states.split(HEAD_ROWS), chosen[num_prompt:].split(HEAD_ROWS), strict=True):
        top = torch.softmax(head.logits(rows, adapter.final_norm), dim=-1).topk(num_guesses)
        right = (top.indices == target.argmax(deep)[:, None]).long()
        ranks += torch.where(right.any(1), right.argmax(1), num_guesses).tolist()
        chances += top.values.tolist()
    return Judged([rank == 0 for rank in ranks], [one[0] for one in chances], ranks, chances)


def follow_chains(judged: Judged, *, gamma: int, eta: float, price: float = 0.0) -> Iterator[Step]:
    """The steps of a text with chains of at most gamma tokens that stop behind one of confidence below eta.

    price: what the confidences on the way to a token behind the first must promise (base.Prices.chain).
    A chain is right until its first miss, so that its length and what of it is accepted follow from the positions;
    behind a miss the confidences are those of the true tokens: an approximation.
    """
    num_right = _run_lengths(judged.agrees)
    position, end = 0, len(judged.agrees)
    while position < end:
        # The bonus token needs room.
        confidences = judged.confidences[position : position + min(gamma, end - 1 - position)]
        length, num_levels = _chain_length(confidences, eta=eta, price=price)
        accepted = min(length, num_right[position])
        yield Step(length, num_levels, accepted)
        position += accepted + 1


def follow_trees(judged: Judged, branching: Branching, *, gamma: int, eta: float, price: float) -> Iterator[Step]:
    """The same with trees: every node of a depth is taken to guess with the chances of the true one, if not its tokens.

    price: the chance a node must promise (base.Prices, of branches and chains alike).
    """
    position, end = 0, len(judged.ranks)
    while position < end:
        max_depth = min(gamma, end - 1 - position)
        tree, depth = Tree(-1), 0
        # Guesses are named by their ranks.
        while depth < max_depth and tree.frontier:
            chances = judged.chances[position + depth][: branching.num_siblings]
            guesses = [Guesses(range(len(chances)), chances, chances[0])] * len(tree.frontier)
            depth += 1
            tree.grow(guesses, branching, threshold=eta, prices=Prices(price, price), is_last=depth >= max_depth)
        children = {pair: node for node, pair in enumerate(zip(tree.parents, tree.tokens, strict=True))}
        node: int | None = 0
        accepted = -1
        while node is not None:
            accepted += 1
            node = children.get((node, judged.ranks[position + accepted])) if position + accepted < end else None
        yield Step(len(tree.tokens) - 1, depth, accepted)
        position += accepted + 1


def count_steps(judged: Sequence[Judged], *, gamma: int, eta: float) -> Counts:
    """What decoding the texts takes with chains; follow_chains says how."""
    steps = [step for one in judged for step in follow_chains(one, gamma=gamma, eta=eta)]
    num_tokens = sum(len(one.agrees) for one in judged)
    return Counts(num_tokens, sum(step.num_accepted for step in steps), Counter(step.num_drafted for step in steps))


def repeated_share(token_ids: Sequence[int], *, length: int = 8) -> float:
    """Share of a text's n-grams of this length that occurred in it before; 0 for shorter texts."""
    grams = [tuple(token_ids[start : start + length]) for start in range(len(token_ids) - length + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _chain_length(confidences: Sequence[float], *, eta: float, price: float) -> tuple[int, int]:
    """How many tokens of these confidences join a chain, and how many are guessed for that (drafters.tree.Tree)."""
    chance = 1.0
    for depth, confidence in enumerate(confidences):
        chance *= confidence
        if depth > 0 and chance < price:
            return depth, depth + 1
        # The token of low confidence is drafted too.
        if confidence < eta:
            return depth + 1, depth + 1
    return len(confidences), len(confidences)


def _run_lengths(flags: Sequence[bool]) -> list[int]:
    """For every place how many flags in a row are up from there on."""
    lengths = [0] * (len(flags) + 1)
    for place in reversed(range(len(flags))):
        lengths[place] = lengths[place + 1] + 1 if flags[place] else 0
    return lengths[:-1]
