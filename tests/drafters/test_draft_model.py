"""A draft model guesses and never decides: its cache follows the text, its vocabulary is the target's."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from torch import Tensor

from kangaroo.drafters import draft_model as module
from kangaroo.drafters.base import DEFAULT_PRICES, MAX_NODES, Batch
from kangaroo.drafters.draft_model import DraftModelDrafter, build, check_vocabulary
from kangaroo.drafters.settings import DraftModelSettings, find_settings
from kangaroo.drafters.stopping import ConfidenceThreshold, FixedLength, StoppingPolicy
from kangaroo.drafters.tree import CHAIN, Branching
from kangaroo.engine.engine import Engine
from kangaroo.errors import CheckpointError, SettingsError
from kangaroo.llm import LLM
from kangaroo.model import packed
from kangaroo.model.cache import CachedPass, Segment
from kangaroo.model.checkpoint import LoadedModel, load_model
from kangaroo.model.config import ModelConfig
from kangaroo.model.tokenizer import Tokenizer
from kangaroo.model.transformer import Transformer
from kangaroo.model.weights import save_checkpoint
from kangaroo.types import Draft, Request, SamplingParams
from tests.lossless import PROMPTS, assert_lossless, decode, make_prompts, num_accepted, num_rejected
from tests.tiny import save_tiny_tokenizer, tame_transformer, tiny_raw_config, tiny_tokenizer, tiny_transformer

NUM_NEW_TOKENS = 41
TREE = Branching(num_siblings=3, max_nodes=16)
PARAMS = {
    "greedy": SamplingParams(max_new_tokens=NUM_NEW_TOKENS),
    "sampled": SamplingParams(max_new_tokens=NUM_NEW_TOKENS, temperature=0.8, seed=11),
    "penalised": SamplingParams(max_new_tokens=NUM_NEW_TOKENS, repetition_penalty=1.3, logit_bias={257: 2.0, 3: -1.0}),
}
BACKENDS = ["reference", "native"]


def small(target: Transformer, *, vocab_size: int | None = None, context: int = 256) -> Transformer:
    """The target's first two layers under its own head: right about half the time."""
    rows = target.config.vocab_size if vocab_size is None else vocab_size
    generator = torch.Generator().manual_seed(8)

    def resize(weight: Tensor) -> Tensor:
        # Rows that the target lacks are loud: unmasked, they would be guessed all the time.
        extra = 3 * torch.randn(max(0, rows - len(weight)), weight.shape[1], generator=generator)
        return torch.cat([weight[:rows], extra])

    config = replace(target.config, num_layers=2, windows=target.config.windows[:2], vocab_size=rows,
                     context_length=context)  # fmt: skip
    return Transformer(config, target.layers[:2], embedding=resize(target.embedding), final_norm=target.final_norm,
                       head=resize(target.head))  # fmt: skip


def on(backend: str, model: Transformer) -> Transformer:
    return model if backend == "reference" else packed.pack(model)


def make_pair(backend: str, family: str = "llama", **small_fields: Any) -> tuple[Transformer, Transformer]:
    target = tame_transformer(family, 2)
    return on(backend, target), on(backend, small(target, **small_fields))


def make_drafter(
    model: Transformer, stopping: StoppingPolicy, branching: Branching = CHAIN, *, vocab_size: int = 258
) -> DraftModelDrafter:
    return DraftModelDrafter(model, vocab_size, stopping=stopping, branching=branching)


@pytest.mark.parametrize("mode", PARAMS)
@pytest.mark.parametrize("branching", [CHAIN, TREE], ids=["chain", "tree"])
@pytest.mark.parametrize("stopping", [FixedLength(4), ConfidenceThreshold(6, 0.3)], ids=["fixed", "threshold"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_texts_are_those_of_plain_decoding(
    backend: str, family: str, stopping: StoppingPolicy, branching: Branching, mode: str
) -> None:
    target, model = make_pair(backend, family)
    drafted = assert_lossless(target, make_drafter(model, stopping, branching), PARAMS[mode])
    assert num_accepted(drafted) > 0
    assert num_rejected(drafted) > 0


@pytest.mark.parametrize("acceptance", ["coupling", "rejection", "block"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_model_that_drafts_for_itself_is_right_every_time(temperature: float, acceptance: Any) -> None:
    target = packed.pack(tame_transformer("llama", 2))
    params = SamplingParams(max_new_tokens=NUM_NEW_TOKENS, temperature=temperature, seed=3, acceptance=acceptance)
    for one in decode(target, make_drafter(target, FixedLength(4)), params):
        assert one.accepted_lengths == [5] * 8


@pytest.mark.parametrize("acceptance", ["rejection", "block"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rules_that_reject_by_chance_get_chains_with_what_they_were_drawn_from(backend: str, acceptance: Any) -> None:
    target, model = make_pair(backend)
    params = replace(PARAMS["sampled"], acceptance=acceptance)
    drafter = make_drafter(model, FixedLength(3), TREE)
    drafts = record(drafter)
    decodings = decode(target, drafter, params)
    assert num_accepted(decodings) > 0
    assert num_rejected(decodings) > 0
    for draft in drafts:
        for tokens, parents, proposals in zip(draft.tokens, draft.parents, draft.proposals or [], strict=True):
            assert list(parents) == list(range(-1, len(parents) - 1))
            assert list(proposals) == list(range(len(parents) - 1))
            for node, proposal in proposals.items():
                assert proposal.shape == (258,)
                assert proposal[tokens[node + 1]] > 0
                assert proposal.sum() == pytest.approx(1)
    assert sum(draft.proposals is not None for draft in drafts) > 3


def record(drafter: DraftModelDrafter) -> list[Draft]:
    """Everything it will draft."""
    drafts: list[Draft] = []
    draft_unwatched = drafter.draft

    def draft(batch: Batch) -> Draft:
        drafts.append(draft_unwatched(batch))
        return drafts[-1]

    drafter.draft = draft  # type: ignore[method-assign]
    return drafts


class Spy:
    """Counts the rows a model runs, by position, and how many each pass has."""

    def __init__(self, model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.positions: Counter[int] = Counter()
        self.num_rows: list[int] = []
        forward = model.forward

        def counting(hidden: Tensor, span: tuple[int, int], *, attention: CachedPass, **others: Any) -> Any:
            self.positions.update(attention.positions.tolist())
            self.num_rows.append(len(hidden))
            return forward(hidden, span, attention=attention, **others)

        monkeypatch.setattr(model, "forward", counting)


def test_every_committed_token_is_fed_once_and_no_guess_after_it_was_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    target, model = make_pair("reference")
    spy, drafter = Spy(model, monkeypatch), make_drafter(model, FixedLength(4))
    drafts = record(drafter)
    (decoding,) = decode(target, drafter, PARAMS["greedy"], prompts=PROMPTS[:1])
    expected, length, num_full = Counter[int](), len(PROMPTS[0]) + 1, 0
    expected.update(range(drafter._cache.lengths[0]))
    for draft, num_emitted in zip(drafts, decoding.accepted_lengths, strict=True):
        num_guesses = len(draft.tokens[0]) - 1
        # The last guess of a draft is never fed; of the others those that were not accepted were fed for nothing.
        expected.update(range(length - 1 + num_emitted, length - 1 + num_guesses))
        length += num_emitted
        num_full += num_emitted == num_guesses + 1
    assert spy.positions == expected
    assert num_full > 0


@pytest.mark.parametrize("branching", [CHAIN, TREE], ids=["chain", "tree"])
def test_cache_after_many_steps_is_that_of_a_fresh_pass(branching: Branching) -> None:
    target, model = make_pair("reference")
    drafter = make_drafter(model, ConfidenceThreshold(5, 0.2), branching)
    decodings = decode(target, drafter, PARAMS["sampled"])
    for row, decoding in enumerate(decodings):
        assert decoding.sequence is not None
        tokens, num_rows = decoding.sequence.tokens, drafter._cache.lengths[row]
        assert len(tokens) - 8 < num_rows < len(tokens)
        fresh = model.new_cache(1, num_rows)
        attention = CachedPass(fresh, [Segment(0, 0, num_rows)])
        model.forward(model.embed(tokens[:num_rows]), (0, 2), attention=attention)
        for kept, expected in ((drafter._cache.keys, fresh.keys), (drafter._cache.values, fresh.values)):
            torch.testing.assert_close(kept[1][row, :, :num_rows], expected[1][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_rows", [1, 7, 40])
def test_long_prompts_reach_the_draft_model_in_blocks(monkeypatch: pytest.MonkeyPatch, num_rows: int) -> None:
    target, model = make_pair("native")
    prompts, passes, texts = make_prompts(70, 3, 50), [], []
    for rows in (512, num_rows):
        monkeypatch.setattr(module, "FEED_ROWS", rows)
        with monkeypatch.context() as patch:
            spy, drafter = Spy(model, patch), make_drafter(model, FixedLength(2))
            decodings = decode(target, drafter, PARAMS["greedy"], prompts=prompts)
        passes.append(spy.num_rows)
        texts.append([(one.new_tokens, one.accepted_lengths) for one in decodings])
    assert texts[0] == texts[1]
    assert passes[0][0] == 70 + 3 + 50 + 3
    # A step needs at least one row of every sequence.
    assert max(passes[1]) <= max(num_rows, 6)


class EverySecondStep:
    """A pace at which every second step drafts nothing."""

    prices, is_drafting = DEFAULT_PRICES, True

    def __init__(self) -> None:
        self._limit = 0

    def limit(self, num_sequences: int) -> int:
        self._limit = MAX_NODES - self._limit
        return self._limit

    def observe(self, draft: Draft, outcome: object, **times_s: float) -> None:
        pass

    def forget(self, sequence: object) -> None:
        pass


def test_steps_without_a_draft_are_caught_up_with() -> None:
    target = packed.pack(tame_transformer("llama", 2))
    engine = Engine(target, make_drafter(target, FixedLength(3)), pace=EverySecondStep())  # type: ignore[arg-type]
    decoding = engine.submit(Request(PROMPTS[0], SamplingParams(max_new_tokens=26)))
    engine.run(decoding)
    assert decoding.accepted_lengths == [4, 1] * 5


def test_confidence_below_eta_ends_a_chain_which_is_verified_to_its_end() -> None:
    target, model = make_pair("native")
    drafter = make_drafter(model, ConfidenceThreshold(3, 0.3))
    drafts = record(drafter)
    decode(target, drafter, SamplingParams(max_new_tokens=60))
    confidences = [row[1:] for draft in drafts for row in draft.confidence or []]
    assert all(value >= 0.3 for row in confidences for value in row[:-1])
    assert any(1 < len(row) < 3 and row[-1] < 0.3 for row in confidences)
    assert any(len(row) == 3 for row in confidences)


@pytest.mark.parametrize("backend", BACKENDS)
def test_drafting_stops_where_the_draft_models_context_ends(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    target, model = make_pair(backend, context=24)
    spy, drafter = Spy(model, monkeypatch), make_drafter(model, FixedLength(4))
    drafts = record(drafter)
    # The third prompt is too long from the start.
    decodings = assert_lossless(target, drafter, PARAMS["greedy"])
    assert decodings[2].num_drafted == 0
    assert max(spy.positions) == 23
    assert [len(row) for row in drafts[-1].tokens] == [1]
    assert drafter._cache.num_slots <= 24 + MAX_NODES


@pytest.mark.parametrize("vocab_size", [250, 300])
@pytest.mark.parametrize("acceptance", ["coupling", "rejection"])
@pytest.mark.parametrize("mode", PARAMS)
@pytest.mark.parametrize("branching", [CHAIN, TREE], ids=["chain", "tree"])
def test_embeddings_may_be_padded_differently(
    branching: Branching, mode: str, acceptance: Any, vocab_size: int
) -> None:
    target, model = make_pair("native", vocab_size=vocab_size)
    drafter = make_drafter(model, FixedLength(3), branching)
    drafts = record(drafter)
    params, prompts = replace(PARAMS[mode], acceptance=acceptance), [(257, 5, 256, 9), (251, 252)]
    if acceptance == "coupling":
        assert_lossless(target, drafter, params, prompts=prompts)
    else:
        decode(target, drafter, params, prompts=prompts)
    guesses = {token for draft in drafts for row in draft.tokens for token in row[1:]}
    assert len(guesses) > 3
    assert max(guesses) < 258


def test_ended_sequences_leave_nothing() -> None:
    target, model = make_pair("native")
    drafter = make_drafter(model, FixedLength(2))
    decode(target, drafter, PARAMS["greedy"])
    assert drafter._growths == {}
    drafter.end([])


def loaded(backend: tokenizers.Tokenizer, name: str) -> LoadedModel:
    tokenizer = Tokenizer(backend, settings={}, chat_template=None)
    return LoadedModel(name, Path(name), tiny_transformer(ModelConfig.from_dict(tiny_raw_config())), tokenizer,
                       frozenset())  # fmt: skip


def changed_tokenizer(change: str) -> tokenizers.Tokenizer:
    backend = tiny_tokenizer()
    if change == "added":
        backend.add_special_tokens(["<|pad|>"])
        return backend
    content = json.loads(backend.to_str())
    vocab = content["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def test_vocabularies_that_differ_are_refused_naming_the_first_difference() -> None:
    target = loaded(tiny_tokenizer(), "big")
    check_vocabulary(loaded(tiny_tokenizer(), "little"), target)
    ids = target.tokenizer.vocab()
    with pytest.raises(CheckpointError) as swapped:
        check_vocabulary(loaded(changed_tokenizer("swapped"), "little"), target)
    assert str(swapped.value) == (
        f"a draft model must have the target's vocabulary: 'A' is token {ids['B']} of the 258 in little and token "
        f"{ids['A']} of the 258 in big; give a draft model of the target's family"
    )
    with pytest.raises(CheckpointError, match=r"'<\|pad\|>' is token 258 of the 259 in little and no token of the 258"):
        check_vocabulary(loaded(changed_tokenizer("added"), "little"), target)
    with pytest.raises(CheckpointError, match=r"'<\|pad\|>' is no token of the 258 in big and token 258 of the 259"):
        check_vocabulary(target, loaded(changed_tokenizer("added"), "little"))


def write_model(folder: Path, target: Transformer, **overrides: Any) -> Path:
    save_checkpoint(target, folder, raw_config=tiny_raw_config(**overrides), dtype=torch.float32)
    save_tiny_tokenizer(folder)
    return folder


@pytest.mark.parametrize("dtype", [None, "bfloat16", "int8"])
def test_draft_model_is_loaded_from_its_folder(tmp_path: Path, dtype: str | None) -> None:
    assert find_settings("draft_model") is DraftModelSettings
    target = tame_transformer("llama", 2)
    big = write_model(tmp_path / "big", target)
    little = write_model(tmp_path / "little", small(target), num_hidden_layers=2)
    params = SamplingParams(max_new_tokens=NUM_NEW_TOKENS, ignore_eos=True)
    settings = DraftModelSettings(model=str(little), gamma=3, eta=0.0, dtype=dtype)
    drafted = LLM.from_pretrained(str(big), settings, weights="int8")
    plain = LLM.from_pretrained(str(big), "plain", weights="int8")
    drafted.engine.pace = None
    completion = drafted.generate("A kangaroo hops", params)
    assert completion.token_ids == plain.generate("A kangaroo hops", params).token_ids
    assert completion.num_accepted > 0
    assert isinstance(drafted.drafter, DraftModelDrafter)
    model = drafted.drafter._model
    assert isinstance(model, packed.PackedTransformer)
    assert model.storage == (dtype or "int8")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            DraftModelSettings(),
            "draft_model needs a draft model, got none; set model to a folder or hub id, or lay one",
        ),
        (DraftModelSettings(model="x", gamma=0), "gamma must be at least 1, got 0"),
        (DraftModelSettings(model="x", eta=1.5), r"eta must be in \[0, 1\], got 1.5"),
        (DraftModelSettings(model="x", num_siblings=0), "num_siblings must be at least 1, got 0"),
        (DraftModelSettings(model="x", max_nodes=65), r"max_nodes must be in 2\.\.64, got 65"),
    ],
)
def test_settings_out_of_range_are_refused_before_anything_is_loaded(
    settings: DraftModelSettings, message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        build(loaded(tiny_tokenizer(), "big"), settings)


def test_draft_model_on_reference_kernels_takes_the_targets_type(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", tame_transformer("llama", 2))
    model = load_model(str(folder), backend="reference")
    drafter = build(model, DraftModelSettings(model=str(folder)))
    assert drafter._model.backend == "reference"
    assert drafter._model.dtype == model.target.dtype
