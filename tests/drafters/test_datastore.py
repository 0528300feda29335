"""Lookups against a search of every place, and stores that are damaged, foreign or in the way."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kangaroo.drafters import datastore as module
from kangaroo.drafters.datastore import HEADER_FILE, SUFFIXES_FILE, TOKENS_FILE, Datastore, build_datastore
from kangaroo.errors import DatastoreError, OutputError

FINGERPRINT = "0123"
FILES = [HEADER_FILE, TOKENS_FILE, SUFFIXES_FILE]


def build(folder: Path, documents: Sequence[Sequence[int]], vocab_size: int = 300) -> Datastore:
    arrays = [np.array(document, dtype=np.int32) for document in documents]
    build_datastore(arrays, folder, vocab_size=vocab_size, fingerprint=FINGERPRINT)
    return Datastore.open(folder, vocab_size=vocab_size, fingerprint=FINGERPRINT)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    build(tmp_path / "store", [[1, 2, 3, 4], [2, 3, 5]])
    return tmp_path / "store"


def search(documents: Sequence[Sequence[int]], pattern: Sequence[int]) -> list[list[int]]:
    """What follows each occurrence of the pattern, by looking at every place."""
    size = len(pattern)
    return [
        list(document[place + size :])
        for document in documents
        for place in range(len(document) - size + 1)
        if list(document[place : place + size]) == list(pattern)
    ]


# Ids on both sides of where their low and high bytes are ordered otherwise, in both widths.
VOCABULARIES = {300: [0, 1, 2, 255, 256, 299], 65535: [0, 255, 256, 65534], 70000: [0, 255, 256, 65535, 65536, 69999]}


@given(data=st.data())
def test_lookup_finds_what_a_search_of_every_place_finds(data: st.DataObject, tmp_path_factory) -> None:
    vocab_size = data.draw(st.sampled_from(sorted(VOCABULARIES)))
    text = st.lists(st.sampled_from(VOCABULARIES[vocab_size]), min_size=1, max_size=12)
    documents = data.draw(st.lists(text, min_size=1, max_size=5))
    context = data.draw(text)
    min_ngram = data.draw(st.integers(1, 3))
    max_ngram = data.draw(st.integers(min_ngram, 5))
    num_tokens = data.draw(st.integers(1, 4))
    folder = tmp_path_factory.mktemp("any")
    store = build(folder, documents, vocab_size)
    length, places = store.find(context, min_ngram=min_ngram, max_ngram=max_ngram)
    found = store.continuations(length, places, num_tokens=num_tokens, max_matches=100)
    shutil.rmtree(folder)
    lengths = range(min_ngram, min(max_ngram, len(context)) + 1)
    expected = max((one for one in lengths if search(documents, context[-one:])), default=0)
    assert length == expected
    following = search(documents, context[-expected:]) if expected else []
    assert sorted(found) == sorted(rest[:num_tokens] for rest in following)


def test_files_are_as_narrow_as_the_vocabulary_allows(tmp_path: Path) -> None:
    for vocab_size, width in ((65535, 2), (65536, 4)):
        store = build(tmp_path / "narrow", [[1, 2, vocab_size - 1]], vocab_size)
        assert np.load(tmp_path / "narrow" / TOKENS_FILE).dtype.itemsize == width
        length, places = store.find([1, 2], min_ngram=1, max_ngram=4)
        assert store.continuations(length, places, num_tokens=9, max_matches=9) == [[vocab_size - 1]]


def test_arrays_are_mapped_not_read(store: Path) -> None:
    opened = Datastore.open(store, vocab_size=300, fingerprint=FINGERPRINT)
    assert isinstance(opened._tokens.base, np.memmap)
    assert isinstance(opened._suffixes.base, np.memmap)


def test_of_many_matches_those_read_are_spread_over_all(tmp_path: Path) -> None:
    store = build(tmp_path / "many", [[7, token] for token in range(100)])
    length, places = store.find([7], min_ngram=1, max_ngram=4)
    found = store.continuations(length, places, num_tokens=1, max_matches=4)
    # 7 itself follows 7 once, and is followed by nothing there.
    assert found == [[0], [25], [50], [75]]


def test_header_counts_documents_and_tokens(store: Path) -> None:
    header = Datastore.open(store, vocab_size=300, fingerprint=FINGERPRINT).header
    assert (header.num_documents, header.num_tokens) == (2, 7)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "truncated", "changed"])
def test_a_damaged_file_is_refused(name: str, damage: str, store: Path) -> None:
    path = store / name
    before = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(before[:-3] if damage == "truncated" else before[:-3] + b"\x07" + before[-2:])
    with pytest.raises(DatastoreError, match=r"(is damaged|is no datastore).*build it again") as raised:
        Datastore.open(store, vocab_size=300, fingerprint=FINGERPRINT)
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_store_of_a_later_version_is_refused(store: Path) -> None:
    path = store / HEADER_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))
    with pytest.raises(DatastoreError, match="version"):
        Datastore.open(store, vocab_size=300, fingerprint=FINGERPRINT)


@pytest.mark.parametrize(("vocab_size", "fingerprint"), [(301, FINGERPRINT), (300, "4567")])
def test_a_store_of_another_vocabulary_is_refused(vocab_size: int, fingerprint: str, store: Path) -> None:
    with pytest.raises(DatastoreError, match="built for another tokenizer or vocabulary; build one for this model"):
        Datastore.open(store, vocab_size=vocab_size, fingerprint=fingerprint)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        DatastoreError, match=r"no datastore folder .*nowhere; build one with `kangaroo datastore build`"
    ):
        Datastore.open(tmp_path / "nowhere", vocab_size=300, fingerprint=FINGERPRINT)


@pytest.mark.parametrize(
    ("documents", "reason"),
    [([], "the corpus is empty"), ([[], []], "the corpus is empty"), ([[1, 300]], r"in 0\.\.299.*got 300"),
     ([[-1, 3]], "got -1")],
)  # fmt: skip
def test_a_bad_corpus_is_refused_and_the_store_before_stays(documents, reason: str, store: Path) -> None:
    before = content(store)
    with pytest.raises(DatastoreError, match=reason):
        build(store, documents)
    assert content(store) == before


def test_a_missing_library_is_named(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(module, "import_module", refuse)
    with pytest.raises(DatastoreError, match=r"needs pydivsufsort .*install it, or kangaroo-decoding\[retrieval\]"):
        build(store, [[1]])
    assert Datastore.open(store, vocab_size=300, fingerprint=FINGERPRINT).header.num_tokens == 7


def test_a_store_is_replaced_and_nothing_is_left_beside_it(store: Path) -> None:
    assert build(store, [[9, 9]]).header.num_tokens == 2
    assert [path.name for path in store.parent.iterdir()] == ["store"]
    assert sorted(path.name for path in store.iterdir()) == sorted(FILES)


def test_a_failure_while_writing_leaves_the_store_as_it_was(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(store)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.np, "save", fail)
    with pytest.raises(OutputError, match="No space left on device; give another --output"):
        build(store, [[9, 9]])
    assert content(store) == before
    assert [path.name for path in store.parent.iterdir()] == ["store"]


@pytest.mark.parametrize("name", ["thesis.txt", HEADER_FILE])
def test_a_folder_with_other_files_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / name).touch()
    before = content(tmp_path)
    with pytest.raises(OutputError, match="holds more than a datastore, which would be lost"):
        build(tmp_path, [[1, 2]])
    assert content(tmp_path) == before


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write to"):
        build(tmp_path / "file", [[1, 2]])
