"""The front door: loading with a drafter, generating, streaming, and refusing what cannot work."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from kangaroo.drafters.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter
from kangaroo.drafters.kangaroo import KangarooDrafter
from kangaroo.drafters.plain import PlainDrafter
from kangaroo.drafters.settings import KangarooSettings
from kangaroo.errors import AdapterError, CheckpointError, KangarooError, PromptError, SettingsError
from kangaroo.llm import LLM
from kangaroo.model.cache import CachedPass
from kangaroo.model.checkpoint import load_model
from kangaroo.model.config import ModelConfig
from kangaroo.model.weights import save_checkpoint
from kangaroo.types import Completion, SamplingParams, Token
from tests.tiny import EOS, VOCAB_SIZE, save_tiny_tokenizer, tiny_raw_config, tiny_tokenizer, tiny_transformer

EXIT_LAYER = 2
PROMPT = "A kangaroo hops"


def write_model(folder: Path, *, seed: int = 3, generation_config: object = None, **overrides: Any) -> Path:
    """A checkpoint whose layers from EXIT_LAYER on change little, with its untrained adapter beside it."""
    raw = tiny_raw_config(**overrides)
    target = tiny_transformer(ModelConfig.from_dict(raw), seed)
    for layer in target.layers[EXIT_LAYER:]:
        layer.output *= 0.15
        layer.down *= 0.15
    save_checkpoint(target, folder, raw_config=raw, dtype=torch.float32)
    save_tiny_tokenizer(folder)
    if generation_config is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation_config))
    (folder / "adapter").mkdir()
    Adapter.initialize(target, EXIT_LAYER).save(folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def own_model(tmp_path: Path, model: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(model, tmp_path / "own"))


@pytest.fixture(scope="module")
def kangaroo(model: Path) -> LLM:
    return LLM.from_pretrained(str(model), KangarooSettings(gamma=4, eta=0.0))


@pytest.fixture(scope="module")
def plain(model: Path) -> LLM:
    return LLM.from_pretrained(str(model), "plain")


def drain(llm: LLM, prompt: str | Sequence[int], params: SamplingParams) -> tuple[list[Token], Completion]:
    tokens, stream = [], llm.stream(prompt, params)
    while True:
        try:
            tokens.append(next(stream))
        except StopIteration as stop:
            return tokens, stop.value


# --- which drafter


def test_kangaroo_is_taken_where_an_adapter_lies_beside_the_model(own_model: Path) -> None:
    llm = LLM.from_pretrained(str(own_model))
    assert isinstance(llm.drafter, KangarooDrafter)
    assert llm.drafter.exit_layer == EXIT_LAYER
    shutil.rmtree(own_model / "adapter")
    assert isinstance(LLM.from_pretrained(str(own_model)).drafter, PlainDrafter)
    (own_model / "adapter").mkdir()
    assert isinstance(LLM.from_pretrained(str(own_model)).drafter, PlainDrafter)


def test_drafters_are_built_by_name(model: Path) -> None:
    assert LLM.from_pretrained(str(model), "plain").drafter.name == "plain"
    assert LLM.from_pretrained(str(model), "kangaroo").drafter.name == "kangaroo"


@pytest.mark.parametrize("name", ["medusa", "", "Kangaroo"])
def test_unknown_drafter_is_refused_with_the_names_allowed(model: Path, name: str) -> None:
    with pytest.raises(SettingsError, match="drafter must be one of plain, kangaroo, got"):
        LLM.from_pretrained(str(model), name)


def test_adapter_of_another_folder_is_used(own_model: Path) -> None:
    elsewhere = own_model.rename(own_model.parent / "renamed") / "adapter"
    moved = shutil.move(elsewhere, own_model.parent / "elsewhere")
    llm = LLM.from_pretrained(str(own_model.parent / "renamed"), KangarooSettings(adapter=str(moved)))
    assert llm.drafter.name == "kangaroo"


# --- what is refused


@pytest.mark.parametrize("dtype", ["int8", "float64", "bf16", ""])
def test_unknown_dtype_is_refused(model: Path, dtype: str) -> None:
    with pytest.raises(SettingsError, match="dtype must be one of float32, bfloat16, float16, got"):
        load_model(str(model), dtype=dtype)


@pytest.mark.parametrize("device", ["tpu", "meta", "mps", "", "cuda:x"])
def test_unknown_device_is_refused(model: Path, device: str) -> None:
    with pytest.raises(SettingsError, match=r"device must be cpu or cuda\[:N\], got"):
        load_model(str(model), device=device)


def test_cuda_device_that_is_not_here_is_refused(model: Path) -> None:
    with pytest.raises(SettingsError, match="device cuda:99 is not here: PyTorch sees"):
        load_model(str(model), device="cuda:99")


def test_missing_model_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such model folder"):
        load_model(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("max_context", [-5, 0, 1, 257])
def test_context_without_room_or_beyond_the_model_is_refused(model: Path, max_context: int) -> None:
    with pytest.raises(SettingsError, match=f"max_context must be in 2..256 .*, got {max_context}"):
        LLM.from_pretrained(str(model), "plain", max_context=max_context)


def test_kangaroo_without_an_adapter_folder_is_refused(own_model: Path) -> None:
    with pytest.raises(AdapterError, match=r"no adapter folder .*nowhere"):
        LLM.from_pretrained(str(own_model), KangarooSettings(adapter=str(own_model / "nowhere")))
    shutil.rmtree(own_model / "adapter")
    with pytest.raises(AdapterError, match="kangaroo train adapter"):
        LLM.from_pretrained(str(own_model), "kangaroo")


@pytest.mark.parametrize(("exit_layer", "message"), [(0, r"1\.\.3, got 0"), (4, r"1\.\.3, got 4"), (1, "trained at")])
def test_exit_layer_that_is_not_the_adapters_is_refused(model: Path, exit_layer: int, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        LLM.from_pretrained(str(model), KangarooSettings(exit_layer=exit_layer))


def test_exit_layer_that_is_the_adapters_is_taken(model: Path) -> None:
    assert LLM.from_pretrained(str(model), KangarooSettings(exit_layer=EXIT_LAYER)).drafter.name == "kangaroo"


def test_adapter_of_another_model_is_refused(own_model: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", seed=4)
    with pytest.raises(AdapterError, match="another model of the same shape"):
        LLM.from_pretrained(str(own_model), KangarooSettings(adapter=str(other / "adapter")))


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_damaged_adapter_is_refused_in_one_line(own_model: Path, name: str) -> None:
    (own_model / "adapter" / name).write_bytes(b"\xffdamaged")
    with pytest.raises(AdapterError) as caught:
        LLM.from_pretrained(str(own_model))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_adapter_with_an_impossible_recommendation_is_refused(own_model: Path) -> None:
    path = own_model / "adapter" / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eta": 1.5}))
    with pytest.raises(AdapterError, match="eta: Input should be less than or equal to 1"):
        LLM.from_pretrained(str(own_model))


@pytest.mark.parametrize("prompt", ["", [], [1, VOCAB_SIZE], [-1], [1] * 256, "x" * 300])
def test_impossible_prompt_is_refused_and_leaves_nothing_behind(kangaroo: LLM, prompt: Any) -> None:
    with pytest.raises(PromptError):
        kangaroo.generate(prompt)
    with pytest.raises(PromptError):
        next(kangaroo.stream(prompt))
    assert kangaroo.drafter._memory == {}  # type: ignore[attr-defined]


# --- end-of-text ids


@pytest.mark.parametrize(
    ("generation_config", "config", "expected"),
    [
        ({"eos_token_id": 257}, {}, {257}),
        ({"eos_token_id": [5, 257]}, {"eos_token_id": 9}, {5, 257}),
        ({"eos_token_id": None}, {"eos_token_id": 9}, {9}),
        ({}, {"eos_token_id": [9, 10]}, {9, 10}),
        (None, {"eos_token_id": 0}, {0}),
        (None, {}, set()),
    ],
)
def test_eos_ids_come_from_the_generation_config_else_from_the_config(
    tmp_path: Path, generation_config: object, config: dict[str, Any], expected: set[int]
) -> None:
    folder = write_model(tmp_path / "model", generation_config=generation_config, **config)
    assert load_model(str(folder)).eos_ids == expected


@pytest.mark.parametrize(
    "content", ['{"eos_token_id": "<eos>"}', '{"eos_token_id": ["a"]}', '{"eos_token_id": {}}', "{", "\\xff"]
)
def test_malformed_generation_config_is_refused(own_model: Path, content: str) -> None:
    (own_model / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        load_model(str(own_model))


def test_eos_of_the_checkpoint_ends_the_text_unless_ignored(tmp_path: Path, plain: LLM) -> None:
    new = plain.generate(PROMPT, SamplingParams(max_new_tokens=20)).token_ids
    at = next(index for index in range(4, 20) if new[index] not in new[:index])
    folder = write_model(tmp_path / "model", generation_config={"eos_token_id": [new[at], 0]})
    llm = LLM.from_pretrained(str(folder), KangarooSettings(gamma=6, eta=0.0))
    stopped = llm.generate(PROMPT, SamplingParams(max_new_tokens=20))
    assert (stopped.token_ids, stopped.finish_reason) == (new[: at + 1], "stop")
    ignoring = llm.generate(PROMPT, SamplingParams(max_new_tokens=20, ignore_eos=True))
    assert (ignoring.token_ids, ignoring.finish_reason) == (new, "length")


# --- texts


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_kangaroo_emits_the_plain_text_in_every_dtype(model: Path, dtype: str, temperature: float) -> None:
    params = SamplingParams(max_new_tokens=24, temperature=temperature, seed=5)
    expected = LLM.from_pretrained(str(model), "plain", dtype=dtype).generate(PROMPT, params)
    drafted = LLM.from_pretrained(str(model), KangarooSettings(eta=0.0), dtype=dtype).generate(PROMPT, params)
    assert drafted.token_ids == expected.token_ids
    assert drafted.text == expected.text
    assert drafted.num_accepted > 0
    assert drafted.num_accepted < drafted.num_drafted


def test_half_precision_rounds_the_weights_and_so_may_change_the_text(model: Path) -> None:
    full, half = (load_model(str(model), dtype=dtype, backend="reference").target for dtype in ("float32", "bfloat16"))
    assert torch.equal(half.layers[0].qkv, full.layers[0].qkv.bfloat16().float())
    assert torch.equal(half.final_norm, full.final_norm)


def test_text_and_its_token_ids_are_the_same_prompt(plain: LLM) -> None:
    params = SamplingParams(max_new_tokens=6)
    ids = plain.model.tokenizer.encode(PROMPT)
    from_text, from_ids = plain.generate(PROMPT, params), plain.generate(ids, params)
    assert from_text.token_ids == from_ids.token_ids
    assert from_text.num_prompt_tokens == len(ids)


def test_completion_reports_its_counts(model: Path, kangaroo: LLM, plain: LLM) -> None:
    params = SamplingParams(max_new_tokens=20)
    done, alone = kangaroo.generate(PROMPT, params), plain.generate(PROMPT, params)
    assert (done.drafter, done.model, done.finish_reason) == ("kangaroo", str(model), "length")
    assert done.num_new_tokens == 20 == sum(done.accepted_lengths) + 1
    assert len(done.accepted_lengths) == done.num_steps == 20 - 1 - done.num_accepted
    assert (alone.num_steps, alone.num_drafted, alone.num_accepted) == (19, 0, 0)
    assert alone.accepted_lengths == (1,) * 19
    assert alone.acceptance_rate is None
    assert done.text == plain.model.tokenizer.decode(done.token_ids)


def test_seed_decides_a_sampled_text(kangaroo: LLM) -> None:
    texts = [
        kangaroo.generate(PROMPT, SamplingParams(max_new_tokens=12, temperature=1.0, seed=seed)).token_ids
        for seed in (1, 2, 1)
    ]
    assert texts[0] == texts[2] != texts[1]


def test_one_llm_serves_growing_and_shrinking_requests_as_a_fresh_one_does(model: Path, kangaroo: LLM) -> None:
    for prompt, wanted in [("a", 3), ("b" * 100, 30), ("cd" * 20, 5), ("e", 60), ("f" * 180, 40)]:
        params = SamplingParams(max_new_tokens=wanted, temperature=0.5)
        fresh = LLM.from_pretrained(str(model), KangarooSettings(gamma=4, eta=0.0))
        assert kangaroo.generate(prompt, params).token_ids == fresh.generate(prompt, params).token_ids


def test_text_that_fills_the_context_ends_for_length(model: Path) -> None:
    llm = LLM.from_pretrained(str(model), max_context=32)
    done = llm.generate(PROMPT, SamplingParams(max_new_tokens=100))
    assert done.num_prompt_tokens + done.num_new_tokens == 32
    assert done.finish_reason == "length"


# --- streams


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_stream_yields_what_generate_returns(kangaroo: LLM, temperature: float) -> None:
    params = SamplingParams(max_new_tokens=21, temperature=temperature, seed=2)
    whole = kangaroo.generate(PROMPT, params)
    tokens, streamed = drain(kangaroo, PROMPT, params)
    assert tuple(token.token_id for token in tokens) == whole.token_ids == streamed.token_ids
    assert (streamed.text, streamed.accepted_lengths) == (whole.text, whole.accepted_lengths)
    assert sum(token.origin == "draft" for token in tokens) == whole.num_accepted > 0
    assert {token.origin for token in tokens} == {"draft", "bonus"}


def spell(llm: LLM, monkeypatch: pytest.MonkeyPatch, ids: Sequence[int]) -> tuple[list[Token], Completion]:
    """A stream of a model made to emit these ids, whatever its weights say."""

    def scripted(hidden: torch.Tensor, attention: CachedPass, **others: object) -> torch.Tensor:
        return torch.tensor([ids[position - 1] for position in attention.positions[-len(hidden) :].tolist()])

    monkeypatch.setattr("kangaroo.engine.step._choose", scripted)
    return drain(llm, [7, 7], SamplingParams(max_new_tokens=len(ids)))


def test_streamed_character_of_several_tokens_comes_with_its_last(plain: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\u00e9\u20ac\U0001f998b"
    ids = plain.model.tokenizer.encode(text, add_special_tokens=False)
    tokens, done = spell(plain, monkeypatch, ids)
    assert [token.text for token in tokens] == ["a", "", "\u00e9", "", "", "\u20ac", "", "", "", "\U0001f998", "b"]
    assert done.text == text


def test_stream_that_ends_inside_a_character_spells_its_torn_bytes_at_the_end(
    plain: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = plain.model.tokenizer.encode("ok\u20ac", add_special_tokens=False)[:-1]
    tokens, done = spell(plain, monkeypatch, ids)
    assert [token.text for token in tokens][:3] == ["o", "k", ""]
    assert tokens[-1].text == "\ufffd"
    assert "".join(token.text for token in tokens) == done.text


@pytest.mark.parametrize("seed", range(4))
def test_streamed_texts_join_to_the_text_whatever_bytes_come(kangaroo: LLM, seed: int) -> None:
    params = SamplingParams(max_new_tokens=25, temperature=2.0, seed=seed)
    tokens, done = drain(kangaroo, PROMPT, params)
    assert "\ufffd" in done.text
    assert "".join(token.text for token in tokens) == done.text


def test_special_tokens_are_emitted_but_not_spelled(plain: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [*plain.model.tokenizer.encode("hi", add_special_tokens=False), tiny_tokenizer().token_to_id(EOS)]
    tokens, done = spell(plain, monkeypatch, ids)
    assert "".join(token.text for token in tokens) == done.text == "hi"
    assert done.token_ids == tuple(ids)


def test_stream_closed_early_frees_the_drafters_memory(kangaroo: LLM) -> None:
    memory = kangaroo.drafter._memory  # type: ignore[attr-defined]
    stream = kangaroo.stream(PROMPT, SamplingParams(max_new_tokens=20))
    next(stream)
    assert len(memory) == 1
    stream.close()  # type: ignore[attr-defined]
    assert memory == {}


def test_generation_that_fails_midway_frees_the_drafters_memory(kangaroo: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **others: object) -> None:
        raise RuntimeError("no more memory")

    monkeypatch.setattr(kangaroo.engine, "step", fail)
    with pytest.raises(RuntimeError, match="no more memory"):
        kangaroo.generate(PROMPT)
    assert kangaroo.drafter._memory == {}  # type: ignore[attr-defined]


def test_stream_overtaken_by_another_request_is_refused_instead_of_mixing_texts(kangaroo: LLM) -> None:
    params = SamplingParams(max_new_tokens=20)
    stream = kangaroo.stream(PROMPT, params)
    next(stream)
    kangaroo.generate("another", params)
    with pytest.raises(KangarooError, match="one request at a time"):
        list(stream)
    assert kangaroo.drafter._memory == {}  # type: ignore[attr-defined]


def test_dtype_and_weights_exclude_each_other(model: Path) -> None:
    with pytest.raises(SettingsError, match="dtype or weights, not both: got bfloat16 and int8"):
        load_model(str(model), dtype="bfloat16", weights="int8")
    with pytest.raises(SettingsError, match="weights must be int8 or left out, got int4"):
        load_model(str(model), weights="int4")
