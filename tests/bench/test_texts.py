"""The target's texts, decoded again by drafters in turn."""

import pytest

from kangaroo.bench.texts import Decoder, Text, add_runs, decode_texts, fill_batches, race, split_texts
from kangaroo.drafters.layer_skip import LayerSkipDrafter
from kangaroo.drafters.plain import PlainDrafter
from kangaroo.drafters.stopping import FixedLength
from kangaroo.model import packed
from kangaroo.model.skips import NO_SKIPS
from kangaroo.model.transformer import Transformer
from tests.tiny import tame_transformer


@pytest.fixture(scope="module")
def target() -> Transformer:
    return packed.pack(tame_transformer("llama", 1))


@pytest.fixture(scope="module")
def texts(target: Transformer) -> list[Text]:
    return decode_texts(target, [(9, 77, 210), (3, 140), (8,)], eos_ids=frozenset(), max_new_tokens=13)


def test_texts_are_decoded_to_their_lengths_whatever_the_batch(target: Transformer, texts: list[Text]) -> None:
    one = Decoder(target, PlainDrafter())
    single = add_runs([one.run([text]) for text in texts])
    together = Decoder(target, PlainDrafter(), batch_size=3).run(texts)
    for run in (single, together):
        assert (run.num_tokens, run.num_steps, run.num_drafted, run.num_timed) == (36, 36, 0, 36)
        assert run.decode_time_s > 0
        assert run.tokens_per_s == pytest.approx(36 / run.decode_time_s)
    assert 0 < single.draft_time_s + single.verify_time_s < single.decode_time_s


def test_a_race_counts_what_each_drafter_did(target: Transformer, texts: list[Text]) -> None:
    drafter = LayerSkipDrafter(target, NO_SKIPS, stopping=FixedLength(3))
    plain, drafted = race(target, [drafter], texts=texts, batch_size=2, num_rounds=2)
    assert plain.speedup == 1.0
    # All rounds count: twice the 12 tokens behind the first of each of three texts.
    assert (plain.run.num_tokens, drafted.run.num_tokens) == (72, 72)
    assert plain.run.tokens_per_step == 1.0
    assert drafted.run.tokens_per_step == 4.0
    assert drafted.run.acceptance_rate == 1.0
    assert drafted.speedup > 0


def test_batches_are_filled_from_the_first_text_on() -> None:
    assert fill_batches([1, 2, 3], 1) == fill_batches([1, 2, 3], 3) == [1, 2, 3]
    assert fill_batches([1, 2, 3], 2) == [1, 2, 3, 1]
    assert fill_batches([1, 2, 3], 7) == [1, 2, 3, 1, 2, 3, 1]


def test_texts_are_split_into_groups_in_order() -> None:
    assert split_texts([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]
