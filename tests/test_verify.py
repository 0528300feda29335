"""walk() follows the target's choices through any tree; the two random rules emit what the target alone would have.

Losslessness is a chi-square test of the joint distribution of three consecutive tokens, emitted over several steps;
the wrong rules and noises among the tests fail it.
"""

import functools
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kangaroo import verify
from kangaroo.errors import SettingsError
from kangaroo.verify import Distribution, Uniforms, reject, verify_block, walk

Text = tuple[int, ...]
Outcome = tuple[list[int], list[int]]
Rule = Callable[..., Outcome]
Draft = tuple[list[int], list[int], list[Distribution | None]]
Noise = Callable[[int], Distribution]

CHAINS = [[-1, 0], [-1, 0, 1], [-1, 0, 1, 2]]
TREES = [[-1, 0, 0, 0], [-1, 0, 0, 1, 1, 2, 2], [-1, 0, 0, 2, 1, 1, 2, 1, 3]]
NUM_EMITTED, NUM_TRIALS = 3, 7_000
TABLES = np.random.default_rng(0).normal(scale=0.8, size=(2, 5, 5))


@dataclass(frozen=True)
class Language:
    """The distributions of target and draft after a text."""

    target: Callable[[Text], Distribution]
    proposal: Callable[[Text], Distribution]


def softmax(logits: Distribution) -> Distribution:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


@functools.cache
def penalised_top_p(text: Text, top_p: float = 0.9, penalty: float = 1.5) -> Distribution:
    """The last token's logits, penalised for every token of the text, cut to the top p."""
    logits = TABLES[0, text[-1]].copy()
    seen = sorted(set(text))
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    probabilities = softmax(logits)
    order = np.argsort(-probabilities)
    probabilities[order[np.cumsum(probabilities[order]) - probabilities[order] >= top_p]] = 0.0
    return probabilities / probabilities.sum()


@functools.cache
def other_support(text: Text, num_supported: int = 4) -> Distribution:
    """Logits of another table, on the first few token ids counted from the last token."""
    probabilities = softmax(TABLES[1, text[-1]])
    probabilities[(text[-1] + np.arange(num_supported, 5)) % 5] = 0.0
    return probabilities / probabilities.sum()


PENALISED = Language(penalised_top_p, other_support)
NARROW = Language(penalised_top_p, functools.partial(other_support, num_supported=2))
# The motivating example of Sun et al. 2024.
COIN = Language(lambda _: np.array([1, 2]) / 3, lambda _: np.array([2, 1]) / 3)


def draft_drawn(language: Language, text: Text, parents: list[int], *, exponential: Noise) -> Draft:
    """Draw every node's children without replacement (Gumbel top-k); exponential(depth): a node's noise [V]."""
    tokens, texts, proposal = [text[-1], *[-1] * (len(parents) - 1)], [text] * len(parents), []
    for node in range(len(parents)):
        proposal.append(language.proposal(texts[node]))
        children = [child for child in range(len(parents)) if parents[child] == node]
        if children:
            # The logarithm of this quotient is log q + Gumbel noise.
            drawn = np.argsort(-proposal[node] / exponential(len(texts[node]) - len(text)), kind="stable")
            for child, token in zip(children, drawn.tolist(), strict=False):
                tokens[child], texts[child] = token, (*texts[node], token)
    return tokens, parents, proposal


def draft_undrawn(language: Language, text: Text, parents: list[int], *, exponential: Noise) -> Draft:
    """The proposal's two favourites, without probabilities; a third sibling repeats the first."""
    tokens, texts = [text[-1]], [text]
    for node in range(1, len(parents)):
        above = texts[parents[node]]
        favourites = np.argsort(-language.proposal(above))
        tokens.append(int(favourites[parents[:node].count(parents[node]) % 2]))
        texts.append((*above, tokens[node]))
    return tokens, parents, [None] * len(parents)


def run_step(rule: Rule, language: Language, text: Text, *, draft: Draft, noise: Uniforms) -> Outcome:
    tokens, parents, proposal = draft

    def target(_: int, drafted: Sequence[int]) -> Distribution:
        return language.target((*text, *drafted))

    return rule(tokens, parents, target=target, proposal=proposal, noise=noise)


def misfit(
    rule: Rule, parents: list[int], *, language: Language = PENALISED, draft=draft_drawn, is_stale: bool = False
) -> float:
    """Chi-square of the first tokens emitted, over its critical value: above 1, the rule is wrong.

    is_stale: the draft's noise depends on the position in the text alone, and not on the step.
    """
    generator = np.random.default_rng(11)
    size = len(language.target((0,)))
    seen: Counter[Text] = Counter()
    for seed in range(NUM_TRIALS):
        rows = generator.exponential(size=(NUM_EMITTED * len(parents), size))
        unused = iter(rows)
        text: Text = (0,)
        while len(text) <= NUM_EMITTED:
            root = len(text) - 1
            exponential = rows[root:].__getitem__ if is_stale else lambda _, unused=unused: next(unused)
            drafted = draft(language, text, parents, exponential=exponential)
            text += tuple(run_step(rule, language, text, draft=drafted, noise=Uniforms(seed, root))[1])
        seen[text[1 : NUM_EMITTED + 1]] += 1
    return chi_square(seen, expected_counts(language, size))


def expected_counts(language: Language, vocab_size: int) -> dict[Text, float]:
    return {
        text: NUM_TRIALS * math.prod(float(language.target((0, *text[:i]))[text[i]]) for i in range(NUM_EMITTED))
        for text in itertools.product(range(vocab_size), repeat=NUM_EMITTED)
    }


def chi_square(seen: Counter[Text], expected: dict[Text, float]) -> float:
    """The statistic over its critical value at p = 1e-4; rare texts share a cell, an impossible one fits nothing."""
    if any(expected[text] == 0 for text in seen):
        return math.inf
    common = {text: mean for text, mean in expected.items() if mean >= 5}
    cells = [(seen[text], mean) for text, mean in common.items()]
    rare = seen.total() - sum(common.values())
    if rare >= 1:
        cells.append((seen.total() - sum(seen[text] for text in common), rare))
    degrees, normal_quantile = len(cells) - 1, 3.719
    spread = 2 / (9 * degrees)
    critical = degrees * (1 - spread + normal_quantile * math.sqrt(spread)) ** 3  # Wilson and Hilferty 1931
    return sum((count - mean) ** 2 / mean for count, mean in cells) / critical


def ancestry(node: int, parents: list[int]) -> list[int]:
    """The nodes from the root down to this one."""
    return [*ancestry(parents[node], parents), node] if node else [0]


@st.composite
def trees(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Tokens and parents; two token ids, so that siblings repeat."""
    parents = [-1, *(draw(st.integers(0, node - 1)) for node in range(1, draw(st.integers(1, 24))))]
    return [draw(st.integers(0, 1)) for _ in parents], parents


@given(trees(), st.data())
@settings(max_examples=300, deadline=None)
def test_walk_ends_where_brute_force_says(tree: tuple[list[int], list[int]], data: st.DataObject) -> None:
    tokens, parents = tree
    picks = [data.draw(st.integers(0, 1)) for _ in tokens]
    calls: list[tuple[int, list[int]]] = []

    def pick(node: int, drafted: Sequence[int]) -> int:
        calls.append((node, list(drafted)))
        return picks[node]

    def is_chosen(node: int) -> bool:
        twins = [n for n in range(1, node) if parents[n] == parents[node] and tokens[n] == tokens[node]]
        return node == 0 or (tokens[node] == picks[parents[node]] and not twins)

    paths = [ancestry(node, parents) for node in range(len(tokens))]
    expected = max((path for path in paths if all(map(is_chosen, path))), key=len)
    assert walk(tokens, parents, pick=pick) == (expected, [picks[node] for node in expected])
    assert calls == [(node, [tokens[n] for n in paths[node][1:]]) for node in expected]


@pytest.mark.parametrize("parents", CHAINS + TREES, ids=str)
def test_rejection_emits_the_target_distribution(parents: list[int]) -> None:
    assert misfit(reject, parents) < 1


@pytest.mark.parametrize("parents", [CHAINS[2], *TREES[:2]], ids=str)
def test_rejection_of_a_draft_without_probabilities_emits_the_target_distribution(parents: list[int]) -> None:
    assert misfit(reject, parents, draft=draft_undrawn) < 1


def test_rejection_stays_lossless_with_siblings_beyond_the_support_of_the_proposal() -> None:
    assert misfit(reject, TREES[0], language=NARROW) < 1


@pytest.mark.parametrize("parents", CHAINS, ids=str)
@pytest.mark.parametrize("language", [PENALISED, COIN], ids=["penalised", "coin"])
def test_block_verification_emits_the_target_distribution(parents: list[int], language: Language) -> None:
    assert misfit(verify_block, parents, language=language) < 1


def test_block_verification_of_a_draft_without_probabilities_emits_the_target_distribution() -> None:
    assert misfit(verify_block, CHAINS[2], draft=draft_undrawn) < 1


def test_rejection_of_chains_stays_lossless_when_the_draft_noise_depends_on_the_position_alone() -> None:
    assert misfit(reject, CHAINS[2], language=COIN, is_stale=True) < 1


def test_block_verification_of_draft_noise_that_depends_on_the_position_alone_is_caught() -> None:
    assert misfit(verify_block, CHAINS[2], language=COIN, is_stale=True) > 1


def sample(weights: Distribution, uniform: float) -> int:
    return random.Random(uniform).choices(range(len(weights)), weights)[0]


def accepting_always(rule: Rule) -> Rule:
    class Eager(Uniforms):
        def accept(self, depth: int, sibling: int = 0) -> float:
            return 0.0

    return lambda *draft, noise, **given: rule(*draft, noise=Eager(noise.seed, noise.position), **given)


def bonus_from_target(rule: Rule) -> Rule:
    def wrong(*draft, target, noise, **given) -> Outcome:
        path, picked = rule(*draft, target=target, noise=noise, **given)
        return path, [*picked[:-1], sample(target(path[-1], picked[:-1]), noise.residual())]

    return wrong


def block_with_the_residual_of_one_token(tokens, parents, *, target, proposal, noise) -> Outcome:
    path, picked = verify_block(tokens, parents, target=target, proposal=proposal, noise=noise)
    if len(path) < len(tokens):
        left = np.maximum(target(path[-1], picked[:-1]) - proposal[path[-1]], 0)
        picked[-1] = sample(left, noise.residual())
    return path, picked


@pytest.mark.parametrize(
    ("rule", "parents"),
    [
        (accepting_always(reject), CHAINS[0]),
        (accepting_always(reject), TREES[0]),
        (accepting_always(verify_block), CHAINS[1]),
        (bonus_from_target(reject), CHAINS[0]),
        (bonus_from_target(reject), TREES[1]),
        (bonus_from_target(verify_block), CHAINS[2]),
        (block_with_the_residual_of_one_token, CHAINS[2]),
    ],
)
def test_a_wrong_rule_is_caught(rule: Rule, parents: list[int]) -> None:
    assert misfit(rule, parents) > 1


def test_siblings_judged_as_if_drawn_with_replacement_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_without", lambda proposed, token: proposed)
    assert misfit(reject, TREES[0]) > 1


def accepted_lengths(rule: Rule, language: Language, parents: list[int], *, num_trials: int) -> Distribution:
    """How many tokens are accepted of each of many drafts after the same text."""
    generator, size, lengths = np.random.default_rng(5), len(language.target((0,))), []
    for seed in range(num_trials):
        draft = draft_drawn(language, (0,), parents, exponential=lambda _: generator.exponential(size=size))
        lengths.append(len(run_step(rule, language, (0,), draft=draft, noise=Uniforms(seed, 0))[0]) - 1)
    return np.array(lengths, dtype=float)


@pytest.mark.parametrize(("rule", "expected"), [(reject, 10 / 9), (verify_block, 11 / 9)])
def test_accepted_length_on_the_example_of_sun_et_al_is_theirs(rule: Rule, expected: float) -> None:
    lengths = accepted_lengths(rule, COIN, CHAINS[1], num_trials=NUM_TRIALS)
    assert abs(lengths.mean() - expected) < 4 * lengths.std() / math.sqrt(NUM_TRIALS)


def test_block_verification_accepts_at_least_as_many_tokens_as_rejection() -> None:
    gains = []
    for seed in range(12):
        tables = np.random.default_rng(seed).normal(size=(2, 5, 5))
        language = Language(
            lambda text, tables=tables: softmax(tables[0, text[-1]]),
            lambda text, tables=tables: softmax(tables[1, text[-1]]),
        )
        block, token = (accepted_lengths(rule, language, CHAINS[2], num_trials=800) for rule in (verify_block, reject))
        gain = block - token
        assert gain.mean() > -3 * gain.std() / math.sqrt(len(gain))
        gains.append(gain.mean())
    assert np.mean(gains) > 0.03


def sparse_distributions(count: int, generator: np.random.Generator) -> list[Distribution]:
    """Over the two tokens of trees() and a third: with zeros, ties and masses that vanish beside the others."""
    weights = generator.choice([0.0, 1e-300, 1e-9, 0.5, 1.0], size=(count, 3))
    weights[np.arange(count), generator.integers(0, 3, count)] = 1.0
    return list(weights / weights.sum(axis=1, keepdims=True))


@given(trees(), st.data())
@settings(max_examples=300, deadline=None)
def test_any_draft_and_proposal_yields_a_path_of_tokens_the_target_allows(
    tree: tuple[list[int], list[int]], data: st.DataObject
) -> None:
    tokens, parents = tree
    rule = data.draw(st.sampled_from([reject, verify_block]))
    if rule is verify_block:
        parents = list(range(-1, len(tokens) - 1))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    targets, proposed = sparse_distributions(len(tokens), generator), sparse_distributions(len(tokens), generator)
    proposal = [one if generator.random() < 0.7 else None for one in proposed]
    noise = Uniforms(int(generator.integers(2**63)), position=17)
    calls: list[tuple[int, list[int]]] = []

    def target(node: int, drafted: Sequence[int]) -> Distribution:
        calls.append((node, list(drafted)))
        targets[node].flags.writeable = False
        return targets[node]

    path, picked = rule(tokens, parents, target=target, proposal=proposal, noise=noise)
    assert path == ancestry(path[-1], parents)
    assert picked[:-1] == [tokens[node] for node in path[1:]]
    assert len(picked) == len(path)
    assert all(targets[node][token] > 0 for node, token in zip(path, picked, strict=True))
    assert all(drafted == [tokens[n] for n in ancestry(node, parents)[1:]] for node, drafted in calls)
    assert len({node for node, _ in calls}) == len(calls)
    if rule is reject:
        assert [node for node, _ in calls] == path


@pytest.mark.parametrize("rule", [reject, verify_block])
def test_draft_of_the_target_itself_is_accepted_whole(rule: Rule) -> None:
    twin = Language(penalised_top_p, penalised_top_p)
    assert (accepted_lengths(rule, twin, CHAINS[2], num_trials=500) == 3).all()


def test_rejection_without_a_residual_draws_the_bonus_from_the_target() -> None:
    class Strict(Uniforms):
        def accept(self, depth: int, sibling: int = 0) -> float:
            return 1 - 2**-52

    judged = np.array([0.25, 0.75, 0.0])
    proposal = [judged * (1 + 1e-12), None]
    outcomes = [
        reject([0, 1], [-1, 0], target=lambda *_: judged, proposal=proposal, noise=Strict(seed, 3))
        for seed in range(99)
    ]
    assert {tuple(path) for path, _ in outcomes} == {(0,)}
    assert {picked[0] for _, picked in outcomes} == {0, 1}


def test_block_verification_of_a_tree_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"chains only.*\[-1, 0, 0\].*acceptance 'rejection'"):
        verify_block([0, 1, 2], [-1, 0, 0], target=lambda *_: np.ones(3) / 3, proposal=[None] * 3, noise=Uniforms(0, 0))


def test_splitmix64_agrees_with_its_published_output() -> None:
    assert verify._splitmix64(1234567) == 6457827717110365317


def test_every_coordinate_of_the_noise_changes_it() -> None:
    coordinates = list(itertools.product([0, 1, 2**63 - 1], [0, 1, 2, 2**40], [0, 1, 2], [0, 1, 63]))
    values = [Uniforms(seed, position).accept(depth, sibling) for seed, position, depth, sibling in coordinates]
    values += [Uniforms(seed, position).residual() for seed, position in {one[:2] for one in coordinates}]
    assert len(set(values)) == len(values)
    assert all(0 < value < 1 for value in values)
    assert values[0] == Uniforms(0, 0).accept(0, 0)


def test_noise_is_uniform_and_its_streams_are_independent() -> None:
    steps = [Uniforms(seed, position) for seed in range(100) for position in range(100)]
    streams = np.array([[one.accept(0), one.accept(0, 1), one.accept(1), one.residual()] for one in steps])
    counts = np.stack([np.histogram(stream, bins=10, range=(0, 1))[0] for stream in streams.T])
    assert ((counts - 1000) ** 2 / 1000).sum(axis=1).max() < 33.7  # 9 degrees of freedom at p = 1e-4
    correlations = np.corrcoef(streams.T) - np.eye(4)
    assert np.abs(correlations).max() < 0.04


@pytest.mark.parametrize(("bits", "token"), [(0, 1), (2**64 - 1, 2)])
def test_no_noise_draws_a_token_without_weight(bits: int, token: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_splitmix64", lambda state: bits)
    uniform = Uniforms(0, 0).residual()
    assert 0 < uniform < 1
    assert verify._sample(np.array([0.0, 0.3, 1.1, 0.0]), uniform) == token
    assert verify._sample(np.array([0.0, 0.5, 0.0, 0.5]), 0.5) == 3
