"""Text streamed token by token: whole characters, cut before the first stop string, equal to the decoded whole."""

import re
from collections.abc import Sequence

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from kangaroo.errors import SettingsError
from kangaroo.model.text import TextStream
from kangaroo.model.tokenizer import Tokenizer
from tests.tiny import EOS, VOCAB_SIZE, tiny_tokenizer

SAMPLES = [
    "the kangaroo \U0001f998\U0001f998 jumps \U0001f44d\U0001f3fd",
    "\u4f60\u597d\u4e16\u754c caf\u00e9 \ufffd",
    "\u65e5\u672c\u8a9e \U0001f469\u200d\U0001f680",
]


def byte_level() -> tokenizers.Tokenizer:
    """A byte-level BPE whose merges join bytes within and across characters."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, min_frequency=1, special_tokens=[EOS], initial_alphabet=alphabet,
                                  show_progress=False)  # fmt: skip
    backend.train_from_iterator(SAMPLES, trainer)
    return backend


def sentencepiece_like() -> tokenizers.Tokenizer:
    """Spaces as U+2581 with the first one stripped, and bytes where there is no piece, as in Llama 2."""
    pieces = [
        "<unk>",
        EOS,
        "\u2581",
        "\u2581a",
        "a",
        "b",
        "\u2581bc",
        "\u4f60",
        "\ufffd",
        *(f"<0x{n:02X}>" for n in range(256)),
    ]
    backend = tokenizers.Tokenizer(models.BPE(vocab={piece: n for n, piece in enumerate(pieces)}, merges=[],
                                              unk_token="<unk>", byte_fallback=True))  # fmt: skip
    backend.add_special_tokens(["<unk>", EOS])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


TOKENIZER = Tokenizer(tiny_tokenizer(), settings={}, chat_template=None)
BYTE_LEVEL = Tokenizer(byte_level(), settings={}, chat_template=None)
SENTENCEPIECE_LIKE = Tokenizer(sentencepiece_like(), settings={}, chat_template=None)


def spell(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """What a stream gives for every token, and at its end."""
    decoder = tokenizer.stream_decoder()
    return [*map(decoder.step, ids), decoder.finish()]


@given(text=st.text())
def test_stream_completes_characters(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert "".join(spell(TOKENIZER, ids)) == text


def test_stream_holds_back_an_unfinished_character() -> None:
    ids = TOKENIZER.encode("aé🦘", add_special_tokens=False)
    assert spell(TOKENIZER, ids) == ["a", "", "é", "", "", "", "🦘", ""]
    assert spell(TOKENIZER, ids[:-1]) == ["a", "", "é", "", "", "", "\ufffd"]


@given(ids=st.lists(st.integers(0, VOCAB_SIZE + 2), max_size=40))
@example(ids=TOKENIZER.encode("🦘" * 3, add_special_tokens=False)[1:-1])
def test_stream_of_any_bytes_joins_to_the_text(ids: list[int]) -> None:
    assert "".join(spell(TOKENIZER, ids)) == TOKENIZER.decode(ids)


@given(ids=st.lists(st.integers(0, BYTE_LEVEL.vocab_size), max_size=40))
def test_stream_of_any_merged_bytes_joins_to_the_text(ids: list[int]) -> None:
    assert "".join(spell(BYTE_LEVEL, ids)) == BYTE_LEVEL.decode(ids)


@given(text=st.lists(st.one_of(st.sampled_from(SAMPLES), st.text(max_size=8))).map("".join), cut=st.integers(0, 5))
def test_stream_of_a_text_cut_anywhere_joins_to_the_text(text: str, cut: int) -> None:
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False)
    ids = ids[: max(0, len(ids) - cut)]
    assert "".join(spell(BYTE_LEVEL, ids)) == BYTE_LEVEL.decode(ids)


def test_merges_of_the_test_tokenizer_end_inside_characters() -> None:
    texts = [BYTE_LEVEL.decode([token_id]) for token_id in range(BYTE_LEVEL.vocab_size)]
    assert any(re.fullmatch(".+\ufffd", text) for text in texts)


@given(ids=st.lists(st.one_of(st.integers(0, 8), st.integers(0, SENTENCEPIECE_LIKE.vocab_size)), max_size=40))
@example(ids=[3, *SENTENCEPIECE_LIKE.encode("🦘"), 9 + 0xFF, 4])
def test_stream_of_byte_fallback_pieces_joins_to_the_text(ids: list[int]) -> None:
    assert "".join(spell(SENTENCEPIECE_LIKE, ids)) == SENTENCEPIECE_LIKE.decode(ids)


def test_stream_keeps_the_spaces_between_words() -> None:
    assert spell(SENTENCEPIECE_LIKE, [3, 4, 3, 1, 6]) == ["a", "a", " a", "", " bc", ""]


def test_stream_costs_the_same_for_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    class Counting:
        def __init__(self, backend: tokenizers.Tokenizer) -> None:
            self.backend = backend

        def __getattr__(self, name: str) -> object:
            return getattr(self.backend, name)

        def decode(self, ids: list[int]) -> str:
            lengths.append(len(ids))
            return self.backend.decode(ids)

    # Torn bytes only, so that no character ever ends.
    ids = TOKENIZER.encode("🦘", add_special_tokens=False)[-1:] * 200
    counted = Tokenizer(Counting(tiny_tokenizer()), settings={}, chat_template=None)  # type: ignore[arg-type]
    assert "".join(spell(counted, ids)) == "\ufffd" * 200
    assert max(lengths) <= 9


def test_two_streams_do_not_mix() -> None:
    left, right = TOKENIZER.stream_decoder().step, TOKENIZER.stream_decoder().step
    first, second = TOKENIZER.encode("é", add_special_tokens=False)
    assert [left(first), right(first), left(second), right(second)] == ["", "", "é", "é"]


WORDS = st.sampled_from(SAMPLES) | st.text("ab\u00e9\u4f60\U0001f998\u0301\n ", max_size=8)
TEXT = st.lists(WORDS).map("".join)
PIECES = [*range(2, 9), *(9 + byte for byte in "\n ab\u00e9\ufffd".encode())]
Case = tuple[Tokenizer, list[int], list[str]]


@st.composite
def stopped(draw: st.DrawFn) -> Case:
    """A tokenizer, ids that spell a text or none, and stop strings that the text often contains or nearly contains."""
    tokenizer = draw(st.sampled_from([TOKENIZER, BYTE_LEVEL, SENTENCEPIECE_LIKE]))
    texts = TEXT.map(lambda text: tokenizer.encode(text, add_special_tokens=False))
    pieces = st.sampled_from(PIECES)
    noise = st.one_of(
        st.lists(pieces | st.integers(0, tokenizer.vocab_size), max_size=40), st.lists(pieces, max_size=20)
    )
    ids = draw(st.one_of(texts, texts.flatmap(lambda ids: st.integers(0, len(ids)).map(lambda n: ids[n:])), noise))
    text = tokenizer.decode(ids)
    places = st.tuples(st.integers(0, max(0, len(text) - 1)), st.integers(1, 9))
    inside = places.map(lambda place: text[place[0] : place[0] + place[1]]).filter(bool) if text else st.nothing()
    nearly = st.tuples(inside, st.sampled_from("ab\u00e9\n ")).map("".join)
    stops = st.one_of(inside, nearly, st.text("ab\u00e9 \n", min_size=1, max_size=5))
    return tokenizer, ids, draw(st.lists(stops, min_size=1, max_size=4))


def read(stream: TextStream, ids: Sequence[int]) -> tuple[list[str], int]:
    """What the stream returns, finish() last, and how many tokens it took."""
    shown = []
    for token_id in ids:
        shown.append(stream.feed(token_id))
        if stream.stopped:
            break
    return [*shown, stream.finish()], len(shown)


def cut(text: str, stop: Sequence[str]) -> str:
    return text[: min((text.index(one) for one in stop if one in text), default=len(text))]


@given(case=stopped())
def test_shown_text_joins_to_the_decoded_text_before_the_first_stop(case: Case) -> None:
    tokenizer, ids, stop = case
    stream = TextStream(tokenizer, stop)
    shown, num_fed = read(stream, ids)
    text = tokenizer.decode(ids[:num_fed])
    assert "".join(shown) == stream.text == cut(text, stop)
    assert stream.stopped == any(one in text for one in stop)
    assert not stream.stopped or text.startswith(stream.text + str(stream.stop))


@given(case=stopped())
def test_stops_at_the_token_that_completes_the_stop(case: Case) -> None:
    tokenizer, ids, stop = case
    stop = [one for one in stop if "\ufffd" not in one]
    stream = TextStream(tokenizer, stop)
    num_fed = read(stream, ids)[1]
    complete = (n for n in range(len(ids) + 1) if any(one in tokenizer.decode(ids[:n]) for one in stop))
    assert num_fed == next(complete, len(ids))


@given(case=stopped())
def test_holds_back_only_what_may_begin_a_stop(case: Case) -> None:
    tokenizer, ids, stop = case
    stream, decoder = TextStream(tokenizer, stop), tokenizer.stream_decoder()
    beginnings = {one[:n] for one in stop for n in range(len(one))}
    complete = ""
    for token_id in ids:
        complete += decoder.step(token_id)
        stream.feed(token_id)
        if stream.stopped:
            break
        ends = [complete[len(complete) - n :] for n in range(len(complete) + 1)]
        longest = max(len(end) for end in ends if end in beginnings)
        assert stream.text == complete[: len(complete) - longest]


@given(case=stopped())
def test_without_stops_it_shows_what_the_decoder_gives(case: Case) -> None:
    tokenizer, ids, _ = case
    stream = TextStream(tokenizer, [])
    assert read(stream, ids) == (spell(tokenizer, ids), len(ids))
    assert stream.text == tokenizer.decode(ids)
    assert stream.stop is None


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("aaab", ["aab"], ["", "", "a", "", ""]),
        ("ababac", ["abac"], ["", "", "", "ab", "", "", ""]),
        ("abc", ["abd"], ["", "", "abc", ""]),
        ("ab", ["abc"], ["", "", "ab"]),
        ("abcd", ["bcd", "bc"], ["a", "", "", ""]),
        ("abce", ["abcd", "bc"], ["", "", "a", ""]),
        ("x\u00e9y", ["\u00e9y"], ["x", "", "", "", ""]),
        ("e\u0301", ["\u0301"], ["e", "", "", ""]),
    ],
)
def test_stream_with_stops_token_by_token(text: str, stop: list[str], shown: list[str]) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert read(TextStream(TOKENIZER, stop), ids)[0] == shown


def test_stop_inside_a_token_cuts_the_token() -> None:
    ids = BYTE_LEVEL.encode(" kangaroo jumps", add_special_tokens=False)
    assert BYTE_LEVEL.decode(ids[:1]) == " kangaroo"
    stream = TextStream(BYTE_LEVEL, ["gar"])
    assert read(stream, ids) == ([" kan", ""], 1)
    assert stream.stop == "gar"


@pytest.mark.parametrize(
    ("stop", "shown"),
    [
        ("\n\n", ["a", "", "", ""]),
        ("a\n", ["", "", ""]),
        ("\n\nb", ["a", "", "", "", "", ""]),
        ("\U0001f998", ["a", "", "", "", "", "", "", "", "\n\nb", ""]),
        ("\nb\U0001f998", ["a", "", "", "", "", "", "", "", "\n", ""]),
    ],
)
def test_stop_of_byte_pieces_is_met_before_the_run_ends(stop: str, shown: list[str]) -> None:
    newline, b, eos = 9 + 0x0A, 9 + 0x62, 1
    ids = [3, newline, newline, eos, b, *(9 + byte for byte in "\U0001f998".encode()), 4]
    stream = TextStream(SENTENCEPIECE_LIKE, [stop])
    assert read(stream, ids) == (shown, len(shown) - 1)
    assert stream.stopped


def test_broken_byte_pieces_are_no_stop() -> None:
    a, lead, newline, broken = 4, 9 + 0xF0, 9 + 0x0A, 9 + 0xFF
    shown = ["", "", "\ufffd\ufffda", ""]
    assert read(TextStream(SENTENCEPIECE_LIKE, ["\n"]), [lead, newline, a]) == (shown, 3)
    assert read(TextStream(SENTENCEPIECE_LIKE, ["\na"]), [newline, broken, a]) == (shown, 3)


def test_stop_begun_by_a_stripped_space_is_not_met() -> None:
    space, a = 9 + 0x20, 9 + 0x61
    stream = TextStream(SENTENCEPIECE_LIKE, [" a"])
    assert read(stream, [space, a, space, a, 4]) == (["", "", "", "a", ""], 4)


def test_unfinished_character_is_no_stop_until_the_end() -> None:
    ids = TOKENIZER.encode("a\u00e9", add_special_tokens=False)
    whole, torn = TextStream(TOKENIZER, ["\ufffd"]), TextStream(TOKENIZER, ["\ufffd"])
    assert read(whole, ids)[0] == ["a", "", "\u00e9", ""]
    assert read(torn, ids[:-1])[0] == ["a", "", ""]
    assert (whole.stop, torn.stop) == (None, "\ufffd")


def test_eos_anywhere_adds_nothing() -> None:
    ids = TOKENIZER.encode("abc", add_special_tokens=False)
    for n in range(4):
        stream = TextStream(TOKENIZER, ["bd"])
        assert "".join(read(stream, [*ids[:n], 257])[0]) == stream.text == "abc"[:n]


def test_nothing_may_be_fed_after_the_stop() -> None:
    ids = TOKENIZER.encode("ab", add_special_tokens=False)
    stream = TextStream(TOKENIZER, ["a"])
    stream.feed(ids[0])
    with pytest.raises(AssertionError, match="after the stop string"):
        stream.feed(ids[1])


def test_empty_stop_string_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"stop strings must not be empty, got \['a', ''\]"):
        TextStream(TOKENIZER, ["a", ""])


def test_stop_of_any_length_costs_the_same_for_every_character() -> None:
    num_compared = 0

    class Counting(str):
        def __getitem__(self, index: object) -> str:
            nonlocal num_compared
            num_compared += isinstance(index, int)
            return super().__getitem__(index)  # type: ignore[index]

    text = "a" * 500
    stream = TextStream(TOKENIZER, [Counting("a" * 300 + "b")])
    read(stream, TOKENIZER.encode(text, add_special_tokens=False))
    assert stream.text == text
    assert num_compared <= 6 * len(text)
