"""Drafts grown level by level, for all sequences of a batch at once: what drafters that guess with a model share.

Shapes: F frontier nodes of all trees, packed sequence by sequence, V vocabulary.
"""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from kangaroo.drafters.base import Prices, Sequence, place_nodes
from kangaroo.drafters.tree import CHAIN, Branching, Guesses, Tree
from kangaroo.model.cache import KVCache, Segment
from kangaroo.sampling import DRAFT_STREAM, choose_children, derive_seed, distribution, reads_prefix
from kangaroo.types import Draft, SamplingParams

if TYPE_CHECKING:
    from kangaroo.kernels.cpu import Draw


@dataclass
class Growth:
    """A sequence's tree under way.

    params: how its guesses are drawn. max_depth: the levels it may get; depth: those it has. fed: the nodes whose keys
    and values the drafter's own cache holds. proposals: as in types.Draft.
    """

    sequence: Sequence
    params: SamplingParams
    tree: Tree
    max_depth: int
    depth: int = 0
    fed: set[int] = field(default_factory=set)
    proposals: dict[int, ndarray] = field(default_factory=dict)

    @property
    def is_coupled(self) -> bool:
        """Whether guesses share the target's noise, and need not tell what they were drawn from."""
        return self.params.rule == "coupling"


def plant(sequence: Sequence, max_depth: int) -> Growth:
    """A tree that is only its root, and guesses drawn as the request's rule of acceptance wants them."""
    params = sequence.request.params
    if params.logprobs is not None:
        # Nobody asks for those of guesses, and without them the fused argmax may serve.
        params = replace(params, logprobs=None)
    growth = Growth(sequence, params, Tree(sequence.tokens[-1]), max_depth)
    if not growth.is_coupled:
        # A rule that rejects by chance needs guesses drawn anew in every step, with noise of their own.
        assert params.seed is not None, "the engine draws a seed for every request"
        seed = derive_seed(derive_seed(params.seed, DRAFT_STREAM), len(sequence.tokens))
        growth.params = replace(params, seed=seed)
    return growth


def describe_draw(params: SamplingParams) -> "Draw | None":
    """How the native kernels draw guesses, None where they cannot by themselves."""
    if params.rule != "coupling" or reads_prefix(params):
        return None
    # No vocabulary is larger; a number the kernels cannot take would fail the whole batch.
    return params.seed or 0, params.temperature, min(params.top_k, 2**31), params.top_p, params.min_p


def find_chances(logits: Tensor) -> Tensor:
    """The softmax of the last dimension of logits [..., V].

    On a CPU without PyTorch's threads: they would go on spinning where the kernels' own are needed next.
    """
    if logits.device.type != "cpu":
        return torch.softmax(logits, dim=-1)
    scores = logits.detach().numpy()
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return torch.from_numpy(weights / weights.sum(axis=-1, keepdims=True))


def draw(growths: SequenceOf[Growth], logits: Tensor, *, num_siblings: int) -> list[Guesses]:
    """What may follow every frontier's nodes, by the draft's logits [F, V] behind them."""
    chances, logits = find_chances(logits).cpu().numpy(), logits.cpu()
    nodes = [(growth, node) for growth in growths for node in growth.tree.frontier]
    return [
        draw_behind(*place, logits=logits[row], chances=chances[row], num_siblings=num_siblings)
        for row, place in enumerate(nodes)
    ]


def draw_behind(growth: Growth, node: int, *, logits: Tensor, chances: ndarray, num_siblings: int) -> Guesses:
    """What may follow one node, by the draft's logits [V] behind it and their softmax [V].

    What goes wrong becomes the sequence's error, and its tree ends with this level.
    """
    params, prefix, drafted = growth.params, growth.sequence.prefix, growth.tree.drafted(node)
    num_children = num_siblings if growth.is_coupled else 1
    try:
        tokens = choose_children(logits, params, prefix=prefix, drafted=drafted, num_children=num_children)
        if not growth.is_coupled:
            growth.proposals[node] = distribution(logits, params, prefix=prefix, drafted=drafted)
        return Guesses(tokens, chances[tokens].tolist(), float(chances.max()))
    except Exception as error:  # whatever one request's settings bring about must not touch the others
        growth.sequence.error, growth.max_depth = error, 0
        return Guesses([], [], 0.0)


def add_level(
    growths: SequenceOf[Growth], guesses: SequenceOf[Guesses], *, branching: Branching, threshold: float, prices: Prices
) -> None:
    """Add a level to every tree, from one Guesses for each frontier node; the arguments are those of Tree.grow()."""
    first = 0
    for growth in growths:
        count = len(growth.tree.frontier)
        growth.depth += 1
        growth.tree.grow(
            guesses[first : first + count],
            branching if growth.is_coupled else CHAIN,
            threshold=threshold,
            prices=prices,
            is_last=growth.depth >= growth.max_depth,
        )
        first += count


def grow_all(
    growths: SequenceOf[Growth], guess: Callable[[list[Growth]], list[Guesses]], *, branching: Branching,
    threshold: float, prices: Prices
) -> None:  # fmt: skip
    """Add levels to all trees until none has a frontier; guess says what may follow the frontiers of those that have.

    Trees that still grow are equally deep. The other arguments are those of Tree.grow().
    """
    growing = [growth for growth in growths if growth.max_depth > 0]
    while growing:
        add_level(growing, guess(growing), branching=branching, threshold=threshold, prices=prices)
        growing = [growth for growth in growing if growth.tree.frontier]


def likeliest(ids: Tensor, confidence: Tensor) -> list[Guesses]:
    """One guess behind every node, by its id [F] and the probability [F] of it: chains need no more."""
    return [Guesses([token], [chance], chance) for token, chance in zip(ids.tolist(), confidence.tolist(), strict=True)]


def place_frontier(cache: KVCache, growth: Growth) -> Segment:
    """Where a tree's frontier stands behind what a cache holds of its sequence."""
    frontier, parents = growth.tree.frontier, growth.tree.parents[: growth.tree.frontier.stop]
    return place_nodes(cache, growth.sequence.slot, num_rows=len(frontier), first_node=frontier.start, parents=parents)


def join_levels(levels: SequenceOf[tuple[list[int], Tensor]], num_trees: int) -> Tensor:
    """The tokens of chains [B, N] that the host does not know; what lies behind a chain's end is -1.

    levels: the trees that have such a level, and its tokens [F].
    """
    tokens = torch.full((num_trees, len(levels)), -1, device=levels[0][1].device)
    for depth, (rows, level) in enumerate(levels):
        tokens[rows if len(rows) < num_trees else slice(None), depth] = level
    return tokens


def assemble(growths: SequenceOf[Growth]) -> Draft:
    """The trees of the whole batch as one draft, which resumes at layer 0."""
    trees = [growth.tree for growth in growths]
    has_proposals = any(growth.proposals for growth in growths)
    return Draft(
        tokens=[tree.tokens for tree in trees],
        parents=[tree.parents for tree in trees],
        confidence=[tree.confidences for tree in trees],
        proposals=[growth.proposals for growth in growths] if has_proposals else None,
    )
