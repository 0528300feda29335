"""Prompt lookup drafts what a search through the text would, and the text stays plain decoding's."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kangaroo.drafters.base import MAX_NODES, Batch
from kangaroo.drafters.base import Sequence as DecodedSequence
from kangaroo.drafters.prompt_lookup import PromptLookupDrafter, build
from kangaroo.drafters.settings import PromptLookupSettings, find_settings
from kangaroo.drafters.stopping import AdaptiveSettings
from kangaroo.errors import SettingsError
from kangaroo.model import packed
from kangaroo.model.tokenizer import Tokenizer
from kangaroo.model.transformer import Transformer
from kangaroo.types import Draft, Outcome, Request, SamplingParams
from tests.lossless import assert_lossless, decode, num_accepted, num_rejected
from tests.tiny import tame_transformer, tiny_tokenizer

TOKENS = st.integers(0, 2)


def draft_for(
    drafter: PromptLookupDrafter, *texts: Sequence[int], max_draft: int = 20, acceptance: str = "coupling"
) -> Draft:
    """The draft behind these texts, which came token by token."""
    params = SamplingParams(temperature=1.0, seed=1, acceptance=acceptance)  # type: ignore[arg-type]
    sequences = [DecodedSequence(Request(tuple(text[:1]), params), slot) for slot, text in enumerate(texts)]
    batch = Batch(None, None, sequences)  # type: ignore[arg-type]
    drafter.begin(sequences, num_slots=0)
    for sequence, text in zip(sequences, texts, strict=True):
        for token in text[1:]:
            drafter.draft(batch)
            sequence.append(token, "bonus")
        sequence.max_draft = max_draft
    draft = drafter.draft(batch)
    drafter.end(sequences)
    return draft


def chain(draft: Draft, row: int = 0) -> list[int]:
    """The guesses of a draft without branches."""
    parents = draft.parents[row]
    assert list(parents) == list(range(-1, len(parents) - 1))
    assert draft.proposals is None
    return list(draft.tokens[row][1:])


def leaves(draft: Draft) -> list[tuple[int, ...]]:
    """The whole branches, in the order of their leaves."""
    tokens, paths = draft.tokens[0], [()]
    for node, parent in enumerate(draft.parents[0][1:], start=1):
        paths.append((*paths[parent], tokens[node]))
    return [path for node, path in enumerate(paths) if node and node not in draft.parents[0]]


def search(
    text: list[int], references: list[list[int]], *, settings: PromptLookupSettings, depth: int
) -> list[list[int]]:
    """The continuations of all matches of the longest n-gram, newest first and the references last."""
    for length in range(min(settings.max_ngram, len(text)), settings.min_ngram - 1, -1):
        ngram, found = text[-length:], []
        for end in range(len(text) - 2, length - 2, -1):
            if text[end + 1 - length : end + 1] == ngram:
                longer = list(text)
                for place in range(depth):
                    longer.append(longer[end + 1 + place])
                found.append(longer[len(text) :])
        for reference in reversed(references):
            for end in range(len(reference) - 2, length - 2, -1):
                if reference[end + 1 - length : end + 1] == ngram:
                    found.append(reference[end + 1 : end + 1 + depth])
        if found:
            return found
    return []


@given(
    text=st.lists(TOKENS, min_size=1, max_size=30),
    references=st.lists(st.lists(TOKENS, max_size=12), max_size=3),
    ngrams=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    num_tokens=st.integers(1, 8),
    max_draft=st.integers(1, 8),
)
def test_draft_is_what_followed_the_newest_match_of_the_longest_ngram(
    text: list[int], references: list[list[int]], ngrams: tuple[int, int], num_tokens: int, max_draft: int
) -> None:
    settings = PromptLookupSettings(max_ngram=max(ngrams), min_ngram=min(ngrams), num_tokens=num_tokens)
    drafter = PromptLookupDrafter(settings, references)
    found = search(text, references, settings=settings, depth=min(num_tokens, max_draft))
    assert chain(draft_for(drafter, text, max_draft=max_draft)) == next(iter(found), [])


@given(
    text=st.lists(TOKENS, min_size=1, max_size=30),
    reference=st.lists(TOKENS, max_size=12),
    num_siblings=st.integers(1, 5),
)
def test_siblings_are_the_newest_different_continuations_of_matches_of_one_length(
    text: list[int], reference: list[int], num_siblings: int
) -> None:
    settings = PromptLookupSettings(num_tokens=4, num_siblings=num_siblings)
    drafter = PromptLookupDrafter(settings, [reference])
    found = search(text, [reference], settings=settings, depth=4)
    wanted = list(dict.fromkeys(map(tuple, found)))[:num_siblings]
    # A continuation cut short by the reference's end may be the beginning of another.
    whole = {one for one in wanted if not any(other[: len(one)] == one for other in wanted if other != one)}
    assert set(leaves(draft_for(drafter, text))) == whole


def test_text_that_repeats_itself_is_guessed_to_go_on_beyond_its_end() -> None:
    drafter = PromptLookupDrafter(PromptLookupSettings(num_tokens=7))
    assert chain(draft_for(drafter, [5, 8, 9, 8, 9])) == [8, 9, 8, 9, 8, 9, 8]


def test_text_itself_goes_before_references_and_longer_matches_before_both() -> None:
    drafter = PromptLookupDrafter(PromptLookupSettings(num_tokens=1), [[1, 2, 70], [9, 1, 2, 71], [9, 1, 2, 72]])
    assert chain(draft_for(drafter, [1, 2, 60, 1, 2])) == [60]
    assert chain(draft_for(drafter, [1, 2, 60, 9, 1, 2])) == [72]
    assert chain(draft_for(drafter, [3, 4])) == []


@pytest.mark.parametrize(("num_matching", "num_counted"), [(1, 1), (2, 2), (5, 5), (12, 12), (32, 32), (40, 32)])
@pytest.mark.parametrize("is_reference", [False, True])
def test_confidence_tells_how_long_the_match_is_beyond_the_ngram(
    num_matching: int, num_counted: int, is_reference: bool
) -> None:
    earlier, last = [200, *range(50)], [201, *range(50 - num_matching, 50)]
    text, references = ([201, *last], [[*earlier, 90, 91]]) if is_reference else ([*earlier, 90, 91, *last], [])
    draft = draft_for(PromptLookupDrafter(PromptLookupSettings(num_tokens=2), references), text)
    # A guess that stands behind another counts that as matching too.
    assert draft.confidence == [[1.0, 1 - 0.5**num_counted, 1 - 0.5 ** (num_counted + 1)]]


@pytest.mark.parametrize(("eta", "least"), [(0.0, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.99, 7), (0.997, 9), (1.0, 33)])
@pytest.mark.parametrize("num_matching", [1, 2, 3, 7, 8, 12, 40])
def test_match_of_too_little_confidence_gets_one_token_drafted(num_matching: int, eta: float, least: int) -> None:
    text = [200, *range(50), 90, 91, 92, 201, *range(50 - num_matching, 50)]
    draft = draft_for(PromptLookupDrafter(PromptLookupSettings(num_tokens=3, eta=eta)), text)
    # Longer matches are as sure as one of 32 tokens.
    num_counted = min(num_matching, 32)
    assert chain(draft) == ([90, 91, 92] if num_counted >= least else [90])
    assert draft.confidence is not None
    assert draft.confidence[0][:2] == [1.0, 1 - 0.5**num_counted]


def test_confidence_of_siblings_is_that_of_their_depths() -> None:
    drafter = PromptLookupDrafter(PromptLookupSettings(num_tokens=2, num_siblings=2))
    draft = draft_for(drafter, [1, 2, 3, 9, 1, 4, 8, 1])
    assert (draft.parents, draft.confidence) == ([[-1, 0, 1, 0, 3]], [[1.0, 0.5, 0.75, 0.5, 0.75]])


def test_match_of_too_little_confidence_gets_one_token_for_each_sibling_that_begins_otherwise() -> None:
    drafter = PromptLookupDrafter(PromptLookupSettings(num_tokens=2, num_siblings=3, eta=0.6))
    assert leaves(draft_for(drafter, [1, 2, 3, 9, 1, 2, 4, 8, 1, 5, 6, 7, 1])) == [(5,), (2,)]
    assert leaves(draft_for(drafter, [7, 1, 2, 3, 7, 1, 2, 4, 7, 1, 5, 6, 7, 1])) == [(5, 6), (2, 4), (2, 3)]


def test_threshold_rises_where_drafts_fail_and_falls_where_they_are_accepted() -> None:
    # A threshold of 0 or 1, by the last draft alone.
    eta = AdaptiveSettings(alpha=0.5, beta1=0.0, beta2=0.0, epsilon=1.0, initial_threshold=0.0)
    drafter = PromptLookupDrafter(PromptLookupSettings(num_tokens=3, eta=eta))
    params = SamplingParams()
    sequence = DecodedSequence(Request((4, 5, 6, 4), params), slot=0, max_draft=20)
    other = DecodedSequence(Request((5, 6, 5), params), slot=1)
    drafter.begin([sequence, other], num_slots=0)
    batch = Batch(None, None, [sequence, other])  # type: ignore[arg-type]
    for depth, num_right in ((3, 1), (1, 1), (3, 2), (3, 0), (1, 0), (1, 1)):
        # What drafts nothing teaches nothing, and no more does a prompt that is read.
        assert drafter.draft(batch).parents == [[*range(-1, depth)], [-1]]
        path = tuple(range(num_right + 1))
        drafter.accept(batch.sequences, Outcome((path, (0,)), ((4,) * len(path), (4,)), ({}, {})))
        drafter.accept([sequence], Outcome(((0, 1, 2),), ((),), ({},)))
    drafter.draft(batch)
    drafter.end(batch.sequences)
    assert drafter._depths._depths == {}


def test_no_match_reaches_from_one_reference_into_the_next() -> None:
    drafter = PromptLookupDrafter(PromptLookupSettings(min_ngram=2, num_tokens=4), [[1, 2], [3, 4, 5]])
    assert chain(draft_for(drafter, [2, 3])) == []
    assert chain(draft_for(drafter, [1, 2])) == []
    assert chain(draft_for(drafter, [3, 4])) == [5]


def test_sequences_of_a_batch_know_nothing_of_each_other() -> None:
    drafter = PromptLookupDrafter(PromptLookupSettings(num_tokens=2))
    draft = draft_for(drafter, [1, 2, 3, 1], [4, 3, 1], [7, 7])
    assert [chain(draft, row) for row in range(3)] == [[2, 3], [], [7, 7]]
    assert draft.tokens == [[1, 2, 3], [1], [7, 7, 7]]


def test_nothing_is_drafted_where_nothing_more_may_be_emitted() -> None:
    drafter = PromptLookupDrafter(PromptLookupSettings())
    assert draft_for(drafter, [7, 7, 7], max_draft=0).parents == [[-1]]


def test_block_verification_gets_chains_and_rejection_trees() -> None:
    drafter = PromptLookupDrafter(PromptLookupSettings(num_tokens=2, num_siblings=2))
    text = [1, 2, 3, 1, 4, 5, 1]
    assert chain(draft_for(drafter, text, acceptance="block")) == [4, 5]
    assert leaves(draft_for(drafter, text, acceptance="rejection")) == [(4, 5), (2, 3)]


def test_ended_sequences_leave_no_index() -> None:
    drafter = PromptLookupDrafter(PromptLookupSettings())
    draft_for(drafter, [1, 2], [3])
    assert drafter._indexes == {}
    drafter.end([DecodedSequence(Request((1,), SamplingParams()), slot=0)])


SETTINGS = [PromptLookupSettings(), PromptLookupSettings(max_ngram=2, num_tokens=20, num_siblings=4)]


@pytest.fixture(scope="module", params=["reference", "native"])
def target(request: pytest.FixtureRequest) -> Transformer:
    loose = tame_transformer("llama", 2)
    return loose if request.param == "reference" else packed.pack(loose)


# At the lower temperature texts repeat themselves more often than not.
@pytest.mark.parametrize("temperature", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("settings", SETTINGS, ids=["chain", "tree"])
def test_texts_are_those_of_plain_decoding(
    target: Transformer, settings: PromptLookupSettings, temperature: float
) -> None:
    params = SamplingParams(max_new_tokens=60, temperature=temperature, seed=5)
    reference = decode(target, PromptLookupDrafter(settings), params)[0].new_tokens
    drafter = PromptLookupDrafter(settings, [reference[:40]])
    drafted = assert_lossless(target, drafter, params)
    assert num_accepted(drafted) > 0
    assert num_rejected(drafted) > 0


@pytest.mark.parametrize("acceptance", ["rejection", "block"])
@pytest.mark.parametrize("settings", SETTINGS, ids=["chain", "tree"])
def test_rules_that_reject_by_chance_verify_guesses_of_certainty(
    target: Transformer, settings: PromptLookupSettings, acceptance: Any
) -> None:
    params = SamplingParams(max_new_tokens=60, temperature=0.2, seed=5, acceptance=acceptance)
    drafted = decode(target, PromptLookupDrafter(settings), params)
    assert all(len(one.new_tokens) == 60 for one in drafted)
    assert num_accepted(drafted) > 0
    assert num_rejected(drafted) > 0


def fake_model(vocab_size: int = 258) -> Any:
    target = SimpleNamespace(config=SimpleNamespace(vocab_size=vocab_size))
    return SimpleNamespace(target=target, tokenizer=Tokenizer(tiny_tokenizer(), settings={}, chat_template=None))


def test_reference_files_are_read_as_the_models_tokens_without_a_bos(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a kängaroo hops", encoding="utf-8")
    model = fake_model()
    assert find_settings("prompt_lookup") is PromptLookupSettings
    drafter = build(model, PromptLookupSettings(references=(str(tmp_path / "one.txt"),), num_tokens=63))
    text = model.tokenizer.encode("the kän", add_special_tokens=False)
    assert model.tokenizer.decode(chain(draft_for(drafter, text, max_draft=63))) == "garoo hops"
    assert chain(draft_for(drafter, [256])) == []


def test_unreadable_references_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for name in ("missing.txt", "latin.txt"):
        with pytest.raises(SettingsError, match=f"references must be readable files of UTF-8 text, got .*{name}"):
            build(fake_model(), PromptLookupSettings(references=(str(tmp_path / name),)))


def test_reference_with_tokens_beyond_the_models_vocabulary_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a <|eos|>")
    with pytest.raises(SettingsError, match=r"token ids must be in 0\.\.255, got 257 in reference .*one\.txt"):
        build(fake_model(vocab_size=256), PromptLookupSettings(references=(str(tmp_path / "one.txt"),)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (PromptLookupSettings(max_ngram=0), "max_ngram must be at least 1, got 0"),
        (PromptLookupSettings(min_ngram=0), r"min_ngram must be in 1\.\.3 \(max_ngram\), got 0"),
        (PromptLookupSettings(min_ngram=4), r"min_ngram must be in 1\.\.3 \(max_ngram\), got 4"),
        (PromptLookupSettings(num_tokens=0), r"num_tokens must be in 1\.\.63, got 0"),
        (PromptLookupSettings(num_tokens=MAX_NODES), r"num_tokens must be in 1\.\.63, got 64"),
        (PromptLookupSettings(num_siblings=0), "num_siblings must be at least 1, got 0"),
        (PromptLookupSettings(eta=1.1), r"eta must be in \[0, 1\], got 1\.1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: PromptLookupSettings, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        build(fake_model(), settings)
