"""Draft & Verify drafts on the target's own cache, and whatever it skips, the text is plain decoding's."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kangaroo.drafters.base import Batch, Drafter
from kangaroo.drafters.layer_skip import LayerSkipDrafter, build
from kangaroo.drafters.plain import PlainDrafter
from kangaroo.drafters.settings import LayerSkipSettings
from kangaroo.drafters.stopping import (
    AdaptiveSettings,
    AdaptiveThreshold,
    ConfidenceThreshold,
    FixedLength,
    StoppingPolicy,
)
from kangaroo.drafters.tree import CHAIN, Branching
from kangaroo.engine.decoding import Decoding
from kangaroo.engine.engine import Engine
from kangaroo.engine.scheduler import Limits
from kangaroo.errors import SettingsError, SkipLayersError
from kangaroo.kernels import REFERENCE, cpu
from kangaroo.model import packed
from kangaroo.model.checkpoint import LoadedModel
from kangaroo.model.skips import NO_SKIPS, SkippedSublayers
from kangaroo.model.tokenizer import Tokenizer
from kangaroo.model.transformer import Transformer
from kangaroo.types import Draft, Request, SamplingParams
from tests.tiny import save_tiny_tokenizer, tame_transformer

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2"]
NUM_NEW_TOKENS = 20
PROMPTS = [(9, 77, 210, 31, 5, 66), (3, 140), tuple(range(40, 57))]
PARAMS = {
    "greedy": SamplingParams(max_new_tokens=NUM_NEW_TOKENS),
    "sampled": SamplingParams(max_new_tokens=NUM_NEW_TOKENS, temperature=0.8, seed=11),
    "penalised": SamplingParams(NUM_NEW_TOKENS, temperature=1.1, seed=3, repetition_penalty=1.3, top_k=20),
}
SKIPS = SkippedSublayers(attention=frozenset({2}), mlp=frozenset({1, 3}))
TREE = Branching(num_siblings=3, max_nodes=14)


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    before = cpu.selected(), cpu.num_threads()
    cpu.select(before[0], num_threads=1)
    yield
    cpu.select(before[0], num_threads=before[1])


def make_target(family: str, backend: str) -> Transformer:
    target = tame_transformer(family, 1)
    return target if backend == REFERENCE else packed.pack(target)


def run(target: Transformer, drafter: Drafter, params: SamplingParams) -> list[Decoding]:
    engine = Engine(target, drafter, limits=Limits(max_batch_size=3))
    decodings = [engine.submit(Request(prompt, params)) for prompt in PROMPTS]
    for one in decodings:
        engine.run(one)
    return decodings


@pytest.mark.parametrize("branching", [CHAIN, TREE], ids=["chain", "tree"])
@pytest.mark.parametrize("mode", PARAMS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", ["native", REFERENCE])
def test_a_batch_gets_the_texts_of_plain_decoding(backend: str, family: str, mode: str, branching: Branching) -> None:
    target = make_target(family, backend)
    plain = run(target, PlainDrafter(), PARAMS[mode])
    # On the tiny models of these tests no choice of the reference kernels is a near-tie.
    drafter = LayerSkipDrafter(target, SKIPS, stopping=FixedLength(4), branching=branching)
    drafted = run(target, drafter, PARAMS[mode])
    assert [one.new_tokens for one in drafted] == [one.new_tokens for one in plain]
    assert sum(one.num_accepted for one in drafted) > 0
    assert sum(one.num_steps for one in drafted) < sum(one.num_steps for one in plain)


@pytest.mark.parametrize(
    "stopping", [ConfidenceThreshold(5, 0.4), AdaptiveThreshold(5, AdaptiveSettings(initial_threshold=0.2))]
)
@pytest.mark.parametrize("backend", ["native", REFERENCE])
def test_stopping_rules_change_drafts_but_no_text(backend: str, stopping: StoppingPolicy) -> None:
    target = make_target("llama", backend)
    plain = run(target, PlainDrafter(), PARAMS["greedy"])
    drafted = run(target, LayerSkipDrafter(target, SKIPS, stopping=stopping), PARAMS["greedy"])
    assert [one.new_tokens for one in drafted] == [one.new_tokens for one in plain]
    fixed = run(target, LayerSkipDrafter(target, SKIPS, stopping=FixedLength(5)), PARAMS["greedy"])
    assert sum(one.num_drafted for one in drafted) < sum(one.num_drafted for one in fixed)


@pytest.mark.parametrize("mode", ["greedy", "sampled"])
def test_a_draft_that_skips_nothing_is_always_right(mode: str) -> None:
    target = make_target("qwen3", "native")
    for one in run(target, LayerSkipDrafter(target, NO_SKIPS, stopping=FixedLength(3)), PARAMS[mode]):
        assert one.num_accepted == one.num_drafted
        assert one.accepted_lengths == [4, 4, 4, 4, 3]


@pytest.mark.parametrize("acceptance", ["rejection", "block"])
def test_rejecting_by_chance_learns_what_guesses_were_drawn_from(acceptance: str) -> None:
    target = make_target("llama", "native")
    params = SamplingParams(max_new_tokens=NUM_NEW_TOKENS, temperature=1.0, seed=5, acceptance=acceptance)  # type: ignore[arg-type]
    drafts: list[Draft] = []

    class Recording(LayerSkipDrafter):
        def draft(self, batch: Batch) -> Draft:
            drafts.append(super().draft(batch))
            return drafts[-1]

    # What skips nothing proposes what the target would draw from: all of it is accepted.
    drafter = Recording(target, NO_SKIPS, stopping=FixedLength(3), branching=TREE)
    for one in run(target, drafter, params):
        assert one.num_accepted == one.num_drafted > 0
        assert one.error is None
    for draft in drafts:
        assert draft.proposals is not None
        for row, parents in enumerate(draft.parents):
            assert list(parents) == list(range(-1, len(parents) - 1))
            assert sorted(draft.proposals[row]) == list(range(len(parents) - 1))
            tokens = draft.tokens[row]
            assert all(draft.proposals[row][node][tokens[node + 1]] > 0 for node in range(len(parents) - 1))


@pytest.mark.parametrize("branching", [CHAIN, TREE], ids=["chain", "tree"])
def test_verification_starts_at_layer_0_and_finds_the_committed_slots_untouched(branching: Branching) -> None:
    target = make_target("gemma2", REFERENCE)
    drafter = LayerSkipDrafter(target, SKIPS, stopping=FixedLength(4), branching=branching)
    num_drafts = 0

    class Checking(LayerSkipDrafter):
        def draft(self, batch: Batch) -> Draft:
            nonlocal num_drafts
            kept = [
                (stored, one.slot, stored[one.slot, :, : batch.cache.lengths[one.slot]].clone())
                for one in batch.sequences
                for stored in (*batch.cache.keys, *batch.cache.values)
            ]
            lengths = list(batch.cache.lengths)
            draft = super().draft(batch)
            assert draft.resume_layer == 0
            assert draft.hidden is None
            assert batch.cache.lengths == lengths
            assert all(torch.equal(stored[slot, :, : before.shape[1]], before) for stored, slot, before in kept)
            num_drafts += 1
            return draft

    drafter.__class__ = Checking
    run(target, drafter, PARAMS["greedy"])
    assert num_drafts > 3


def test_one_threshold_learns_from_all_sequences() -> None:
    seen: list[tuple[int, int]] = []

    class Counting(AdaptiveThreshold):
        def observe(self, num_drafted: int, num_accepted: int) -> None:
            seen.append((num_drafted, num_accepted))
            super().observe(num_drafted, num_accepted)

    target, policy = make_target("llama", "native"), Counting(4, AdaptiveSettings(initial_threshold=0.1))
    done = run(target, LayerSkipDrafter(target, SKIPS, stopping=policy), PARAMS["greedy"])
    assert len(seen) == sum(one.num_steps for one in done) - sum(one.accepted_lengths[-1] == 1 for one in done)
    assert sum(drafted for drafted, _ in seen) == sum(one.num_drafted for one in done)


def test_it_needs_no_taps_and_ends_with_nothing_remembered() -> None:
    target = make_target("llama", "native")
    drafter = LayerSkipDrafter(target, SKIPS, stopping=FixedLength(2))
    run(target, drafter, PARAMS["greedy"])
    assert drafter.taps == ()
    assert drafter._depths._depths == {}


def loaded(folder: Path, name: str = "tiny") -> LoadedModel:
    save_tiny_tokenizer(folder)
    target = make_target("llama", "native")
    return LoadedModel(name, folder, target, Tokenizer.from_folder(folder), frozenset())


def test_the_skip_list_beside_the_model_is_taken_unless_another_is_given(tmp_path: Path) -> None:
    model, other = loaded(tmp_path), tmp_path / "other.json"
    (tmp_path / "skip_layers.json").write_text('{"tiny": {"attention": [2], "mlp": [1, 3]}}')
    other.write_text('{"x": {"attention": [], "mlp": []}, "tiny": {"attention": [0], "mlp": []}}')
    assert build(model, LayerSkipSettings()).skips == SKIPS
    assert build(model, LayerSkipSettings(skip_layers=str(other))).skips == SkippedSublayers(frozenset({0}))


def test_settings_choose_the_stopping_rule(tmp_path: Path) -> None:
    model = loaded(tmp_path)
    (tmp_path / "skip_layers.json").write_text('{"tiny": {"attention": [2], "mlp": []}}')

    def stopping(**settings: Any) -> StoppingPolicy:
        return build(model, LayerSkipSettings(**settings))._stopping

    adaptive = stopping(gamma=5)
    assert isinstance(adaptive, AdaptiveThreshold)
    assert vars(adaptive) == vars(AdaptiveThreshold(5))
    assert stopping(eta=AdaptiveSettings(initial_threshold=0.3)).threshold == 0.3
    assert stopping(gamma=5, eta=0.0) == FixedLength(5)
    assert stopping(gamma=5, eta=0.3) == ConfidenceThreshold(5, 0.3)
    with pytest.raises(SettingsError, match="eta must be in"):
        stopping(eta=1.5)


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"attention": [4], "mlp": []}, r"skip_layers.json: layers must be in 0\.\.3, got 4"),
        ({"attention": [0, 1, 2, 3], "mlp": [0, 1, 2, 3]}, "skip_layers.json: skips all 8 sublayers"),
        ({"attention": [0]}, "an entry must be"),
        (None, "cannot read the skip list"),
    ],
)
def test_skip_lists_that_do_not_fit_are_refused_in_one_line(tmp_path: Path, entry: object, match: str) -> None:
    if entry is not None:
        (tmp_path / "skip_layers.json").write_text(json.dumps({"tiny": entry}))
    with pytest.raises(SkipLayersError, match=match) as info:
        build(loaded(tmp_path), LayerSkipSettings())
    assert "\n" not in str(info.value)
