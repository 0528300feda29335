"""The index of a text's n-grams finds exactly what a search through the text finds."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from kangaroo.drafters.ngrams import BREAK, NgramIndex

# Few different tokens, so that n-grams recur; the large one needs all 32 bits a token may have.
TOKENS = st.sampled_from([0, 1, 2, 2**31])
TEXTS = st.lists(TOKENS | st.just(BREAK), max_size=40)


def search(text: Sequence[int], ngram: Sequence[int]) -> list[int]:
    """Where the n-gram ends in the text, newest first."""
    ends = range(len(text) - 1, len(ngram) - 2, -1)
    return [end for end in ends if list(text[end + 1 - len(ngram) : end + 1]) == list(ngram)]


def find(index: NgramIndex, ngram: Sequence[int]) -> list[int]:
    nodes = index.locate(ngram)
    return list(index.ends(nodes[len(ngram)], len(ngram))) if len(nodes) > len(ngram) else []


@given(text=TEXTS, ngram=st.lists(TOKENS, min_size=1, max_size=4))
def test_ngram_is_found_where_a_search_finds_it(text: list[int], ngram: list[int]) -> None:
    index = NgramIndex(text, 4)
    index.update()
    assert find(index, ngram) == search(text, ngram)


@given(text=TEXTS, cuts=st.lists(st.integers(0, 40)), max_ngram=st.integers(1, 5))
def test_text_that_grows_is_indexed_as_one_that_was_there_at_once(
    text: list[int], cuts: list[int], max_ngram: int
) -> None:
    growing = NgramIndex([], max_ngram)
    for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), len(text)], strict=True):
        growing.tokens += text[start:stop]
        growing.update()
    at_once = NgramIndex(list(text), max_ngram)
    at_once.update()
    assert growing.suffixes == at_once.suffixes
    for length, node in enumerate(at_once.suffixes[1:], start=1):
        found = list(growing.ends(node, length))
        assert found == list(at_once.ends(node, length)) == search(text, text[len(text) - length :])


@given(text=TEXTS, other=st.lists(TOKENS, max_size=8))
def test_suffixes_of_another_text_are_located_up_to_the_longest_that_occurs(text: list[int], other: list[int]) -> None:
    index = NgramIndex(text, 3)
    index.update()
    occurring = [length for length in range(1, min(3, len(other)) + 1) if search(text, other[-length:])]
    assert len(index.locate(other)) - 1 == max(occurring, default=0)
