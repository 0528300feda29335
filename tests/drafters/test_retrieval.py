"""Retrieval drafts what the datastore says, likeliest first, and never changes the text."""

import shutil
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kangaroo.drafters.base import DEFAULT_PRICES, Batch, Drafter, Prices
from kangaroo.drafters.base import Sequence as DecodedSequence
from kangaroo.drafters.datastore import Datastore, build_datastore
from kangaroo.drafters.plain import PlainDrafter
from kangaroo.drafters.retrieval import DISCOUNT, RetrievalDrafter, build, merge
from kangaroo.drafters.settings import RetrievalSettings
from kangaroo.drafters.stopping import AdaptiveSettings
from kangaroo.drafters.tree import Branching
from kangaroo.engine.engine import Engine
from kangaroo.errors import DatastoreError, SettingsError
from kangaroo.model import packed
from kangaroo.model.checkpoint import load_model
from kangaroo.model.transformer import Transformer
from kangaroo.types import Draft, Outcome, Request, SamplingParams
from tests.cli.conftest import build_model
from tests.tiny import VOCAB_SIZE, tiny_config, tiny_transformer

PROMPTS = [(9, 77, 210, 31), (5, 66, 66, 140, 9, 9, 12), (3,)]
MODES = {
    "greedy": SamplingParams(max_new_tokens=20),
    "sampled": SamplingParams(max_new_tokens=20, temperature=0.8, seed=11),
    "penalised": SamplingParams(max_new_tokens=20, temperature=0.8, seed=11, repetition_penalty=1.2),
}


def make_store(folder: Path, documents: Sequence[Sequence[int]], fingerprint: str = "0123") -> Datastore:
    arrays = [np.array(document) for document in documents]
    build_datastore(arrays, folder, vocab_size=VOCAB_SIZE, fingerprint=fingerprint)
    return Datastore.open(folder, vocab_size=VOCAB_SIZE, fingerprint=fingerprint)


def decode(target: Transformer, drafter: Drafter, params: SamplingParams) -> tuple[list[list[int]], int, int]:
    """The prompts' texts, decoded as one batch, with how many tokens were drafted and accepted."""
    engine = Engine(target, drafter)
    begun = [engine.submit(Request(prompt, params)) for prompt in PROMPTS]
    for one in begun:
        engine.run(one)
    assert [one.error for one in begun] == [None] * len(PROMPTS)
    texts = [list(one.new_tokens) for one in begun]
    return texts, sum(one.num_drafted for one in begun), sum(one.num_accepted for one in begun)


@pytest.fixture(scope="module", params=["reference", "native"])
def target(request: pytest.FixtureRequest) -> Transformer:
    model = tiny_transformer(tiny_config(), seed=3)
    return model if request.param == "reference" else packed.pack(model, "float32")


@pytest.mark.parametrize("mode", MODES)
def test_batches_emit_the_texts_of_plain_decoding(mode: str, target: Transformer, tmp_path: Path) -> None:
    params = MODES[mode]
    plain, *_ = decode(target, PlainDrafter(), params)
    # True continuations, beside some that go wrong halfway.
    texts = [[*prompt, *text] for prompt, text in zip(PROMPTS, plain, strict=True)]
    wrong = [[*text[:12], (text[12] + 1) % VOCAB_SIZE, *text[13:]] for text in texts]
    store = make_store(tmp_path / "store", [*texts, *wrong])
    drafted, num_drafted, num_accepted = decode(target, RetrievalDrafter(store, RetrievalSettings(min_ngram=1)), params)
    assert drafted == plain
    assert num_drafted > num_accepted > 20


@pytest.mark.parametrize("acceptance", ["rejection", "block"])
def test_rules_that_reject_by_chance_take_its_drafts(acceptance, target: Transformer, tmp_path: Path) -> None:
    params = SamplingParams(max_new_tokens=20, temperature=0.8, seed=11, acceptance=acceptance)
    plain, *_ = decode(target, PlainDrafter(), MODES["sampled"])
    documents = [[*prompt, *text, *text[5:]] for prompt, text in zip(PROMPTS, plain, strict=True)]
    everything = [[token, follower] for token in range(VOCAB_SIZE) for follower in (3, 9)]
    drafter = RetrievalDrafter(make_store(tmp_path / "store", documents + everything), RetrievalSettings(min_ngram=1))
    texts, num_drafted, _ = decode(target, drafter, params)
    assert [len(text) for text in texts] == [20] * len(PROMPTS)
    assert num_drafted > 0


def test_nothing_found_drafts_nothing(target: Transformer, tmp_path: Path) -> None:
    greedy = MODES["greedy"]
    plain, *_ = decode(target, PlainDrafter(), greedy)
    absent = next(token for token in range(VOCAB_SIZE) if all(token not in [*text] for text in (*plain, *PROMPTS)))
    drafter = RetrievalDrafter(make_store(tmp_path / "store", [[absent] * 4]), RetrievalSettings(min_ngram=1))
    assert decode(target, drafter, greedy) == (plain, 0, 0)


ROWS = st.lists(st.lists(st.integers(0, 3), max_size=5), max_size=12)


@given(rows=ROWS, length=st.integers(1, 20), max_nodes=st.integers(2, 12), num_siblings=st.integers(1, 4),
       threshold=st.sampled_from([0.0, 0.2, 0.5, 1.0]), price=st.floats(0.01, 1))  # fmt: skip
def test_a_merged_tree_holds_the_likeliest_beginnings(rows, length, max_nodes, num_siblings, threshold, price) -> None:
    branching = Branching(num_siblings, max_nodes)
    tokens, parents, confidences = merge(8, rows, length=length, branching=branching, threshold=threshold, price=price)
    assert (tokens[0], parents[0]) == (8, -1)
    assert all(parent < node for node, parent in enumerate(parents))
    assert len(tokens) <= max_nodes
    assert max(Counter(parents[1:]).values(), default=0) <= num_siblings
    paths = [()]
    for token, parent in zip(tokens[1:], parents[1:], strict=True):
        paths.append((*paths[parent], token))
    assert len(set(paths)) == len(paths)

    def confidence(path: tuple[int, ...]) -> float:
        num_agreeing, num_before = (
            sum(tuple(row[:end]) == path[:end] for row in rows) for end in (len(path), len(path) - 1)
        )
        return (num_agreeing - DISCOUNT / (DISCOUNT + length + len(path) - 1)) / num_before

    def chance(path: tuple[int, ...]) -> float:
        return prod(confidence(path[: depth + 1]) for depth in range(len(path)))

    assert confidences == pytest.approx([1.0, *map(confidence, paths[1:])])
    chances = [chance(path) for path in paths[1:]]
    assert all(one >= price * (1 - 1e-9) for one in chances)
    assert all(left >= right * (1 - 1e-9) for left, right in pairwise(chances))
    assert all(confidence(paths[parent]) >= threshold for parent in parents[1:] if parent > 0)
    if num_siblings == 4 and len(tokens) < max_nodes:
        beginnings = {tuple(row[:end]) for row in rows for end in range(1, len(row) + 1)}
        grown = {path for path in beginnings if all(confidence(path[:end]) >= threshold for end in range(1, len(path)))}
        assert {path for path in grown if chance(path) >= price * (1 + 1e-9)} <= set(paths)


def test_the_most_frequent_branch_comes_first() -> None:
    rows = [[1, 2], [1, 3], [1, 3], [4, 5]]
    tree = merge(0, rows, length=16, branching=Branching(9, 9), threshold=0.0, price=DEFAULT_PRICES.branch)
    assert tree[:2] == ([0, 1, 3, 4, 2, 5], [-1, 0, 1, 0, 1, 3])


def draft_behind(drafter: RetrievalDrafter, sequence: DecodedSequence) -> Draft:
    return drafter.draft(Batch(None, None, [sequence], Prices(branch=0.0)))  # type: ignore[arg-type]


def begin(max_draft: int = 20) -> DecodedSequence:
    return DecodedSequence(Request((7, 8), SamplingParams()), slot=0, max_draft=max_draft)


# Behind a match of 2 tokens: 4 - 10 / 12 of 6 places go on with 1, 2 - 10 / 12 with 2, and all of the former with 3.
DOCUMENTS = [[7, 8, 1, 3, 5]] * 4 + [[7, 8, 2, 4, 6]] * 2


@pytest.mark.parametrize(
    ("eta", "guesses"),
    [
        (0.0, {(1,), (1, 3), (1, 3, 5), (2,), (2, 4), (2, 4, 6)}),
        (0.19, {(1,), (1, 3), (1, 3, 5), (2,), (2, 4), (2, 4, 6)}),
        (0.2, {(1,), (1, 3), (1, 3, 5), (2,)}),
        (0.52, {(1,), (1, 3), (1, 3, 5), (2,)}),
        (0.53, {(1,), (2,)}),
    ],
)
def test_nothing_is_guessed_behind_a_token_that_too_few_places_agree_on(
    eta: float, guesses: set[tuple[int, ...]], tmp_path: Path
) -> None:
    draft = draft_behind(
        RetrievalDrafter(make_store(tmp_path / "store", DOCUMENTS), RetrievalSettings(eta=eta)), begin()
    )
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(draft.tokens[0][1:], draft.parents[0][1:], strict=True):
        paths.append((*paths[parent], int(token)))
    assert set(paths[1:]) == guesses


def test_threshold_rises_where_drafts_fail_and_falls_where_they_are_accepted(tmp_path: Path) -> None:
    # A threshold of 0 or 1, by the last draft alone.
    eta = AdaptiveSettings(alpha=0.5, beta1=0.0, beta2=0.0, epsilon=1.0, initial_threshold=0.0)
    settings = RetrievalSettings(eta=eta)
    drafter = RetrievalDrafter(make_store(tmp_path / "store", [[7, 8, 1, 3, 5]]), settings)
    sequence, other = begin(), begin(max_draft=0)
    for depth, num_right in ((3, 1), (1, 1), (3, 2), (3, 0), (1, 0), (1, 1)):
        assert draft_behind(drafter, sequence).parents == [[*range(-1, depth)]]
        # What drafts nothing teaches nothing, and no more does a prompt that is read.
        assert draft_behind(drafter, other).parents == [[-1]]
        path = tuple(range(num_right + 1))
        drafter.accept([other, sequence], Outcome(((0,), path), ((1,), (1,) * len(path)), ({}, {})))
        drafter.accept([sequence], Outcome(((0, 1, 2),), ((),), ({},)))
    draft_behind(drafter, sequence)
    drafter.end([sequence, other])
    assert drafter._depths._depths == {}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"min_ngram": 0}, "min_ngram must be at least 1, got 0"),
     ({"min_ngram": 5, "max_ngram": 4}, r"max_ngram must be at least min_ngram \(5\), got 4"),
     ({"num_tokens": 0}, "num_tokens must be at least 1, got 0"),
     ({"max_matches": 0}, "max_matches must be at least 1, got 0"),
     ({"max_nodes": 65}, r"max_nodes must be in 2\.\.64, got 65"),
     ({"max_nodes": 0}, r"max_nodes must be in 2\.\.64, got 0"),
     ({"eta": 1.1}, r"eta must be in \[0, 1\], got 1\.1")],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings: dict[str, Any], reason: str, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", [[1]])
    with pytest.raises(SettingsError, match=reason):
        RetrievalDrafter(store, RetrievalSettings(**settings))


def test_the_datastore_lies_beside_the_model_unless_named(tmp_path: Path) -> None:
    model = load_model(str(build_model(tmp_path / "model")))
    with pytest.raises(DatastoreError, match=r"no datastore folder .*model/datastore"):
        build(model, RetrievalSettings())
    make_store(tmp_path / "model/datastore", [[1, 2]], model.tokenizer.fingerprint())
    assert build(model, RetrievalSettings()).name == "retrieval"
    shutil.move(tmp_path / "model/datastore", tmp_path / "elsewhere")
    assert build(model, RetrievalSettings(datastore=str(tmp_path / "elsewhere"))).name == "retrieval"
