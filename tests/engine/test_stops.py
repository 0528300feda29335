"""Where a text ends: at EOS and stop strings, wherever they fall in a draft, in batches, chains and trees."""

from collections.abc import Sequence as SequenceOf

import pytest
import tokenizers
from tokenizers import decoders, models

from kangaroo.engine.decoding import Decoding
from kangaroo.engine.engine import Engine
from kangaroo.engine.scheduler import Limits
from kangaroo.kernels import cpu
from kangaroo.model.text import TextStream
from kangaroo.model.tokenizer import Tokenizer
from kangaroo.types import Request, SamplingParams
from tests.engine.cases import ALL, CASES, ON_NATIVE, Case, find_case, target_on
from tests.engine.scenarios import decode_alone, prompt
from tests.engine.scripts import Texts
from tests.native import kernels_restored  # noqa: F401
from tests.tiny import VOCAB_SIZE

BACKEND, FAMILY = ON_NATIVE[0], "llama"
PROMPT = prompt(7, 1)
NUM_NEW_TOKENS = 20
MODES = {
    "greedy": SamplingParams(max_new_tokens=NUM_NEW_TOKENS, seed=0),
    "sampled": SamplingParams(max_new_tokens=NUM_NEW_TOKENS, seed=4, temperature=0.9, top_p=0.9),
}
DRAFTING = [case for case in CASES if case.accepts]


def endless_text(mode: str) -> tuple[int, ...]:
    """What plain decoding emits if nothing ends it."""
    return decode_alone(BACKEND, FAMILY, Request(PROMPT, MODES[mode])).tokens


def decode_together(case_name: str, requests: SequenceOf[Request], texts: Texts, *, tokenizer: Tokenizer | None = None
                    ) -> list[Decoding]:  # fmt: skip
    """Decode all in batches of 8; the drafter goes on guessing behind where a text is to end."""
    cpu.select(BACKEND.kernels, num_threads=1)
    target = target_on(BACKEND, FAMILY)
    engine = Engine(target, find_case(case_name).build(target, texts), limits=Limits(8))
    begun = []
    for request in requests:
        text = None if tokenizer is None else TextStream(tokenizer, request.params.stop)
        begun.append(engine.submit(request, text))
    for one in begun:
        engine.run(one)
    assert engine.scheduler.num_free_slots == 8
    return begun


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", DRAFTING, ids=lambda case: case.name)
def test_eos_ends_the_text_wherever_it_falls_in_a_draft(case: Case, mode: str) -> None:
    text = endless_text(mode)
    new = text[len(PROMPT) :]
    requests = [Request(PROMPT, MODES[mode], frozenset({eos})) for eos in dict.fromkeys(new)]
    begun = decode_together(case.name, requests, dict.fromkeys(requests, text))
    for request, decoding in zip(requests, begun, strict=True):
        (eos,) = request.eos_ids
        assert decoding.new_tokens == list(new[: new.index(eos) + 1])
        assert decoding.finish_reason == "stop"
    if ALL in case.accepts:
        assert {one.sequence.origins[-1] for one in begun} == {"draft", "bonus"}


@pytest.mark.parametrize("mode", MODES)
def test_eos_at_every_position_of_an_accepted_draft_ends_the_text_there(mode: str) -> None:
    text = endless_text(mode)
    new = text[len(PROMPT) :]
    requests = [Request(PROMPT, MODES[mode], frozenset({eos})) for eos in dict.fromkeys(new[1:6])]
    begun = decode_together("always_right", requests, dict.fromkeys(requests, text))
    # The first step drafts four tokens and emits a fifth.
    assert [one.accepted_lengths for one in begun] == [[length] for length in range(1, 6)]
    assert [one.sequence.origins[-1] for one in begun] == ["draft"] * 4 + ["bonus"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Two letters a token, so that stop strings begin and end inside tokens too."""
    letters = "abcdefghijklmnopq"
    pieces = [first + second for first in letters for second in letters][:VOCAB_SIZE]
    backend = tokenizers.Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend, settings={}, chat_template=None)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case_name", ["plain", "right_at_first", "branching", "kangaroo-tree-fixed4"])
def test_stop_strings_end_the_text_across_tokens_and_drafts(tokenizer: Tokenizer, case_name: str, mode: str) -> None:
    text = endless_text(mode)
    new = list(text[len(PROMPT) :])
    whole = tokenizer.decode(new)
    assert len(whole) == 2 * NUM_NEW_TOKENS
    stops = dict.fromkeys(whole[at : at + size] for size in (1, 3, 6) for at in range(len(whole) - size + 1))
    params = MODES[mode]
    requests = [Request(PROMPT, SamplingParams(NUM_NEW_TOKENS, params.temperature, params.seed, top_p=params.top_p,
                                               stop=("zz", stop))) for stop in stops]  # fmt: skip
    begun = decode_together(case_name, requests, dict.fromkeys(requests, text), tokenizer=tokenizer)
    for stop, decoding in zip(stops, begun, strict=True):
        end = whole.index(stop) + len(stop)
        assert decoding.new_tokens == new[: -(-end // 2)]
        assert "".join(decoding.pieces) == whole[: end - len(stop)]
        assert decoding.finish_reason == "stop"
