"""Medusa heads guess from the state that chose the root; whatever they guess, the text stays plain decoding's."""

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from kangaroo.drafters.base import Batch, Drafter
from kangaroo.drafters.companion import CONFIG_FILE
from kangaroo.drafters.medusa import MedusaDrafter, build
from kangaroo.drafters.medusa_heads import WEIGHTS_FILE, MedusaHeads, tensor_shapes
from kangaroo.drafters.plain import PlainDrafter
from kangaroo.drafters.settings import MedusaSettings
from kangaroo.drafters.stopping import ConfidenceThreshold, FixedLength, StoppingPolicy
from kangaroo.drafters.tree import CHAIN, Branching
from kangaroo.engine.decoding import Decoding
from kangaroo.engine.engine import Engine
from kangaroo.engine.scheduler import Limits
from kangaroo.errors import HeadsError, KernelError, SettingsError
from kangaroo.model import packed
from kangaroo.model.checkpoint import LoadedModel
from kangaroo.model.tokenizer import Tokenizer
from kangaroo.model.transformer import FullSequencePass, Transformer
from kangaroo.types import Draft, Request, SamplingParams
from tests.heads import learn_heads
from tests.tiny import tame_transformer, tiny_config, tiny_tokenizer, tiny_transformer

STORAGES = ["reference", "float32", "bfloat16", "float16", "int8"]
TREE = Branching(num_siblings=3, max_nodes=12)
PROMPTS = [(9, 77, 210, 31, 5), (66,), tuple(range(3, 40))]
PARAMS = {
    "greedy": SamplingParams(max_new_tokens=20),
    "sampled": SamplingParams(max_new_tokens=20, temperature=0.7, seed=5),
    "penalised": SamplingParams(max_new_tokens=20, repetition_penalty=1.3, logprobs=2),
}


@functools.cache
def make_target(family: str = "llama") -> Transformer:
    return tame_transformer(family, 2)


@functools.cache
def make_heads(family: str = "llama") -> MedusaHeads:
    return learn_heads(make_target(family), 3, prompts=PROMPTS, num_steps=12)


def run_all(target: Transformer, drafter: Drafter, params: SamplingParams, *, batch_size: int = 1) -> list[Decoding]:
    """Every prompt continued to its end."""
    engine = Engine(target, drafter, limits=Limits(max_batch_size=batch_size))
    begun = [engine.submit(Request(prompt, params)) for prompt in PROMPTS]
    for decoding in begun:
        engine.run(decoding)
    return begun


def decode(target: Transformer, drafter: Drafter, params: SamplingParams, *, batch_size: int = 1) -> list[list[int]]:
    """The new tokens behind every prompt."""
    return [one.new_tokens for one in run_all(target, drafter, params, batch_size=batch_size)]


def place(storage: str, family: str = "llama") -> tuple[Transformer, MedusaHeads]:
    """Target and heads on the reference kernels, or packed in a storage."""
    target, heads = make_target(family), make_heads(family)
    if storage == "reference":
        return target, heads
    native = packed.pack(target, storage)
    return native, heads.pack(native)


def make_drafter(
    target: Transformer, heads: MedusaHeads, *, branching: Branching = CHAIN, stopping: StoppingPolicy | None = None
) -> MedusaDrafter:
    return MedusaDrafter(target, heads, stopping=stopping or FixedLength(3), branching=branching)


class Recorder(MedusaDrafter):
    """Keeps every draft."""

    def draft(self, batch: Batch) -> Draft:
        draft = super().draft(batch)
        self.drafts = [*getattr(self, "drafts", []), draft]
        return draft


def record(heads: MedusaHeads, params: SamplingParams, *, branching: Branching = CHAIN,
           stopping: StoppingPolicy | None = None, batch_size: int = 1) -> list[Draft]:  # fmt: skip
    """All drafts of a run over every prompt."""
    drafter = Recorder(make_target(), heads, stopping=stopping or FixedLength(3), branching=branching)
    run_all(make_target(), drafter, params, batch_size=batch_size)
    return drafter.drafts


def telling_heads(*tokens: int) -> MedusaHeads:
    """Heads that guess these tokens, one each, and the token of the next id as the second best."""
    heads = MedusaHeads.initialize(make_target(), len(tokens))
    for number, token in enumerate(tokens, start=1):
        heads.tensors[f"bias.{number}"] = torch.full_like(heads.tensors[f"bias.{number}"], 50.0)
        head = torch.zeros_like(heads.tensors[f"head.{number}"])
        head[token], head[token + 1] = 0.02, 0.0199
        heads.tensors[f"head.{number}"] = head
    return heads


@pytest.mark.parametrize("branching", [CHAIN, TREE], ids=["chain", "tree"])
@pytest.mark.parametrize("kind", [*PARAMS])
@pytest.mark.parametrize("storage", STORAGES)
def test_the_texts_of_a_batch_are_those_of_plain_decoding(storage: str, kind: str, branching: Branching) -> None:
    target, heads = place(storage)
    drafter = make_drafter(target, heads, branching=branching)
    decoded = run_all(target, drafter, PARAMS[kind], batch_size=3)
    assert [one.new_tokens for one in decoded] == decode(target, PlainDrafter(), PARAMS[kind])
    assert sum(one.num_accepted for one in decoded) > 0
    assert sum(one.num_drafted - one.num_accepted for one in decoded) > 0


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma2"])
def test_every_family_drafts_losslessly(family: str) -> None:
    target, heads = place("float32", family)
    drafter = make_drafter(target, heads, branching=TREE)
    decoded = run_all(target, drafter, PARAMS["greedy"], batch_size=3)
    assert [one.new_tokens for one in decoded] == decode(target, PlainDrafter(), PARAMS["greedy"])
    assert sum(one.num_accepted for one in decoded) > 0


@pytest.mark.parametrize("acceptance", ["rejection", "block"])
def test_guesses_that_may_be_rejected_by_chance_say_what_they_were_drawn_from(acceptance: Any) -> None:
    params = SamplingParams(max_new_tokens=12, temperature=0.9, seed=3, acceptance=acceptance)
    for draft in record(make_heads(), params, branching=TREE):
        assert draft.parents[0] == list(range(-1, draft.num_nodes[0] - 1))
        for node, token in enumerate(draft.tokens[0][1:]):
            assert draft.proposals is not None
            assert draft.proposals[0][node].sum() == pytest.approx(1)
            assert draft.proposals[0][node][token] > 0


@pytest.mark.parametrize("acceptance", ["coupling", "rejection", "block"])
def test_no_draft_holds_more_than_its_most_nodes(acceptance: Any) -> None:
    params = SamplingParams(max_new_tokens=12, temperature=0.9, seed=3, acceptance=acceptance)
    drafts = record(make_heads(), params, branching=Branching(num_siblings=3, max_nodes=3))
    assert max(draft.num_nodes[0] for draft in drafts) == 3


def test_a_text_of_rejection_does_not_depend_on_the_texts_beside_it() -> None:
    target, heads = place("float32")
    params = SamplingParams(max_new_tokens=16, temperature=0.9, seed=3, acceptance="rejection")
    alone = decode(target, make_drafter(target, heads), params)
    assert decode(target, make_drafter(target, heads), params, batch_size=3) == alone


def test_new_heads_guess_what_chose_the_root_so_they_read_that_very_state() -> None:
    drafts = record(MedusaHeads.initialize(make_target(), 3), PARAMS["greedy"], batch_size=3)
    for draft in drafts:
        for guessed in draft.tokens:
            assert [token for token in guessed if token >= 0] == [guessed[0]] * sum(token >= 0 for token in guessed)


def test_heads_read_the_state_of_the_last_accepted_node_of_a_tree() -> None:
    target, heads = place("reference")
    drafter = make_drafter(target, heads, branching=TREE)
    engine = Engine(target, drafter)
    decoding = engine.submit(Request(PROMPTS[0], PARAMS["greedy"]))
    while decoding.finish_reason is None:
        engine.step()
        if decoding.sequence in drafter._memory:
            read = torch.tensor([decoding.sequence.tokens[:-1]])
            attention = FullSequencePass(target.config, read.shape[1], device=read.device)
            hidden, _ = target.forward(target.embed(read), (0, target.num_layers), attention=attention)
            expected = heads.normalize(hidden[0, -1:])
            held = drafter._memory[decoding.sequence].hidden
            assert held is not None
            torch.testing.assert_close(heads.normalize(held), expected, rtol=1e-4, atol=1e-4)
    assert max(decoding.accepted_lengths) > 1


def test_each_level_of_a_tree_holds_the_guesses_of_its_own_head() -> None:
    (draft, *_) = record(telling_heads(10, 20, 30), PARAMS["greedy"], branching=Branching(2, 64))
    tokens, parents = draft.tokens[0], draft.parents[0]
    assert sorted(tokens[1:]) == sorted([10, 11] + 2 * [20, 21] + 4 * [30, 31])
    for node in range(1, len(tokens)):
        above = tokens[parents[node]] if parents[node] else None
        assert tokens[node] // 10 == 1 if above is None else tokens[node] // 10 == above // 10 + 1


def test_a_low_confidence_ends_the_draft_behind_its_token() -> None:
    heads = telling_heads(10, 20, 30)
    heads.tensors["head.2"] = heads.tensors["head.2"] * 0.1
    (draft, *_) = record(heads, PARAMS["greedy"], stopping=ConfidenceThreshold(3, 0.3))
    assert draft.tokens[0][1:] == [10, 20]
    assert draft.confidence is not None
    assert draft.confidence[0][1] > 0.3 > draft.confidence[0][2]


def test_no_draft_goes_deeper_than_what_may_still_be_emitted() -> None:
    drafts = record(telling_heads(10, 20, 30), SamplingParams(max_new_tokens=4))
    assert [draft.num_nodes[0] for draft in drafts[:3]] == [3, 2, 1]


@pytest.mark.parametrize("storage", STORAGES[1:])
def test_packed_heads_compute_a_row_alone_as_beside_others(storage: str) -> None:
    config = tiny_config(hidden_size=36, head_dim=8)
    target = tiny_transformer(config)
    heads = MedusaHeads.initialize(target, 2)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in heads.tensors.items():
        heads.tensors[name] = tensor + 0.2 * torch.randn(tensor.shape, generator=generator)
    native = heads.pack(packed.pack(target, storage))
    rows = torch.randn(7, 36, generator=generator)
    together = native.predict(rows, 2)
    assert all(torch.equal(native.predict(rows[row : row + 1], 2)[:, 0], together[:, row]) for row in range(7))
    assert torch.equal(native.predict(rows, 1), together[:1])
    if storage == "float32":
        torch.testing.assert_close(together, heads.predict(rows, 2), rtol=1e-4, atol=1e-4)


def test_heads_that_bfloat16_holds_are_kept_in_half_the_bytes_and_predict_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = make_target()
    heads = MedusaHeads.initialize(target, 2)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in heads.tensors.items():
        heads.tensors[name] = (tensor + 0.2 * torch.randn(tensor.shape, generator=generator)).bfloat16().float()
    native = packed.pack(target, "float32")
    compact = heads.pack(native)
    monkeypatch.setattr("kangaroo.drafters.medusa_heads.choose_storage", lambda weights, storage: storage)
    wide = heads.pack(native)
    assert compact._packed is not None
    assert wide._packed is not None
    sizes = [[head.weight.num_bytes for head in one._packed[1]] for one in (compact, wide)]
    assert sizes[0] == [num_bytes // 2 for num_bytes in sizes[1]]
    rows = torch.randn(5, target.config.hidden_size, generator=generator)
    assert torch.equal(compact.predict(rows, 2), wide.predict(rows, 2))


def test_new_heads_say_what_the_head_of_the_target_says() -> None:
    target = make_target("gemma2")
    hidden = torch.randn(5, target.config.hidden_size, generator=torch.Generator().manual_seed(0))
    heads = MedusaHeads.initialize(target, 2)
    assert torch.equal(heads.logits(heads.normalize(hidden), 2), target.logits(hidden))


def test_heads_of_a_7b_model_have_591_million_parameters() -> None:
    config = tiny_config(hidden_size=4096, num_attention_heads=32, num_key_value_heads=32, vocab_size=32000)
    count = sum(math.prod(shape) for shape in tensor_shapes(config, 4).values())
    assert round(count / 1e6) == 591


def test_ended_sequences_are_forgotten() -> None:
    drafter = make_drafter(*place("reference"))
    run_all(make_target(), drafter, PARAMS["greedy"], batch_size=3)
    assert not drafter._memory


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_heads().save(tmp_path)
    return tmp_path


def model_with(target: Transformer, folder: Path = Path()) -> LoadedModel:
    tokenizer = Tokenizer(tiny_tokenizer(), settings={}, chat_template=None)
    return LoadedModel("tiny", folder, target, tokenizer, frozenset())


def test_saved_heads_load_unchanged_and_rounded_where_asked(folder: Path) -> None:
    target, heads = make_target(), make_heads()
    loaded = MedusaHeads.load(folder, target)
    assert loaded.config == heads.config
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in heads.tensors.items())
    heads.save(folder, dtype=torch.bfloat16)
    loaded = MedusaHeads.load(folder, target)
    assert all(torch.equal(loaded.tensors[name], one.bfloat16().float()) for name, one in heads.tensors.items())


def test_heads_beside_the_model_are_found_and_packed_for_it(folder: Path) -> None:
    (folder / "medusa").mkdir()
    make_heads().save(folder / "medusa")
    native = packed.pack(make_target())
    drafter = build(model_with(native, folder), MedusaSettings())
    assert decode(native, drafter, PARAMS["greedy"]) == decode(native, PlainDrafter(), PARAMS["greedy"])
    with pytest.raises(KernelError, match="packed weights are not saved"):
        drafter._heads.save(folder)


def test_fewer_heads_draft_less_deep(folder: Path) -> None:
    drafter = build(model_with(make_target()), MedusaSettings(str(folder), num_heads=2))
    drafted = [one.num_drafted / one.num_steps for one in run_all(make_target(), drafter, SamplingParams(9))]
    assert len(drafted) == 3
    assert drafter._stopping.max_length == 2


@pytest.mark.parametrize("count", [0, 4])
def test_a_number_of_heads_that_are_not_there_is_refused(count: int, folder: Path) -> None:
    with pytest.raises(SettingsError, match=rf"num_heads must be in 1\.\.3 \(those in .*\), got {count}"):
        build(model_with(make_target()), MedusaSettings(str(folder), num_heads=count))


def test_heads_of_another_model_are_refused_in_one_line(folder: Path) -> None:
    for other, reason in (
        (tiny_transformer(make_target().config), "is for another model of the same shape; train one for this target"),
        (tiny_transformer(tiny_config(hidden_size=48)), "is for another model: its hidden_size is 32, the target's 48"),
    ):
        with pytest.raises(HeadsError, match=reason) as caught:
            build(model_with(other), MedusaSettings(str(folder)))
        assert "\n" not in str(caught.value)


def test_missing_or_damaged_heads_are_refused(folder: Path) -> None:
    model, settings = model_with(make_target(), folder / "model"), MedusaSettings(str(folder))
    with pytest.raises(HeadsError, match=r"no folder of Medusa heads .*model/medusa; train them with"):
        build(model, MedusaSettings())
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(HeadsError, match="is damaged"):
        build(model, settings)
    path.unlink()
    with pytest.raises(HeadsError, match=r"holds no heads\.safetensors"):
        build(model, settings)
    config = folder / CONFIG_FILE
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_heads": 0}))
    with pytest.raises(HeadsError, match="is no Medusa heads config: num_heads"):
        build(model, settings)
    config.unlink()
    with pytest.raises(HeadsError, match=r"holds no Medusa heads: no readable config\.json"):
        build(model, settings)


def test_weights_of_other_shapes_are_refused(folder: Path) -> None:
    MedusaHeads.initialize(make_target(), 2).save(folder)
    config = folder / CONFIG_FILE
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_heads": 3}))
    with pytest.raises(HeadsError, match="must hold"):
        MedusaHeads.load(folder, make_target())
