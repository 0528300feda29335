"""Kangaroo shares the target's first layers: nothing is computed twice, nothing is left over, nothing waits."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kangaroo.drafters import kangaroo as module
from kangaroo.drafters.adapter import KINDS, Adapter, Kind
from kangaroo.drafters.base import MAX_NODES, Batch, is_chain
from kangaroo.drafters.base import Sequence as DecodedSequence
from kangaroo.drafters.gate import GatedDrafter
from kangaroo.drafters.kangaroo import KangarooDrafter, build
from kangaroo.drafters.plain import PlainDrafter
from kangaroo.drafters.settings import KangarooSettings
from kangaroo.drafters.stopping import (
    AdaptiveSettings,
    AdaptiveThreshold,
    ConfidenceThreshold,
    FixedLength,
    StoppingPolicy,
)
from kangaroo.drafters.tree import Branching
from kangaroo.engine import engine as engine_module
from kangaroo.engine.decoding import Decoding
from kangaroo.engine.engine import Engine
from kangaroo.engine.scheduler import Limits
from kangaroo.engine.step import prefill
from kangaroo.errors import AdapterError, SettingsError
from kangaroo.kernels import cpu
from kangaroo.model import packed
from kangaroo.model.cache import CachedPass, KVCache, Segment
from kangaroo.model.checkpoint import LoadedModel
from kangaroo.model.tokenizer import Tokenizer
from kangaroo.model.transformer import FullSequencePass, Transformer
from kangaroo.model.weights import assemble, disassemble
from kangaroo.types import Draft, Outcome, Request, SamplingParams
from tests.engine.scenarios import Pace
from tests.tiny import noisy_adapter, tame_transformer, tiny_tokenizer

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2"]
EXIT_LAYER = 2
PROMPT = (9, 77, 210, 31, 5, 66, 66, 140)


def tame_target(family: str = "llama") -> Transformer:
    return tame_transformer(family, EXIT_LAYER)


def make_drafter(target: Transformer, stopping: StoppingPolicy, kind: Kind = "attention") -> KangarooDrafter:
    # Small enough to leave most predictions right, large enough to show in every comparison.
    adapter = noisy_adapter(target, EXIT_LAYER, kind=kind, noise=0.1, seed=4)
    return KangarooDrafter(target, adapter, stopping=stopping)


class Recorder:
    """Runs a request to its end, keeping every draft with the text it was made for, and every outcome."""

    def __init__(self, drafter: KangarooDrafter, target: Transformer, params: SamplingParams) -> None:
        self.drafts: list[tuple[list[int], Draft]] = []
        self.outcomes: list[Outcome] = []
        self.engine = Engine(target, drafter)
        self.drafter = drafter
        self._draft, self._accept = drafter.draft, drafter.accept
        drafter.draft, drafter.accept = self.draft, self.accept  # type: ignore[method-assign]
        self.decoding: Decoding = self.engine.submit(Request(PROMPT, params))

    def draft(self, batch: Batch) -> Draft:
        draft = self._draft(batch)
        self.drafts.append((list(batch.sequences[0].tokens), draft))
        self.after_draft(batch, draft)
        return draft

    def after_draft(self, batch: Batch, draft: Draft) -> None:
        """A hook for checks between drafting and verification."""

    def accept(self, sequences: Any, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self._accept(sequences, outcome)

    def finish(self) -> None:
        self.engine.run(self.decoding)

    @property
    def text(self) -> list[int]:
        """The prompt and what came after it."""
        return [*PROMPT, *self.decoding.new_tokens]

    def steps(self) -> Iterator[tuple[list[int], Draft, Outcome]]:
        """Text, draft and outcome of every step."""
        for (text, draft), outcome in zip(self.drafts, self.outcomes[1:], strict=True):
            yield text, draft, outcome


def fresh_pass(target: Transformer, tokens: Sequence[int], stop: int) -> tuple[KVCache, Tensor]:
    """Cache after, and states [T, D] that leave, layers [0, stop) over a whole text in one pass."""
    cache = KVCache(target.config, 1, num_slots=len(tokens), dtype=torch.float32, device=target.device)
    attention = CachedPass(cache, [Segment(0, 0, len(tokens))])
    hidden, _ = target.forward(target.embed(torch.tensor(tokens)), (0, stop), attention=attention)
    return cache, hidden


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_written_while_drafting_equal_those_of_a_fresh_pass(family: str) -> None:
    target = tame_target(family)

    class Checking(Recorder):
        def after_draft(self, batch: Batch, draft: Draft) -> None:
            if draft.num_nodes == (1,):
                return
            text = batch.sequences[0].tokens + draft.tokens[0][1:]
            fresh, hidden = fresh_pass(target, text, EXIT_LAYER)
            for layer in range(EXIT_LAYER):
                for mine, other in ((batch.cache.keys, fresh.keys), (batch.cache.values, fresh.values)):
                    written = mine[layer][0, :, : len(text)]
                    torch.testing.assert_close(written, other[layer][0], rtol=1e-4, atol=1e-4)
            assert draft.hidden is not None
            torch.testing.assert_close(draft.hidden, hidden[-draft.num_nodes[0] :], rtol=1e-4, atol=1e-4)

    recorder = Checking(make_drafter(target, FixedLength(4)), target, SamplingParams(max_new_tokens=24))
    recorder.finish()
    assert len(recorder.drafts) > 4


@pytest.mark.parametrize("stopping", [FixedLength(3), ConfidenceThreshold(5, 0.4)], ids=["fixed", "threshold"])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_cache_after_many_steps_equals_a_fresh_pass_of_the_adapter(
    family: str, stopping: StoppingPolicy
) -> None:
    target = tame_target(family)
    drafter = make_drafter(target, stopping)
    recorder = Recorder(drafter, target, SamplingParams(max_new_tokens=60))
    while len(recorder.decoding.new_tokens) < 40:
        recorder.engine.step()
    mine, tokens = drafter._cache, recorder.text
    _, hidden = fresh_pass(target, tokens, EXIT_LAYER)
    adapter, num_rows = drafter._adapter, mine.lengths[0]
    fresh = KVCache(adapter.model_config, 1, num_slots=num_rows, dtype=torch.float32, device=target.device)
    adapter.forward(hidden[:num_rows], attention=CachedPass(fresh, [Segment(0, 0, num_rows)]))
    # Only what the last step committed may still wait for the next draft.
    (memory,) = drafter._memory.values()
    assert num_rows + sum(map(len, memory.pending)) == len(tokens) - 1
    assert num_rows > len(tokens) - 8
    for kept, expected in ((mine.keys, fresh.keys), (mine.values, fresh.values)):
        torch.testing.assert_close(kept[0][0, :, :num_rows], expected[0][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_confidences_and_guesses_are_those_of_the_adapter_over_the_whole_text(family: str, kind: Kind) -> None:
    target = tame_target(family)
    drafter = make_drafter(target, ConfidenceThreshold(4, 0.2), kind)
    recorder = Recorder(drafter, target, SamplingParams(max_new_tokens=24))
    recorder.finish()
    for text, draft, _ in recorder.steps():
        if draft.num_nodes[0] == 1:
            continue
        tokens = text + draft.tokens[0][1:-1]
        _, hidden = fresh_pass(target, tokens, EXIT_LAYER)
        attention = FullSequencePass(drafter._adapter.model_config, len(tokens), device=target.device)
        adapter = drafter._adapter
        logits = adapter.head(target).head_logits(adapter.forward(hidden[None], attention=attention)[0])
        predicted = torch.softmax(logits[len(text) - 1 :], dim=-1).max(dim=-1)
        assert draft.confidence is not None
        assert draft.confidence[0][0] == 1
        assert draft.confidence[0][1:] == pytest.approx(predicted.values.tolist(), rel=1e-4, abs=1e-4)
        assert draft.tokens[0][1:] == predicted.indices.tolist()


@pytest.mark.parametrize("stopping", [FixedLength(4), ConfidenceThreshold(5, 0.4)], ids=["fixed", "threshold"])
def test_every_token_passes_every_layer_once_per_draft(
    monkeypatch: pytest.MonkeyPatch, stopping: StoppingPolicy
) -> None:
    target = tame_target()
    rows: Counter[int] = Counter()
    spans: list[tuple[tuple[int, int], int]] = []
    forward = target.forward

    def spy(hidden: Tensor, span: tuple[int, int], **others: Any) -> Any:
        spans.append((span, len(hidden)))
        rows.update({layer: len(hidden) for layer in range(*span)})
        return forward(hidden, span, **others)

    monkeypatch.setattr(target, "forward", spy)
    recorder = Recorder(make_drafter(target, stopping), target, SamplingParams(max_new_tokens=30))
    recorder.finish()
    num_nodes = [draft.num_nodes[0] for _, draft in recorder.drafts]
    assert rows == dict.fromkeys(range(target.num_layers), len(PROMPT) + sum(num_nodes))
    expected = [((0, target.num_layers), len(PROMPT))]
    # Where no guess is wanted the root passes all layers at once.
    assert num_nodes[-1] == 1
    for count in num_nodes[:-1]:
        expected += [((0, EXIT_LAYER), 1)] * count + [((EXIT_LAYER, target.num_layers), count)]
    expected.append(((0, target.num_layers), 1))
    assert spans == expected


@pytest.mark.parametrize("stopping", [FixedLength(4), ConfidenceThreshold(5, 0.1)], ids=["fixed", "threshold"])
def test_adapter_is_fed_each_accepted_token_once(monkeypatch: pytest.MonkeyPatch, stopping: StoppingPolicy) -> None:
    target = tame_target()
    drafter = make_drafter(target, stopping)
    fed: Counter[int] = Counter()
    run = drafter._adapter.run

    def spy(hidden: Tensor, *, attention: CachedPass) -> Tensor:
        fed.update(attention.positions.tolist())
        return run(hidden, attention=attention)

    monkeypatch.setattr(drafter._adapter, "run", spy)
    recorder = Recorder(drafter, target, SamplingParams(max_new_tokens=30))
    recorder.finish()
    expected = Counter(range(drafter._cache.lengths[0]))
    num_rejected, num_full = 0, 0
    for text, draft, outcome in recorder.steps():
        num_guesses, num_kept = draft.num_nodes[0] - 1, len(outcome.paths[0])
        # The last guess of a draft is never fed; of the other nodes those beyond the path were rejected.
        rejected = range(len(text) - 1 + num_kept, len(text) - 1 + num_guesses)
        expected.update(rejected)
        num_rejected += len(rejected)
        num_full += num_kept == num_guesses + 1
    assert fed == expected
    assert num_rejected > 0
    assert num_full > 0


@contextmanager
def counting_host_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    reads: Counter[str] = Counter()

    def counted(name: str) -> Any:
        original = getattr(Tensor, name)

        def wrapper(self: Tensor, *args: Any) -> Any:
            reads[name] += 1
            return original(self, *args)

        return wrapper

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu", "nonzero"):
            patch.setattr(Tensor, name, counted(name))
        yield reads


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_host_reads_tokens_and_confidences_once_a_level(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    target = tame_target(family)
    drafter = make_drafter(target, ConfidenceThreshold(5, 0.3))
    draft_unwatched, seen = drafter.draft, []

    def watched(batch: Batch) -> Draft:
        with counting_host_reads(monkeypatch) as reads:
            draft = draft_unwatched(batch)
        seen.append((sum(reads.values()), max(draft.num_nodes) - 1))
        return draft

    monkeypatch.setattr(drafter, "draft", watched)
    engine = Engine(target, drafter, limits=Limits(max_batch_size=3))
    begun = [engine.submit(Request((9, first), SamplingParams(max_new_tokens=20))) for first in (1, 2, 3)]
    for decoding in begun:
        engine.run(decoding)
    assert sum(num_levels for _, num_levels in seen) > 6
    assert [reads for reads, _ in seen] == [2 * levels for _, levels in seen]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_drafting_without_a_threshold_never_waits_for_a_device(family: str) -> None:
    """On the meta device, whose tensors have no numbers to read."""
    device = torch.device("meta")
    loose = tame_target(family)
    target = assemble(disassemble(loose), loose.config, storage="float32", device=device)
    made = Adapter.initialize(loose, EXIT_LAYER)
    tensors = {name: tensor.to(device) for name, tensor in made.tensors.items()}
    drafter = KangarooDrafter(target, Adapter(made.config, target.config, tensors=tensors), stopping=FixedLength(4))
    sequences = [DecodedSequence(Request(PROMPT, SamplingParams()), slot=slot, max_draft=4 - slot) for slot in range(2)]
    batch = Batch(target, target.new_cache(2, 32), sequences)
    drafter.begin(sequences, num_slots=32)
    prefill(batch, drafter, num_rows=[len(PROMPT) - 1] * 2)
    draft = drafter.draft(batch)
    assert draft.parents == [[-1, 0, 1, 2, 3], [-1, 0, 1, 2]]
    assert isinstance(draft.tokens, Tensor)
    assert draft.tokens.device == device
    assert draft.tokens.shape == (2, 5)
    assert draft.hidden is not None
    assert draft.hidden.shape == (9, target.config.hidden_size)


def drafts_of(stopping: StoppingPolicy, max_new_tokens: int = 30) -> list[tuple[list[int], Draft]]:
    target = tame_target()
    recorder = Recorder(make_drafter(target, stopping), target, SamplingParams(max_new_tokens=max_new_tokens))
    recorder.finish()
    return recorder.drafts


def test_drafting_stops_behind_the_first_token_below_eta_which_is_still_verified() -> None:
    eta, gamma = 0.4, 6
    drafts = [(text, draft) for text, draft in drafts_of(ConfidenceThreshold(gamma, eta)) if draft.num_nodes[0] > 1]
    stopped = 0
    for text, draft in drafts:
        assert draft.confidence is not None
        *before, last = draft.confidence[0][1:]
        assert (len(draft.tokens[0]),) == (len(draft.confidence[0]),) == draft.num_nodes
        assert all(value >= eta for value in before)
        left = 30 - (len(text) - len(PROMPT)) - 1
        assert last < eta or len(before) + 1 == min(gamma, left)
        stopped += last < eta and len(before) > 0
    assert stopped > 0


def test_eta_zero_drafts_gamma_tokens_and_eta_one_drafts_one() -> None:
    for eta, gamma, expected in [(0.0, 5, 5), (1.0, 5, 1), (0.0, 1, 1)]:
        drafts = drafts_of(ConfidenceThreshold(gamma, eta))
        lengths = [draft.num_nodes[0] - 1 for _, draft in drafts]
        left = [30 - (len(text) - len(PROMPT)) - 1 for text, _ in drafts]
        assert lengths == [min(expected, room) for room in left]


def test_draft_has_the_same_confidence_whether_or_not_a_policy_reads_it() -> None:
    unread, read = drafts_of(FixedLength(3)), drafts_of(ConfidenceThreshold(3, 0.0))
    for (_, draft), (_, other) in zip(unread[:-1], read[:-1], strict=True):
        assert draft.confidence is not None
        assert draft.confidence == other.confidence


@pytest.mark.parametrize("max_new_tokens", range(2, 9))
def test_draft_never_reaches_beyond_the_last_wanted_token(max_new_tokens: int) -> None:
    for text, draft in drafts_of(FixedLength(6), max_new_tokens):
        room = max_new_tokens - (len(text) - len(PROMPT))
        assert draft.num_nodes[0] - 1 == min(6, room - 1)


@pytest.mark.parametrize("num_rows", [1, 3, 8])
def test_long_prompt_fed_in_blocks_gives_the_same_adapter_cache(monkeypatch: pytest.MonkeyPatch, num_rows: int) -> None:
    target, caches, texts = tame_target(), [], []
    for rows in (512, num_rows):
        monkeypatch.setattr(module, "FEED_ROWS", rows)
        drafter = make_drafter(target, FixedLength(3))
        recorder = Recorder(drafter, target, SamplingParams(max_new_tokens=12))
        recorder.finish()
        caches.append(drafter._cache)
        texts.append(recorder.text)
    assert texts[0] == texts[1]
    assert caches[0].lengths == caches[1].lengths
    torch.testing.assert_close(caches[0].keys[0], caches[1].keys[0], rtol=1e-4, atol=1e-4)


def test_reused_drafter_decodes_growing_and_shrinking_requests_as_a_fresh_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "SLOT_BLOCK", 8)
    target = tame_target()
    reused = Engine(target, make_drafter(target, FixedLength(4)))
    for num_tokens, wanted in [(2, 6), (40, 20), (1, 15), (90, 4), (5, 9)]:
        request = Request(
            tuple((17 * i + num_tokens) % 258 for i in range(num_tokens)), SamplingParams(max_new_tokens=wanted)
        )
        texts = []
        for engine in (reused, Engine(target, make_drafter(target, FixedLength(4))), Engine(target, PlainDrafter())):
            decoding = engine.submit(request)
            engine.run(decoding)
            texts.append((decoding.new_tokens, decoding.accepted_lengths))
        assert texts[0] == texts[1]
        assert texts[0][0] == texts[2][0]


def test_ended_sequence_leaves_no_memory() -> None:
    target = tame_target()
    drafter = make_drafter(target, FixedLength(2))
    engine = Engine(target, drafter)
    decoding = engine.submit(Request(PROMPT, SamplingParams()))
    engine.step()
    assert len(drafter._memory) == 1
    engine.cancel(decoding)
    assert drafter._memory == {}


def test_sequence_that_never_began_is_ended_without_complaint() -> None:
    drafter = make_drafter(tame_target(), FixedLength(2))
    drafter.end([DecodedSequence(Request(PROMPT, SamplingParams()), slot=0)])


@pytest.mark.parametrize("exit_layer", [0, 4])
def test_adapter_of_an_impossible_exit_layer_is_refused(exit_layer: int) -> None:
    target = tame_target()
    adapter = Adapter.initialize(target, EXIT_LAYER)
    adapter.config.exit_layer = exit_layer
    with pytest.raises(AdapterError, match=rf"exit_layer must be in 1\.\.3, got {exit_layer}"):
        KangarooDrafter(target, adapter, stopping=FixedLength(2))


def test_settings_go_before_the_adapters_recommendation_and_that_before_the_papers(tmp_path: Path) -> None:
    target = tame_target()
    tokenizer = Tokenizer(tiny_tokenizer(), settings={}, chat_template=None)
    model = LoadedModel("tiny", tmp_path, target, tokenizer, frozenset())
    adapter = Adapter.initialize(target, EXIT_LAYER)
    model.adapter_folder.mkdir()
    adapter.save(model.adapter_folder)

    def stopping(settings: KangarooSettings) -> StoppingPolicy:
        return build(model, settings)._stopping

    assert stopping(KangarooSettings()) == ConfidenceThreshold(6, 0.6)
    adapter.config.gamma, adapter.config.eta = 3, 0.25
    adapter.save(model.adapter_folder)
    assert stopping(KangarooSettings()) == ConfidenceThreshold(3, 0.25)
    assert stopping(KangarooSettings(gamma=8, eta=0.9)) == ConfidenceThreshold(8, 0.9)
    assert stopping(KangarooSettings(eta=0.0)) == FixedLength(3)
    adaptive = stopping(KangarooSettings(eta=AdaptiveSettings(initial_threshold=0.3)))
    assert isinstance(adaptive, AdaptiveThreshold)
    assert (adaptive.max_length, adaptive.threshold) == (3, 0.3)
    assert build(model, KangarooSettings(num_siblings=3, max_nodes=20))._branching == Branching(3, 20)
    for settings, message in (
        (KangarooSettings(gamma=0), "gamma must be at least 1, got 0"),
        (KangarooSettings(eta=2), r"eta must be in \[0, 1\], got 2"),
        (KangarooSettings(num_siblings=0), "num_siblings must be at least 1, got 0"),
        (KangarooSettings(max_nodes=65), r"max_nodes must be in 2\.\.64, got 65"),
    ):
        with pytest.raises(SettingsError, match=message):
            build(model, settings)


GREEDY = [SamplingParams(24, seed=0)] * 3
SAMPLED = [
    SamplingParams(24, 0.8, 3),
    SamplingParams(24, 1.5, 5, top_k=2),
    SamplingParams(24, 1.2, 6, top_k=20, top_p=0.8, min_p=0.01),
    SamplingParams(24, 1.2, 8, top_p=0.3),
    SamplingParams(24, 0.7, 7, top_p=0.9),
    SamplingParams(24, 1.0, 9, min_p=0.01),
    SamplingParams(24, seed=0),
]


class Probing:
    """Keeps a packed drafter's drafts, and what behind them only the caches tell."""

    def __init__(self, drafter: KangarooDrafter, target: packed.PackedTransformer) -> None:
        self.drafts: list[Draft] = []
        self.probes: list[Tensor] = []
        self.pauses = False
        self._drafter, self._target = drafter, target
        self._draft = drafter.draft
        drafter.draft = self.draft  # type: ignore[method-assign]

    def draft(self, batch: Batch) -> Draft:
        if self.pauses:
            batch.sequences[len(self.drafts) % len(batch.sequences)].max_draft = 0
        draft = self._draft(batch)
        # The next draft's states are written where these lie.
        self.drafts.append(replace(draft, hidden=None if draft.hidden is None else draft.hidden.clone()))
        stack, adapter = self._target._stack, self._drafter._adapter.packed
        assert adapter is not None
        for sequence, parents in zip(batch.sequences, draft.parents, strict=True):
            if len(parents) > 1:
                slot, grown = sequence.slot, sorted(set(parents[1:]))
                assert self._drafter._memory[sequence].fed.issuperset(grown)
                for layer in range(EXIT_LAYER):
                    self.probe(stack, layer, batch.cache, slot=slot, parents=parents, of=range(len(parents)))
                self.probe(adapter, 0, self._drafter._cache, slot=slot, parents=parents, of=grown)
        return draft

    def probe(self, stack: packed.PackedStack, layer: int, cache: KVCache, *, slot: int,
              parents: Sequence[int], of: Sequence[int]) -> None:  # fmt: skip
        """Let a row behind every one of these nodes read what a layer has in its cache of the text and the draft."""
        rows = torch.randn(len(of), self._target.config.hidden_size, generator=torch.Generator().manual_seed(6))
        segment = Segment(slot, cache.lengths[slot], len(of), (*parents, *of), len(parents))
        self.probes.append(stack.run(rows, (layer, layer + 1), attention=CachedPass(cache, [segment]))[0])


def probe_drafts(
    loose: Transformer, target: packed.PackedTransformer, stopping: StoppingPolicy, *, branching: Branching,
    wishes: Sequence[SamplingParams], kind: Kind = "attention", pauses: bool = False
) -> Probing:  # fmt: skip
    """Texts of several prompts, decoded together at changing depths and prices of a node.

    Drafts deepen, so that states are set aside in memory that is then outgrown. pauses: whether one sequence after
    another sits out a draft.
    """
    adapter = make_drafter(loose, stopping, kind)._adapter.pack(target)
    drafter = KangarooDrafter(target, adapter, stopping=stopping, branching=branching)
    probing = Probing(drafter, target)
    probing.pauses = pauses
    limits, pace = Limits(max_batch_size=len(wishes)), Pace((1, 2, MAX_NODES, MAX_NODES, 0, 3))
    engine = Engine(target, drafter, limits=limits, pace=pace)
    begun = [engine.submit(Request(PROMPT[: 3 + row], params)) for row, params in enumerate(wishes)]
    for decoding in begun:
        engine.run(decoding)
    return probing


@pytest.mark.parametrize(
    ("wishes", "pauses"),
    [(GREEDY, False), (GREEDY, True), (GREEDY[:1], False), (SAMPLED, True)],
    ids=["greedy", "pausing", "alone", "sampled"],
)
@pytest.mark.parametrize("branching", [Branching(), Branching(3, 16)], ids=["chain", "tree"])
@pytest.mark.parametrize(
    ("family", "storage", "kind"),
    [*product(FAMILIES, ["float32", "bfloat16", "int8"], ["attention"]), *product(["gemma2"], ["float32"], KINDS[1:])],
)
def test_drafts_of_one_call_are_those_made_level_by_level(
    monkeypatch: pytest.MonkeyPatch, family: str, storage: str, kind: Kind, branching: Branching,
    wishes: list[SamplingParams], pauses: bool
) -> None:  # fmt: skip
    loose = tame_target(family)
    target = packed.pack(loose, storage)
    settings: dict[str, Any] = {"branching": branching, "wishes": wishes, "kind": kind, "pauses": pauses}
    for eta in (0.0, 0.4, 1.0):
        stopping = ConfidenceThreshold(5, eta)
        with monkeypatch.context() as patch:
            patch.setattr(KangarooDrafter, "_run_shallow", None)
            native = probe_drafts(loose, target, stopping, **settings)
        with monkeypatch.context() as patch:
            patch.setattr(module, "describe_draw", lambda params: None)
            patch.setattr(KangarooDrafter, "_draft_in_one_call", None)
            levels = probe_drafts(loose, target, stopping, **settings)
        for mine, other in zip(native.drafts, levels.drafts, strict=True):
            assert (mine.tokens, mine.parents) == (other.tokens, other.parents)
            assert (mine.resume_layer, mine.hidden is None) == (other.resume_layer, other.hidden is None)
            if mine.hidden is not None:
                assert torch.equal(mine.hidden, other.hidden)
                for confidences, expected in zip(mine.confidence, other.confidence, strict=True):
                    assert confidences == pytest.approx(expected, abs=1e-5)
        assert len(native.probes) > 10
        has_branches = any(not is_chain(parents) for draft in native.drafts for parents in draft.parents)
        assert has_branches == (branching.num_siblings > 1)
        for one, expected in zip(native.probes, levels.probes, strict=True):
            assert torch.equal(one, expected)


def test_an_adapter_without_attention_is_fed_nothing_but_what_it_guesses_behind() -> None:
    target = tame_target()
    drafter = make_drafter(target, FixedLength(4), "mlp")
    recorder = Recorder(drafter, target, SamplingParams(max_new_tokens=120))
    for _ in range(20):
        recorder.engine.step()
    assert drafter._cache.lengths == [0]
    assert drafter._cache.num_slots == MAX_NODES < len(recorder.text)
    (memory,) = drafter._memory.values()
    assert memory.pending == []


@pytest.mark.parametrize("is_drafting", [True, False])
def test_long_prompt_reaches_a_packed_adapter_in_blocks(monkeypatch: pytest.MonkeyPatch, is_drafting: bool) -> None:
    loose, texts, blocks = tame_target(), [], []
    target = packed.pack(loose)
    monkeypatch.setattr(module, "FEW_ROWS", 5)
    monkeypatch.setattr(Pace, "is_drafting", is_drafting)
    for rows in (512, 3):
        monkeypatch.setattr(module, "FEED_ROWS", rows)
        stopping = FixedLength(4)
        made = make_drafter(loose, stopping)
        drafter = KangarooDrafter(target, made._adapter.pack(target), stopping=stopping)
        fed: list[int] = []

        def counted(states: Tensor, *, attention: Any, fed: list[int] = fed, run: Any = drafter._adapter.run) -> Any:
            fed.append(len(states))
            return run(states, attention=attention)

        monkeypatch.setattr(drafter._adapter, "run", counted)
        engine = Engine(target, drafter, pace=Pace((MAX_NODES,)))  # type: ignore[arg-type]
        decoding = engine.submit(Request(PROMPT, SamplingParams(max_new_tokens=16)))
        engine.step()
        assert fed == ([] if not is_drafting else [8] if rows == 512 else [3, 3, 2])
        engine.run(decoding)
        texts.append(decoding.new_tokens)
        blocks.append(fed)
    assert texts[0] == texts[1]
    # What did not reach it with the prompt does so with the first draft, whose own call takes a last block.
    assert blocks == ([[8], [3, 3, 2]] if is_drafting else [[], [3, 3]])


@pytest.mark.parametrize("branching", [Branching(), Branching(3, 16)], ids=["chain", "tree"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_greedy_drafts_are_verified_in_their_own_call_as_the_engine_verifies_them(
    monkeypatch: pytest.MonkeyPatch, family: str, branching: Branching
) -> None:
    loose, stopping = tame_target(family), ConfidenceThreshold(5, 0.4)
    target, heard = packed.pack(loose), {}
    inner, decide = KangarooDrafter.draft, packed.PackedTransformer.decide
    for is_asked in (True, False):
        told: list[Any] = []
        heard[is_asked] = told

        def draft(self: KangarooDrafter, batch: Batch, is_asked: bool = is_asked, told: list[Any] = told) -> Draft:
            made = inner(self, batch if is_asked else replace(batch, taps=None))
            assert (made.verified is not None) == (is_asked and max(made.num_nodes) > 1)
            if made.verified is not None:
                told.append(made.verified.choices)
            return made

        def decided(self: Any, entering: Any, span: Any, told: list[Any] = told, **rest: Any) -> Any:
            ids, taps = decide(self, entering, span, **rest)
            if span[0] == EXIT_LAYER:
                told.append(ids)
            return ids, taps

        with monkeypatch.context() as patch:
            patch.setattr(KangarooDrafter, "draft", draft)
            patch.setattr(packed.PackedTransformer, "decide", decided)
            drafter = KangarooDrafter(target, make_drafter(loose, stopping)._adapter.pack(target),
                                      stopping=stopping, branching=branching)  # fmt: skip
            engine = Engine(target, drafter, limits=Limits(max_batch_size=3), pace=Pace((3, 1, MAX_NODES)))
            begun = [engine.submit(Request(PROMPT[: 3 + row], params)) for row, params in enumerate(GREEDY)]
            for decoding in begun:
                engine.run(decoding)
        told.append([decoding.new_tokens for decoding in begun])
    assert len(heard[True]) > 5
    assert heard[True] == heard[False]


@pytest.mark.parametrize("wish", [SAMPLED[0], SamplingParams(24, logprobs=2)])
def test_drafts_beside_one_that_needs_logits_are_left_to_the_engine(wish: SamplingParams) -> None:
    loose, stopping = tame_target(), FixedLength(3)
    target = packed.pack(loose)
    probing = probe_drafts(loose, target, stopping, branching=Branching(), wishes=[GREEDY[0], wish])
    assert any(len(draft.parents) == 2 and max(draft.num_nodes) > 1 for draft in probing.drafts)
    assert all(draft.verified is None for draft in probing.drafts if len(draft.parents) == 2)


def test_a_gate_is_told_what_enters_the_head_though_the_draft_is_verified_in_its_own_call() -> None:
    loose, stopping = tame_target(), FixedLength(3)
    target = packed.pack(loose)
    texts, closed = [], []
    for is_asked in (True, False):
        drafter = KangarooDrafter(target, make_drafter(loose, stopping)._adapter.pack(target), stopping=stopping)
        probing = Probing(drafter, target)
        gated = GatedDrafter(target, drafter, threshold=0.1)
        if not is_asked:
            inner = gated.draft
            gated.draft = lambda batch, inner=inner: inner(replace(batch, taps=None))  # type: ignore[method-assign,misc]
        engine = Engine(target, gated)
        decoding = engine.submit(Request(PROMPT, GREEDY[0]))
        engine.run(decoding)
        assert all((draft.verified is not None) == is_asked for draft in probing.drafts if max(draft.num_nodes) > 1)
        texts.append(decoding.new_tokens)
        closed.append([max(draft.num_nodes) == 1 for draft in probing.drafts])
    assert texts[0] == texts[1]
    assert closed[0] == closed[1]
    # The last step has no room for a draft.
    assert set(closed[0][:-1]) == {True, False}


def test_verifying_in_the_drafts_own_call_counts_as_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    loose, stopping, calls = tame_target(), FixedLength(3), []
    target = packed.pack(loose)
    draft = cpu.DraftPlan.draft

    def slow(self: cpu.DraftPlan, *places: Any, **rest: Any) -> Any:
        nodes, states, verified = draft(self, *places, **rest)
        assert verified is not None
        calls.append(verified[1])
        return nodes, states, (verified[0], 1000.0, verified[2])

    monkeypatch.setattr(cpu.DraftPlan, "draft", slow)
    drafter = KangarooDrafter(target, make_drafter(loose, stopping)._adapter.pack(target), stopping=stopping)
    engine = Engine(target, drafter)
    decoding = engine.submit(Request(PROMPT, GREEDY[0]))
    engine.run(decoding)
    assert all(0 < time_s < 1 for time_s in calls)
    assert decoding.verify_time_s > 1000 * len(calls) > 0
    assert decoding.draft_time_s < -900 * len(calls)
    assert decoding.draft_time_s + decoding.verify_time_s <= decoding.decode_time_s


@pytest.mark.parametrize("num_begun", [1, 2])
def test_states_that_wait_outlive_drafts_for_others(num_begun: int) -> None:
    loose, stopping = tame_target(), FixedLength(3)
    target = packed.pack(loose)
    drafter = KangarooDrafter(target, make_drafter(loose, stopping)._adapter.pack(target), stopping=stopping)
    sequences = [DecodedSequence(Request(PROMPT, SamplingParams()), slot=slot, max_draft=3) for slot in range(2)]
    cache = target.new_cache(2, 64)
    first, other = Batch(target, cache, sequences[:1]), Batch(target, cache, sequences[1:])
    drafter.begin(sequences[:num_begun], num_slots=64)
    prefill(first, drafter, num_rows=[len(PROMPT) - 1])
    draft = drafter.draft(first)
    assert draft.hidden is not None
    place, states, path = draft.hidden.data_ptr(), draft.hidden.clone(), (0, 1, 2, 3)
    cache.keep(0, list(path))
    for token in [*draft.tokens[0][1:], 5]:
        sequences[0].append(int(token), "draft")
    drafter.accept(sequences[:1], Outcome(paths=(path,), tokens=((),), taps=({EXIT_LAYER: draft.hidden},)))
    if num_begun == 1:
        drafter.begin(sequences[1:], num_slots=64)
    prefill(other, drafter, num_rows=[len(PROMPT) - 1])
    sequences[1].tokens[-1] = 3
    draft = drafter.draft(other)
    assert draft.hidden is not None
    assert draft.hidden.data_ptr() == place
    assert not torch.equal(draft.hidden[3:4], states[3:4])
    (waiting,) = drafter._memory[sequences[0]].pending
    assert torch.equal(waiting, states[3:4])
