"""The rules that say how much of a draft is accepted: pure functions of one sequence's draft on host data.

walk() is the default: it follows the target's own choices, so the draft never changes the text. reject() and
verify_block() are lossless in distribution only: every text is as likely as without a draft, but which one a seed
gives depends on the drafts.

Shapes: N draft nodes, V vocabulary. Node 0 is the root, the last committed token, whose parent is -1; parents precede
their children. All rules return (path, picked): the accepted nodes, root first, and the token emitted after each of
them; the last one is the bonus token, every other is the next node's own.

The draws of a step, its draft's as well as its Uniforms, must be independent of everything emitted before. For
verify_block(), noise keyed by (seed, position in the text) is not: after a step that accepts little the next one drafts
the same positions again, and tokens that were not accepted have had a say in how many were. Key it by the root as well.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kangaroo.errors import SettingsError
from kangaroo.noise import GOLDEN, finalize

Distribution = NDArray[np.float64]  # [V] probabilities, summing to 1

_ACCEPT, _RESIDUAL = 1, 2


@dataclass(frozen=True)
class Uniforms:
    """The verification noise of one step: uniforms in (0, 1), a function of seed, position and the call alone.

    seed: of the request; position: of the root in the text, which no two steps of a request share.
    """

    seed: int
    position: int

    def accept(self, depth: int, sibling: int = 0) -> float:
        """What the sibling-th child tried, counted from 0, is judged by; depth: of its parent, the root's being 0."""
        return self._uniform(_ACCEPT, depth << 32 | sibling)

    def residual(self) -> float:
        """What the bonus token is drawn with."""
        return self._uniform(_RESIDUAL, 0)

    def _uniform(self, stream: int, index: int) -> float:
        bits = _splitmix64(_splitmix64(_splitmix64(_splitmix64(self.seed) ^ stream) ^ self.position) ^ index)
        # 51 random bits: even the largest uniform, multiplied by a sum of weights, rounds to less than that sum.
        return ((bits >> 13) + 0.5) * 2.0**-51


def walk(
    tokens: Sequence[int], parents: Sequence[int], *, pick: Callable[[int, Sequence[int]], int]
) -> tuple[list[int], list[int]]:
    """Follow the target's choices from the root of the draft tree; of equal siblings the first one counts.

    tokens, parents: N each. pick(node, drafted): the target's token after the node, asked once for every accepted node;
    drafted: the tokens from below the root down to the node, a list that grows with the walk.
    """
    path, last = [0], 0
    drafted: list[int] = []
    wanted = pick(0, drafted)
    # Parents precede their children, so one sweep meets every continuation in order.
    for node in range(1, len(tokens)):
        if parents[node] == last and tokens[node] == wanted:
            path.append(node)
            drafted.append(wanted)
            last, wanted = node, pick(node, drafted)
    return path, [*drafted, wanted]


def reject(
    tokens: Sequence[int],
    parents: Sequence[int],
    *,
    target: Callable[[int, Sequence[int]], Distribution],
    proposal: Sequence[Distribution | None],
    noise: Uniforms,
) -> tuple[list[int], list[int]]:
    """Leviathan's rule, on trees by recursive rejection without replacement.

    With p the target and q the proposal, a drafted x is accepted with probability min(1, p(x) / q(x)); after a
    rejection p becomes max(p - q, 0), renormalised (Leviathan et al. 2023, arXiv 2211.17192, Algorithm 1), and the next
    sibling is held to have been drawn from q without the earlier ones, renormalised, as Gumbel top-k draws them
    (Jeon et al. 2024, arXiv 2402.14160).

    tokens, parents: N each. target(node, drafted): p after the node, [V], which is only read; asked and drafted as in
    walk(). proposal: for every node the q its children were drawn from, in order, [V], or None where they were not
    drawn: each child then counts as one-hot.
    """
    path = [0]
    picked: list[int] = []
    while True:
        node = path[-1]
        remaining, proposed = target(node, picked), proposal[node]
        children = [child for child in range(node + 1, len(tokens)) if parents[child] == node]
        for sibling, child in enumerate(children):
            if sibling and proposed is not None:
                proposed = _without(proposed, tokens[children[sibling - 1]])
            token = tokens[child]
            share = 1.0 if proposed is None else proposed[token]
            if noise.accept(len(picked), sibling) * share < remaining[token]:
                path.append(child)
                picked.append(token)
                break
            left = _residual(remaining, proposed, token=token)
            mass = left.sum()
            if mass > 0:  # else p equals q up to rounding, and stands for its own residual
                left /= mass
                remaining = left
        else:
            picked.append(_sample(remaining, noise.residual()))
            return path, picked


def verify_block(
    tokens: Sequence[int],
    parents: Sequence[int],
    *,
    target: Callable[[int, Sequence[int]], Distribution],
    proposal: Sequence[Distribution | None],
    noise: Uniforms,
) -> tuple[list[int], list[int]]:
    """Block verification of a chain: the drafted tokens are judged together, and no fewer are accepted on average.

    Sun et al. 2024, arXiv 2403.10444, Algorithm 2. With p the target, q the proposal, c_0 = 1 and
    c_i = min(c_{i-1} * p(x_i) / q(x_i), 1), the longest prefix x_1..x_i is accepted whose uniform is below
    h_i = r_i / (r_i + 1 - c_i), r_i being the sum of max(c_i * p - q, 0) over the token after it (equation 5), or below
    c_i if it is the whole chain. The bonus token is drawn from that positive part (equation 4), or from p.

    Arguments as for reject(), but the target may be asked about nodes beyond those accepted, and must leave the vectors
    it has returned as they are. Raises SettingsError if the draft branches.
    """
    if any(parent != node - 1 for node, parent in enumerate(parents)):
        raise SettingsError(
            f"acceptance 'block' verifies chains only, got a draft tree with parents {list(parents)}; "
            "use acceptance 'rejection' or a drafter that drafts chains"
        )
    drafted: list[int] = []
    joint = 1.0
    for depth, token in enumerate(tokens[1:]):
        judged, proposed = target(depth, drafted), proposal[depth]
        left = _residual(judged, proposed, token=token, scale=joint)
        mass = float(left.sum())
        # At joint 1 and mass 0 any chance will do: a longer prefix is accepted for certain.
        if joint == 1 or noise.accept(depth) < mass / (mass + 1.0 - joint):
            num_accepted, weights = depth, left if mass > 0 else judged
        gain = joint * float(judged[token])
        if gain == 0:
            break
        joint = gain / max(gain, 1.0 if proposed is None else float(proposed[token]))
        drafted.append(token)
    else:
        if noise.accept(len(drafted)) < joint:
            num_accepted, weights = len(drafted), target(len(drafted), drafted)
    return list(range(num_accepted + 1)), [*drafted[:num_accepted], _sample(weights, noise.residual())]


def _residual(target: Distribution, proposed: Distribution | None, *, token: int, scale: float = 1.0) -> Distribution:
    """max(scale * target - proposal, 0), a new [V]; no proposal: the one-hot of the token, which scale <= 1 covers."""
    left = scale * target
    if proposed is None:
        left[token] = 0.0
    else:
        left -= proposed
        np.maximum(left, 0.0, out=left)
    return left


def _without(proposed: Distribution, token: int) -> Distribution | None:
    """The proposal given that the token is already drawn; None if nothing else could be drawn."""
    others = proposed.copy()
    others[token] = 0.0
    mass = others.sum()
    if mass == 0:
        return None
    others /= mass
    return others


def _sample(weights: Distribution, uniform: float) -> int:
    """Draw from unnormalised weights [V] by inverse CDF."""
    cumulated = weights.cumsum()
    return int(np.searchsorted(cumulated, uniform * cumulated[-1], side="right"))


def _splitmix64(state: int) -> int:
    """The first output of splitmix64 seeded with state (Steele, Lea, Flood 2014)."""
    return finalize((state + GOLDEN) % 2**64)
