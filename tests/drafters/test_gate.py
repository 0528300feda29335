"""The gate lets a drafter guess only where the target was sure of its last choice."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kangaroo.drafters.base import Batch
from kangaroo.drafters.gate import GatedDrafter
from kangaroo.engine.decoding import Decoding
from kangaroo.engine.engine import Engine
from kangaroo.engine.scheduler import Limits
from kangaroo.errors import SettingsError
from kangaroo.model import packed
from kangaroo.model.transformer import FullSequencePass, Transformer
from kangaroo.types import Draft, Request, SamplingParams
from tests.engine.scripts import TextDrafter
from tests.lossless import PROMPTS
from tests.tiny import tiny_config, tiny_transformer

NUM_NEW_TOKENS = 30
PARAMS = {
    "greedy": SamplingParams(NUM_NEW_TOKENS, seed=0),
    "sampled": SamplingParams(NUM_NEW_TOKENS, temperature=0.8, seed=3),
}
Texts = dict[tuple[int, ...], list[int]]


@pytest.fixture(scope="module")
def loose() -> Transformer:
    return tiny_transformer(tiny_config(num_hidden_layers=2))


class Watched(TextDrafter):
    """Notes for every guess that might be made whether it was: slot, length of the text, depth allowed."""

    def __init__(self, texts: Texts) -> None:
        super().__init__(texts, gamma=2)
        self.taps = (1,)
        self.asked: list[tuple[int, int, int]] = []

    def draft(self, batch: Batch) -> Draft:
        self.asked += [(one.slot, len(one.tokens), one.max_draft) for one in batch.sequences]
        return super().draft(batch)


def decode(target: Transformer, threshold: float, params: SamplingParams, *, texts: Texts) -> tuple[Watched, list[int]]:
    """Decode all prompts together behind a gate that holds nothing afterwards; returns drafter and accepted lengths."""
    drafter = Watched(texts)
    gate = GatedDrafter(target, drafter, threshold=threshold)
    engine = Engine(target, gate, limits=Limits(len(PROMPTS)))
    begun = [engine.submit(Request(prompt, params)) for prompt in PROMPTS]
    for one in begun:
        engine.run(one)
        assert one.new_tokens == texts[one.request.prompt_ids][len(one.request.prompt_ids) :]
    assert gate._closed == set()
    assert drafter.held == set()
    return drafter, [length for one in begun for length in one.accepted_lengths]


def plain_texts(target: Transformer, params: SamplingParams) -> Texts:
    return {prompt: [*prompt, *run(target, prompt, params).new_tokens] for prompt in PROMPTS}


def run(target: Transformer, prompt: tuple[int, ...], params: SamplingParams) -> Decoding:
    engine = Engine(target, TextDrafter({}, gamma=1))
    decoding = engine.submit(Request(prompt, params))
    engine.run(decoding)
    return decoding


def confidences(target: Transformer, tokens: Sequence[int]) -> Tensor:
    """The raw top-1 probability [T] behind every token of a text, by one pass without a cache."""
    attention = FullSequencePass(target.config, len(tokens), device=target.device)
    hidden, _ = target.forward(target.embed(torch.tensor([tokens])), (0, target.num_layers), attention=attention)
    return torch.softmax(target.logits(hidden)[0], dim=-1).max(dim=-1).values


@pytest.mark.parametrize("mode", PARAMS)
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_gate_closes_behind_an_unsure_choice_of_a_text_and_opens_behind_a_sure_one(
    loose: Transformer, backend: str, mode: str
) -> None:
    target, params = loose if backend == "reference" else packed.pack(loose), PARAMS[mode]
    texts = plain_texts(target, params)
    chances = [confidences(loose, text) for text in texts.values()]
    ordered = torch.cat([one[-NUM_NEW_TOKENS:] for one in chances]).sort().values
    # Between two of them, so that none is a matter of rounding.
    threshold = ordered[len(ordered) // 2 - 1 : len(ordered) // 2 + 1].mean().item()
    drafter, lengths = decode(target, threshold, params, texts=texts)
    switches = set()
    for slot, text in enumerate(texts.values()):
        is_open = []
        for asked, length, max_draft in drafter.asked:
            # The last token is never behind a guess.
            if asked == slot and length < len(text) - 1:
                assert (max_draft > 0) == bool(chances[slot][length - 2] >= threshold)
                is_open.append(max_draft > 0)
        switches |= set(pairwise(is_open))
    assert {(True, False), (False, True)} <= switches
    assert {1, 3} <= set(lengths)


def test_gate_at_zero_never_closes_and_at_one_is_never_open(loose: Transformer) -> None:
    texts = plain_texts(loose, PARAMS["greedy"])
    _, lengths = decode(loose, 0.0, PARAMS["greedy"], texts=texts)
    # 29 tokens behind the first one, by threes.
    assert lengths == [*[3] * 9, 2] * len(PROMPTS)
    drafter, lengths = decode(loose, 1.0, PARAMS["greedy"], texts=texts)
    assert lengths == [1] * 29 * len(PROMPTS)
    assert {max_draft for _, _, max_draft in drafter.asked} == {0}


def test_cancelled_sequence_is_forgotten(loose: Transformer) -> None:
    drafter = Watched({})
    gate = GatedDrafter(loose, drafter, threshold=1.0)
    engine = Engine(loose, gate)
    decoding = engine.submit(Request(PROMPTS[0], PARAMS["greedy"]))
    engine.step()
    assert gate._closed == drafter.held == {decoding.sequence}
    engine.cancel(decoding)
    assert gate._closed == drafter.held == set()


def test_gate_passes_as_its_drafter_and_taps_the_last_states_too(loose: Transformer) -> None:
    gate = GatedDrafter(loose, Watched({}), threshold=0.5)
    assert gate.name == "scripted"
    assert gate.taps == (1, 2)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_threshold_that_is_no_probability_is_refused(loose: Transformer, threshold: float) -> None:
    with pytest.raises(SettingsError, match=rf"threshold must be in \[0, 1\], got {threshold}"):
        GatedDrafter(loose, Watched({}), threshold=threshold)
