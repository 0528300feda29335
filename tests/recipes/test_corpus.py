"""How documents are chosen, split and encoded."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from cleaning import Document, signature
from corpus import SPECIALS, is_heldout, largest_allowance, limit_tests, sample, train_tokenizer, write_tokens
from sources import STDLIB
from tokenizers import Tokenizer

CODE = "".join(f"class C{i}:\n    def f{i}(self, x):\n        if x:\n            return x.y_{i}\n" for i in range(99))


def document(path: str, text: str = "x" * 100) -> Document:
    return Document("some", path, text, len(text.encode()), signature(text))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([CODE], 284)


def test_heldout_split_is_stable() -> None:
    # The published model was not trained on these files: their names alone have to decide for ever.
    heldout = [28, 35, 39, 113, 131, 161, 231, 346, 400, 423, 428]
    assert [i for i in range(500) if is_heldout(f"some/module_{i}.py")] == heldout
    assert [i for i in range(500) if is_heldout(f"Some/MODULE_{i}.py")] == heldout


def test_sample_is_seeded_and_keeps_whole_files_in_order() -> None:
    documents = [document(f"{i:02}.py") for i in range(50)]
    chosen = sample(documents, 1050, seed="0")
    assert len(chosen) == 10
    assert [one.path for one in chosen] == sorted(one.path for one in chosen)
    assert chosen == sample(documents, 1050, seed="0") != sample(documents, 1050, seed="1")
    assert sample(documents, 5000, seed="0") == documents


def test_tests_are_kept_in_proportion_to_code() -> None:
    documents = [document(f"{i}.py") for i in range(20)] + [document(f"test_{i}.py") for i in range(20)]
    assert Counter(one.is_test for one in limit_tests(documents, seed="0")) == {False: 20, True: 5}


def test_allowance_fills_the_budget_and_bounds_each_share() -> None:
    even = dict.fromkeys("abcdefghij", 1000)
    assert largest_allowance(even, 5000) == pytest.approx(500)
    allowance = largest_allowance({STDLIB: 1700, "a": 5000}, 10_000)
    assert allowance / (1700 + allowance) == pytest.approx(0.15)


def test_tokenizer_splits_as_promised(tokenizer: Tokenizer) -> None:
    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    assert [tokenizer.token_to_id(special) for special in SPECIALS] == [0, 1, 2]
    assert [count("\n" + " " * width) for width in (4, 8, 12)] == [2, 2, 2]
    assert count("2024") == 4


@pytest.mark.parametrize(
    "text", ["", " ", "\n", "  a  b\t\n   c", "don't\r\rstop", "naïve 日本語 🦘\x00 1234\n\n   \n"]
)
def test_decoding_restores_any_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode(text).ids[0] == 0
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_too_little_text_for_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="not 1024"):
        train_tokenizer(["x = 1"], 1024)


def test_tokens_are_written_between_bos_and_eos(tokenizer: Tokenizer, tmp_path: Path) -> None:
    documents = [document("a.py", "x = 1\n"), document("b.py", 'print("<|end_of_text|>")\n')]
    counts = write_tokens(tokenizer, documents, path=tmp_path / "train.bin")
    ids = np.fromfile(tmp_path / "train.bin", dtype="<u2")
    assert counts == {"files": 2, "utf8_bytes": 31, "tokens": len(ids)}
    ends = np.flatnonzero(ids == 1)
    assert np.flatnonzero(ids == 0).tolist() == [0, ends[0] + 1]
    texts = [tokenizer.decode(part.tolist()) for part in np.split(ids, [ends[0] + 1])]
    assert texts == [one.text for one in documents]
