"""`kangaroo generate`: what it prints, which drafter it takes, and how it refuses."""

import io
import json
import shutil
import sys
from dataclasses import fields
from inspect import signature
from pathlib import Path

import pytest

from kangaroo.cli.generate import generate
from kangaroo.drafters.settings import SETTINGS
from kangaroo.drafters.stopping import AdaptiveSettings
from kangaroo.llm import LLM
from kangaroo.types import Completion, SamplingParams

from .conftest import MakeModel, Run

FIELDS = ["text", "token_ids", "num_prompt_tokens", "num_new_tokens", "finish_reason", "prefill_time_s",
          "decode_time_s", "draft_time_s", "verify_time_s", "tokens_per_s", "num_steps", "tokens_per_step",
          "num_drafted", "num_accepted",
          "acceptance_rate", "drafter", "model", "seed", "index", "logprobs"]  # fmt: skip
SHORT = ("--prompt", "hello", "--max-new-tokens", 24)


@pytest.mark.parametrize("drafter", ["plain", "kangaroo", "medusa"])
def test_json_is_one_consistent_object(run: Run, model_folder: Path, drafter: str) -> None:
    ran = run("generate", "--model", model_folder, *SHORT, "--drafter", drafter, "--ignore-eos", "--json")
    assert (ran.status, ran.err) == (0, "")
    result = json.loads(ran.out)
    assert list(result) == FIELDS
    assert result["num_prompt_tokens"] == 1 + len("hello")
    assert result["num_new_tokens"] == len(result["token_ids"]) == 24
    assert result["finish_reason"] == "length"
    assert result["tokens_per_s"] == 23 / result["decode_time_s"]
    assert 0 < result["draft_time_s"] + result["verify_time_s"] < result["decode_time_s"]
    assert result["tokens_per_step"] == 23 / result["num_steps"]
    assert result["num_steps"] + result["num_accepted"] >= 23
    if drafter == "plain":
        assert (result["num_steps"], result["num_drafted"], result["acceptance_rate"]) == (23, 0, None)
    else:
        assert result["acceptance_rate"] == result["num_accepted"] / result["num_drafted"]
    assert (result["drafter"], result["model"]) == (drafter, str(model_folder))
    assert (result["index"], result["logprobs"]) == (0, None)


def test_rates_of_no_time_are_null(run: Run, model_folder: Path) -> None:
    ran = run("generate", "--model", model_folder, "--prompt", "a", "--max-new-tokens", 1, "--json")
    result = json.loads(ran.out)
    assert (result["num_steps"], result["decode_time_s"]) == (0, 0)
    assert result["tokens_per_s"] is result["tokens_per_step"] is result["acceptance_rate"] is None


def test_zero_time_is_null_even_with_steps() -> None:
    completion = Completion("ab", (1, 2), 1, "length", 0.0, 0.0, 1, 0, 0, "plain", "m")
    assert completion.to_dict()["tokens_per_s"] is None


@pytest.mark.parametrize("sampling", [[], ["--temperature", 1.0, "--seed", 1], ["--temperature", 1.0, "--seed", 7]])
def test_stream_prints_the_json_text(run: Run, model_folder: Path, sampling: list[object]) -> None:
    argv = ["generate", "--model", model_folder, *SHORT, *sampling]
    text = json.loads(run(*argv, "--json").out)["text"]
    ran = run(*argv)
    assert (ran.status, ran.out) == (0, text + "\n")
    assert ran.err.count("\n") == 1
    assert "tokens/s" in ran.err
    assert ran.err.endswith("drafter kangaroo\n")


def test_drafters_write_one_text(run: Run, model_folder: Path) -> None:
    argv = ["generate", "--model", model_folder, *SHORT, "--temperature", 0.8, "--seed", 3]
    assert run(*argv, "--drafter", "plain").out == run(*argv, "--drafter", "kangaroo", "--eta", 0, "--gamma", 4).out


def test_every_setting_of_a_drafter_is_a_flag() -> None:
    known = {field.name for made in (*SETTINGS.values(), AdaptiveSettings) for field in fields(made)}
    assert known <= set(signature(generate).parameters)


def test_every_field_of_sampling_params_is_a_flag() -> None:
    assert {field.name for field in fields(SamplingParams)} <= set(signature(generate).parameters)


def test_flags_reach_the_sampling_params(run: Run, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    stream = LLM.stream
    monkeypatch.setattr(LLM, "stream", lambda llm, ids, params: seen.append(params) or stream(llm, ids, params))
    flags = ["--temperature", 0.7, "--seed", 4, "--top-k", 9, "--top-p", 0.9, "--min-p", 0.01, "--repetition-penalty",
             1.1, "--presence-penalty", 0.2, "--frequency-penalty", -0.1, "--logit-bias", "7=-inf", "--logit-bias",
             "9=2", "--stop", "ab", "--stop", "cd", "--stop-token-id", 11, "--stop-token-id", 12, "--min-new-tokens", 2,
             "--max-new-tokens", 6, "--acceptance", "block", "--ignore-eos", "-n", 1]  # fmt: skip
    assert run("generate", "--model", model_folder, "--prompt", "hello", *flags).status == 0
    assert seen == [
        SamplingParams(
            6, 0.7, 4, ignore_eos=True, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.1, presence_penalty=0.2,
            frequency_penalty=-0.1, logit_bias={7: float("-inf"), 9: 2.0}, stop=("ab", "cd"), stop_token_ids=(11, 12),
            min_new_tokens=2, acceptance="block",
        )
    ]  # fmt: skip


def test_drawn_seed_is_told_and_draws_the_same_text_again(run: Run, model_folder: Path) -> None:
    argv = ["generate", "--model", model_folder, *SHORT, "--temperature", 1.0, "--json"]
    first, other = json.loads(run(*argv).out), json.loads(run(*argv).out)
    assert first["seed"] != other["seed"]
    again = json.loads(run(*argv, "--seed", first["seed"]).out)
    assert (again["seed"], again["token_ids"]) == (first["seed"], first["token_ids"])


def test_several_texts(run: Run, model_folder: Path) -> None:
    argv = ["generate", "--model", model_folder, *SHORT, "--temperature", 1.0, "--seed", 6, "-n", 3]
    completions = json.loads(run(*argv, "--json").out)["completions"]
    assert [one["index"] for one in completions] == [0, 1, 2]
    assert completions[0]["seed"] == 6
    assert len({one["text"] for one in completions}) == 3
    ran = run(*argv)
    assert ran.out == "".join(one["text"] + "\n" for one in completions)
    assert [f"seed {one['seed']}, " in line for one, line in zip(completions, ran.err.splitlines(), strict=True)]


def test_logprobs_are_told_in_json(run: Run, model_folder: Path) -> None:
    argv = ["generate", "--model", model_folder, *SHORT, "--json", "--logprobs", 2, "--ignore-eos"]
    result = json.loads(run(*argv).out)
    assert [one["token_id"] for one in result["logprobs"]] == result["token_ids"]
    # The greedy token is the likeliest.
    for one in result["logprobs"]:
        assert one["top"][0] == {"token_id": one["token_id"], "logprob": one["logprob"]}
        assert one["top"][1]["logprob"] <= one["logprob"] <= 0


def test_stop_string_ends_the_streamed_text(run: Run, model_folder: Path) -> None:
    argv = ["generate", "--model", model_folder, *SHORT, "--ignore-eos"]
    text = run(*argv).out.removesuffix("\n")
    stop = text[8:11]
    ran = run(*argv, "--stop", "never there", "--stop", stop)
    assert ran.out == text[: text.index(stop)] + "\n"
    assert "(stop)" in ran.err


def test_checkpoint_recommends_sampling_only_when_asked_and_flags_win(run: Run, make_model: MakeModel) -> None:
    folder = make_model()
    recommended = {"do_sample": True, "temperature": 0.9, "top_k": 40, "repetition_penalty": 1.2}
    (folder / "generation_config.json").write_text(json.dumps(recommended), encoding="utf-8")

    def text(*flags: object) -> str:
        return run("generate", "--model", folder, *SHORT, "--seed", 5, *flags).out

    asked = ("--sampling-defaults", "checkpoint")
    flags = ("--temperature", 0.9, "--top-k", 40, "--repetition-penalty", 1.2)
    assert text(*asked) == text(*flags)
    assert text() == text("--temperature", 0) != text(*asked)
    greedy = ("--temperature", 0, "--repetition-penalty", 1)
    assert text(*asked, *greedy) == text()


@pytest.mark.parametrize("flags", [["--num-siblings", 3], ["--num-siblings", 2, "--max-nodes", 5]])
def test_trees_write_the_same_text(run: Run, model_folder: Path, flags: list[object]) -> None:
    argv = ["generate", "--model", model_folder, *SHORT]
    ran = run(*argv, "--eta", 0, *flags)
    assert ran.err.endswith("drafter kangaroo\n")
    assert ran.out == run(*argv, "--drafter", "plain").out


def test_default_drafter_is_kangaroo_only_with_an_adapter(run: Run, model_folder: Path, bare_folder: Path) -> None:
    def drafter(*argv: object) -> object:
        return json.loads(run("generate", "--json", *SHORT, *argv).out)["drafter"]

    assert drafter("--model", model_folder) == "kangaroo"
    assert drafter("--model", bare_folder) == "plain"
    assert drafter("--model", bare_folder, "--adapter", model_folder / "adapter") == "kangaroo"


def test_prompt_sources_agree(run: Run, bare_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = "caf\u00e9\r\n"
    file = tmp_path / "prompt.txt"
    file.write_bytes(prompt.encode())
    argv = ["generate", "--model", bare_folder, "--max-new-tokens", 8]
    told = run(*argv, "--prompt", prompt).out
    assert run(*argv, "--prompt-file", file).out == told
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(prompt.encode())))
    assert run(*argv, "--prompt-file", "-").out == told


def test_chat_template(run: Run, make_model: MakeModel) -> None:
    folder = make_model()
    template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}), encoding="utf-8")
    argv = ["generate", "--model", folder, "--prompt", "hi", "--max-new-tokens", 1, "--json", "--chat"]
    assert json.loads(run(*argv).out)["num_prompt_tokens"] == len("u:hi;")
    assert json.loads(run(*argv, "--system", "be").out)["num_prompt_tokens"] == len("s:be;u:hi;")


@pytest.mark.parametrize(
    ("flags", "fragment"),
    [
        (["--prompt", "a", "--drafter", "plain", "--gamma", 3], "--gamma"),
        (["--prompt", "a", "--drafter", "plain", "--eta", 0.5], "--eta"),
        (["--prompt", "a", "--drafter", "plain", "--adapter", "x"], "--adapter"),
        (["--prompt", "a", "--drafter", "plain", "--exit-layer", 1], "--exit-layer"),
        (["--prompt", "a", "--system", "b"], "--chat"),
        (["--prompt", "a", "--prompt-file", "b"], "give only one"),
        ([], "--prompt-file"),
        (["--prompt", "a", "--drafter", "llama"], "plain"),
        (["--prompt", "a", "--drafter", "plain", "--heads", "x"], "--heads"),
        (["--prompt", "a", "--drafter", "medusa", "--gamma", 3], "--gamma"),
        (["--prompt", "a", "--heads", "x", "--gamma", 3], "--gamma"),
        (["--prompt", "a", "--datastore", "x", "--exit-layer", 3], "--exit-layer"),
        (["--prompt", "a", "--drafter", "plain", "--gate", 0.5], "--gate"),
        (["--prompt", "a", "--draft-model", "x", "--source", "plain"], "--draft-model"),
        (["--prompt", "a", "--dtype", "int8"], "bfloat16"),
        (["--prompt", "a", "--gamma", "many"], "--gamma"),
        (["--prompt", "a", "--drafter", "plain", "--num-siblings", 2], "--num-siblings"),
        (["--prompt", "a", "--logit-bias", "5"], "ID=BIAS"),
        (["--prompt", "a", "--logit-bias", "a=1"], "ID=BIAS"),
        (["--prompt", "a", "--logprobs", 1], "--json"),
        (["--prompt", "a", "--logprobs-of", "raw", "--json"], "--logprobs"),
        (["--prompt", "a", "--acceptance", "typical"], "coupling"),
        (["--prompt", "a", "--sampling-defaults", "mine"], "checkpoint"),
        (["--prompt", "a", "--output", "b"], "--prompts"),
        (["--prompts", "a"], "--output"),
        (["--prompts", "a", "--output", "b", "--prompt", "c"], "give only one"),
    ],
)
def test_usage_errors(run: Run, model_folder: Path, flags: list[object], fragment: str) -> None:
    ran = run("generate", "--model", model_folder, *flags)
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1
    assert fragment in ran.err


def check_refused(run: Run, argv: list[object], fragment: str) -> None:
    ran = run("generate", *argv)
    assert (ran.status, ran.out) == (1, "")
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1
    assert "Traceback" not in ran.err
    assert fragment in ran.err


@pytest.mark.parametrize(
    ("flags", "fragment"),
    [
        (["--gamma", 0], "gamma must be at least 1, got 0"),
        (["--gamma", 0, "--eta", 0], "gamma must be at least 1, got 0"),
        (["--eta", 1.5], "eta must be in [0, 1], got 1.5"),
        (["--eta", -0.1], "eta must be in [0, 1], got -0.1"),
        (["--eta", "nan"], "eta must be in [0, 1], got nan"),
        (["--alpha", 1.5], "alpha must be in [0, 1], got 1.5"),
        (["--exit-layer", 0], "exit_layer must be in 1..3, got 0"),
        (["--exit-layer", 4], "exit_layer must be in 1..3, got 4"),
        (["--exit-layer", 2], "was trained at exit layer 1, got exit_layer 2"),
        (["--adapter", "/no/such/adapter"], "no adapter folder /no/such/adapter"),
        (["--max-new-tokens", 0], "max_new_tokens must be at least 1, got 0"),
        (["--max-context", 1], "max_context must be at least 2, got 1"),
        (["--max-context", 257], "max_context must be in 2..256 (the model's context), got 257"),
        (["--max-context", 4], "the prompt must be under 4 tokens"),
        (["--temperature", -1], "temperature must be 0"),
        (["--seed", -1], "seed must be in 0.."),
        (["--top-p", 0], "top_p must be in (0, 1], got 0.0"),
        (["--stop", ""], "stop must be texts that are not empty"),
        (["--logit-bias", "258=1"], "must be in 0..257, got 258"),
        (["--batch-size", 0], "max_batch_size must be at least 1, got 0"),
        (["--num-siblings", 0], "num_siblings must be at least 1, got 0"),
        (["--max-nodes", 65], "max_nodes must be in 2..64, got 65"),
        (["--device", "toaster"], "device must be cpu or cuda"),
        (["--device", "cuda:99"], "device cuda:99 is not here"),
        (["--chat"], "no chat template"),
    ],
)
def test_bad_settings(run: Run, model_folder: Path, flags: list[object], fragment: str) -> None:
    check_refused(run, ["--model", model_folder, "--prompt", "hello", *flags], fragment)


def test_bad_prompts(run: Run, bare_folder: Path, tmp_path: Path) -> None:
    model = ["--model", bare_folder]
    check_refused(run, [*model, "--prompt", ""], "the prompt is empty")
    check_refused(run, [*model, "--prompt", "x" * 300], "the prompt must be under 256 tokens")
    check_refused(run, [*model, "--prompt-file", tmp_path / "none.txt"], "No such file")
    check_refused(run, [*model, "--prompt-file", tmp_path], "Is a directory")
    check_refused(run, [*model, "--prompt", "caf\udce9"], "must be valid UTF-8, got '\\udce9' at character 3")
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9")
    check_refused(run, [*model, "--prompt-file", latin], "must be UTF-8, got byte 3 (0xe9)")


def test_bad_models(run: Run, make_model: MakeModel) -> None:
    check_refused(run, ["--model", "/no/such/model", "--prompt", "a"], "no such model folder: /no/such/model")
    folder = make_model()
    argv = ["--model", folder, "--prompt", "a"]
    weights, config = folder / "model.safetensors", folder / "config.json"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    check_refused(run, argv, "is damaged")
    weights.rename(folder / "pytorch_model.bin")
    check_refused(run, argv, "pytorch_model.bin is a pickle, which is never loaded")
    config.write_text(config.read_text().replace('"llama"', '"gpt_bigcode"'))
    check_refused(run, argv, "got 'gpt_bigcode'")
    config.unlink()
    check_refused(run, argv, "has no config.json")


@pytest.mark.parametrize(("model_layers", "fragment"), [(4, "another model of the same shape"), (1, "one layer")])
def test_adapter_of_another_model(
    run: Run, model_folder: Path, make_model: MakeModel, *, model_layers: int, fragment: str
) -> None:
    other = make_model(seed=1, layers=model_layers)
    check_refused(run, ["--model", other, "--prompt", "a", "--adapter", model_folder / "adapter"], fragment)


def test_damaged_adapter(run: Run, model_folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(model_folder / "adapter", adapter)
    argv = ["--model", model_folder, "--prompt", "a", "--adapter", adapter]
    (adapter / "adapter.safetensors").write_bytes(b"no tensors")
    check_refused(run, argv, "is damaged")
    (adapter / "config.json").write_text("{}", encoding="utf-8")
    check_refused(run, argv, "is no adapter config")


def test_medusa_heads_come_from_a_flag_or_from_beside_the_model(
    run: Run, model_folder: Path, bare_folder: Path
) -> None:
    argv = ("generate", *SHORT, "--json", "--model")
    plain = json.loads(run(*argv, bare_folder).out)
    given = json.loads(run(*argv, bare_folder, "--heads", model_folder / "medusa").out)
    beside = json.loads(run(*argv, model_folder, "--drafter", "medusa").out)
    assert given["drafter"] == beside["drafter"] == "medusa"
    assert given["token_ids"] == beside["token_ids"] == plain["token_ids"]
    assert given["num_drafted"] == beside["num_drafted"] > 0


def test_medusa_heads_of_another_model_or_none(run: Run, make_model: MakeModel, model_folder: Path) -> None:
    other = make_model(seed=5)
    argv = ["--model", other, "--prompt", "a"]
    check_refused(run, [*argv, "--heads", model_folder / "medusa"], "is for another model of the same shape")
    check_refused(run, [*argv, "--drafter", "medusa"], f"no folder of Medusa heads {other / 'medusa'}")
