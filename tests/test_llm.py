"""The front door: loading with a drafter, generating, streaming, and refusing what cannot work."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kangaroo.drafters.adapter import WEIGHTS_FILE, Adapter
from kangaroo.drafters.base import Batch
from kangaroo.drafters.companion import CONFIG_FILE
from kangaroo.drafters.kangaroo import KangarooDrafter
from kangaroo.drafters.plain import PlainDrafter
from kangaroo.drafters.settings import SETTINGS, KangarooSettings
from kangaroo.engine import step
from kangaroo.engine.pace import Pace
from kangaroo.engine.scheduler import Limits
from kangaroo.engine.step import _Choices
from kangaroo.errors import AdapterError, CheckpointError, PromptError, QueueFullError, SettingsError
from kangaroo.llm import LLM, build_drafter
from kangaroo.model.checkpoint import load_model
from kangaroo.model.config import ModelConfig
from kangaroo.model.weights import save_checkpoint
from kangaroo.types import Completion, Draft, Request, SamplingParams, Token
from tests.tiny import VOCAB_SIZE, save_tiny_tokenizer, tiny_raw_config, tiny_transformer

EXIT_LAYER, EOS_ID = 2, VOCAB_SIZE - 1
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


def steady(model: Path, drafter: str | KangarooSettings, *, limits: Limits | None = None) -> LLM:
    """An LLM that drafts as its drafter will, whatever that is measured to bring."""
    loaded = load_model(str(model))
    return LLM(loaded, build_drafter(loaded, drafter), limits=limits)


@pytest.fixture(scope="module")
def kangaroo(model: Path) -> LLM:
    return steady(model, KangarooSettings(gamma=4, eta=0.0))


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


@pytest.mark.parametrize("name", ["wallaby", "", "Kangaroo"])
def test_unknown_drafter_is_refused_with_the_names_allowed(model: Path, name: str) -> None:
    with pytest.raises(SettingsError, match=f"drafter must be one of {', '.join(SETTINGS)}, got {name!r}"):
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


def test_context_beyond_the_model_is_refused(model: Path) -> None:
    with pytest.raises(SettingsError, match=r"max_context must be in 2\.\.256 .*, got 257"):
        LLM.from_pretrained(str(model), "plain", limits=Limits(max_context=257))


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
    loaded = load_model(str(model), dtype=dtype)
    # Without a pace, which might draft too little to see both.
    drafted = LLM(loaded, build_drafter(loaded, KangarooSettings(eta=0.0))).generate(PROMPT, params)
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
        params = SamplingParams(max_new_tokens=wanted, temperature=0.5, seed=3)
        fresh = LLM.from_pretrained(str(model), KangarooSettings(gamma=4, eta=0.0))
        assert kangaroo.generate(prompt, params).token_ids == fresh.generate(prompt, params).token_ids


def test_text_that_fills_the_context_ends_for_length(model: Path) -> None:
    llm = LLM.from_pretrained(str(model), limits=Limits(max_context=32))
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


def spell(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, ids: Sequence[int], *, stop: str | tuple[str, ...] = ()
) -> tuple[list[Token], Completion]:
    """A stream of a model made to emit these ids, whatever its weights say."""

    class Scripted(_Choices):
        def pick(self, index: int) -> Callable[[int, Sequence[int]], int]:
            at = self._sequences[index].num_new_tokens
            return lambda node, drafted: ids[at + len(drafted)]

    monkeypatch.setattr(step, "_Choices", Scripted)
    return drain(llm, [7, 7], SamplingParams(max_new_tokens=len(ids), stop=stop))


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
    ids = [*plain.model.tokenizer.encode("hi", add_special_tokens=False), EOS_ID]
    tokens, done = spell(plain, monkeypatch, ids)
    assert "".join(token.text for token in tokens) == done.text == "hi"
    assert done.token_ids == tuple(ids)


def test_stream_closed_early_frees_the_drafters_memory(kangaroo: LLM) -> None:
    memory = kangaroo.drafter._memory  # type: ignore[attr-defined]
    stream = kangaroo.stream(PROMPT, SamplingParams(max_new_tokens=20))
    next(stream)
    assert len(memory) == 1
    stream.close()
    assert memory == {}


def test_generation_that_fails_midway_frees_the_drafters_memory(kangaroo: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **others: object) -> None:
        raise RuntimeError("no more memory")

    monkeypatch.setattr(kangaroo.engine, "step", fail)
    with pytest.raises(RuntimeError, match="no more memory"):
        kangaroo.generate(PROMPT)
    assert kangaroo.drafter._memory == {}  # type: ignore[attr-defined]


def test_stream_whose_prompt_cannot_be_read_leaves_nothing_behind(
    kangaroo: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **others: object) -> None:
        raise RuntimeError("no more memory")

    with monkeypatch.context() as patch:
        patch.setattr("kangaroo.engine.engine.prefill", fail)
        with pytest.raises(RuntimeError, match="no more memory"):
            kangaroo.stream(PROMPT)
    assert kangaroo.engine.scheduler.running == []
    assert kangaroo.drafter._memory == {}  # type: ignore[attr-defined]


def test_stream_goes_on_while_another_request_is_decoded(model: Path, kangaroo: LLM) -> None:
    params = SamplingParams(max_new_tokens=20)
    expected = kangaroo.generate(PROMPT, params), kangaroo.generate("another", params)
    for max_batch_size in (1, 2):
        llm = steady(model, KangarooSettings(gamma=4, eta=0.0), limits=Limits(max_batch_size=max_batch_size))
        stream = llm.stream(PROMPT, params)
        first = next(stream)
        assert llm.generate("another", params).token_ids == expected[1].token_ids
        rest = list(stream)
        assert (first.token_id, *(token.token_id for token in rest)) == expected[0].token_ids


def test_streams_in_turns_yield_what_each_alone_yields(model: Path, kangaroo: LLM) -> None:
    prompts = [PROMPT, "another", "and a third"]
    params = SamplingParams(max_new_tokens=18, temperature=0.8, seed=4)
    llm = steady(model, KangarooSettings(gamma=3, eta=0.0), limits=Limits(max_batch_size=3))
    streams = {prompt: llm.stream(prompt, params) for prompt in prompts}
    texts: dict[str, list[Token]] = {prompt: [] for prompt in prompts}
    ended: dict[str, Completion] = {}
    while len(ended) < len(prompts):
        for prompt in prompts:
            if prompt not in ended:
                try:
                    texts[prompt].append(next(streams[prompt]))
                except StopIteration as stop:
                    ended[prompt] = stop.value
    for prompt in prompts:
        alone = kangaroo.generate(prompt, params)
        assert tuple(token.token_id for token in texts[prompt]) == ended[prompt].token_ids == alone.token_ids
        assert "".join(token.text for token in texts[prompt]) == ended[prompt].text == alone.text


def test_stream_stops_before_a_stop_string(plain: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = plain.model.tokenizer.encode("one END two", add_special_tokens=False)
    tokens, done = spell(plain, monkeypatch, ids, stop="END")
    assert [token.text for token in tokens] == ["o", "n", "e", " ", "", "", ""]
    assert (done.text, done.finish_reason, done.num_new_tokens) == ("one ", "stop", 7)


def test_several_texts_are_not_streamed(kangaroo: LLM) -> None:
    with pytest.raises(SettingsError, match="n must be 1 to stream one text, got 2"):
        kangaroo.stream(PROMPT, SamplingParams(n=2))


# --- several prompts


PROMPTS = ["a", "bb" * 20, PROMPT, "dd", "e" * 60]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("max_batch_size", [1, 2, 8])
def test_list_of_prompts_gives_the_text_of_each_in_their_order(
    model: Path, kangaroo: LLM, max_batch_size: int, temperature: float
) -> None:
    params = SamplingParams(max_new_tokens=15, temperature=temperature, seed=6)
    llm = steady(model, KangarooSettings(gamma=4, eta=0.0), limits=Limits(max_batch_size=max_batch_size))
    done = llm.generate(PROMPTS, params)
    assert [one.token_ids for one in done] == [kangaroo.generate(prompt, params).token_ids for prompt in PROMPTS]
    assert [one.index for one in done] == [0] * len(PROMPTS)
    ids: list[Sequence[int]] = [llm.model.tokenizer.encode(prompt) for prompt in PROMPTS]
    assert [one.token_ids for one in llm.generate(ids, params)] == [one.token_ids for one in done]
    assert [one.num_prompt_tokens for one in done] == list(map(len, ids))


def test_largest_batch_is_as_the_limits_say(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = steady(model, "plain", limits=Limits(max_batch_size=3))
    sizes: list[int] = []
    draft = llm.drafter.draft

    def watched(batch: Batch) -> Draft:
        sizes.append(len(batch.sequences))
        return draft(batch)

    monkeypatch.setattr(llm.drafter, "draft", watched)
    llm.generate(["x"] * 7, SamplingParams(max_new_tokens=5))
    assert max(sizes) == 3
    assert sizes.count(3) > len(sizes) / 2


def test_texts_of_one_prompt_are_those_of_its_seeds(kangaroo: LLM) -> None:
    params = SamplingParams(max_new_tokens=10, temperature=1.0, seed=9, n=3)
    several = kangaroo.generate(PROMPT, params)
    assert isinstance(several, list)
    assert [one.index for one in several] == [0, 1, 2]
    assert several[0].seed == 9
    assert len({one.token_ids for one in several}) == 3
    for one in several:
        again = kangaroo.generate(PROMPT, replace(params, n=1, seed=one.seed))
        assert again.token_ids == one.token_ids


def test_n_texts_of_every_prompt_come_prompt_by_prompt(kangaroo: LLM) -> None:
    params = SamplingParams(max_new_tokens=4, temperature=1.0, seed=9, n=2)
    done = kangaroo.generate(["a", "bcd"], params)
    assert [(one.num_prompt_tokens, one.index) for one in done] == [(2, 0), (2, 1), (4, 0), (4, 1)]
    expected: list[Completion] = []
    for prompt in ("a", "bcd"):
        expected += kangaroo.generate([prompt], params)
    assert [one.token_ids for one in done] == [one.token_ids for one in expected]


def test_seed_is_drawn_where_none_is_given_and_reported(kangaroo: LLM) -> None:
    params = SamplingParams(max_new_tokens=12, temperature=1.0)
    done = kangaroo.generate([PROMPT, PROMPT], params)
    seeds = [one.seed for one in done]
    assert None not in seeds
    assert seeds[0] != seeds[1]
    for one in done:
        assert kangaroo.generate(PROMPT, replace(params, seed=one.seed)).token_ids == one.token_ids


@pytest.mark.parametrize("prompts", [["a", ""], ["a", "x" * 300], [[1], [VOCAB_SIZE]]])
def test_impossible_prompt_among_others_stops_all_before_any_is_decoded(kangaroo: LLM, prompts: Any) -> None:
    with pytest.raises(PromptError):
        kangaroo.generate(prompts)
    assert kangaroo.engine.scheduler.num_waiting == 0
    assert kangaroo.engine.scheduler.running == []


def test_texts_beyond_the_queue_are_refused_and_none_stays(model: Path) -> None:
    llm = steady(model, "plain", limits=Limits(max_batch_size=2, max_waiting=1))
    params = SamplingParams(max_new_tokens=3)
    for wanted in (["a"] * 4, "a"):
        with pytest.raises(QueueFullError, match="at most 1 requests may wait"):
            llm.generate(wanted, params if isinstance(wanted, list) else replace(params, n=4))
        assert llm.engine.scheduler.num_waiting == 0
    assert len(llm.generate(["a"] * 3, params)) == 3


class Forking(PlainDrafter):
    """Drafts two siblings, which the block rule refuses to verify."""

    def draft(self, batch: Batch) -> Draft:
        return Draft([sequence.tokens[-1:] * 3 for sequence in batch.sequences], [(-1, 0, 0)] * len(batch.sequences))


def test_error_in_a_text_of_several_is_reported_in_its_completion_and_raised_for_one(model: Path) -> None:
    llm = LLM(load_model(str(model)), Forking(), limits=Limits(max_batch_size=2))
    failing = SamplingParams(max_new_tokens=5, temperature=1.0, seed=1, acceptance="block")
    done = llm.generate(["a", "b"], failing)
    for one in done:
        assert (one.finish_reason, one.num_new_tokens) == ("error", 1)
        assert one.error is not None
        assert "acceptance 'block' verifies chains only" in one.error
    with pytest.raises(SettingsError, match="verifies chains only"):
        llm.generate("a", failing)
    with pytest.raises(SettingsError, match="verifies chains only"):
        list(llm.stream("a", failing))
    assert llm.engine.scheduler.num_free_slots == 2


def test_stop_strings_end_each_of_several_texts(model: Path, plain: LLM) -> None:
    params = SamplingParams(max_new_tokens=20, temperature=1.0, seed=2)
    llm = steady(model, KangarooSettings(gamma=4, eta=0.0), limits=Limits(max_batch_size=4))
    whole = [plain.generate(prompt, params).text for prompt in PROMPTS]
    stop = whole[1][3:5]
    done = llm.generate(PROMPTS, replace(params, stop=stop))
    assert [one.text for one in done] == [text.partition(stop)[0] for text in whole]
    assert [one.finish_reason for one in done] == ["stop" if stop in text else "length" for text in whole]
    assert "stop" in [one.finish_reason for one in done]


def test_pretrained_models_draft_at_a_measured_pace(model: Path) -> None:
    llm = LLM.from_pretrained(str(model))
    assert isinstance(llm.engine.pace, Pace)
    done = llm.generate(PROMPT, SamplingParams(max_new_tokens=30))
    assert llm.engine.pace.num_steps == done.num_steps


def test_dtype_and_weights_exclude_each_other(model: Path) -> None:
    with pytest.raises(SettingsError, match="dtype or weights, not both: got bfloat16 and int8"):
        load_model(str(model), dtype="bfloat16", weights="int8")
    with pytest.raises(SettingsError, match="weights must be int8 or left out, got int4"):
        load_model(str(model), weights="int4")


def test_stream_that_is_closed_unread_leaves_nothing_behind(kangaroo: LLM) -> None:
    before = kangaroo.engine.scheduler.num_free_slots
    stream = kangaroo.stream(PROMPT, SamplingParams(max_new_tokens=30))
    assert kangaroo.engine.scheduler.num_free_slots == before - 1
    stream.close()
    assert kangaroo.engine.scheduler.num_free_slots == before


@pytest.mark.parametrize(("params", "fragment"), [({"stop": "x"}, "TextStream"), ({"n": 2}, "n must be 1")])
def test_engine_refuses_what_one_request_cannot_give(plain: LLM, params: dict[str, Any], fragment: str) -> None:
    with pytest.raises(SettingsError, match=fragment):
        plain.engine.submit(Request((1, 2), SamplingParams(**params)))
