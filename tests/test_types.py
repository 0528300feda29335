"""Settings are checked where they are made, and a completion's rates are plain arithmetic."""

import copy
import dataclasses
import json
import math
import pickle
import re
from typing import Any

import numpy as np
import pytest

from kangaroo.errors import KangarooError, SettingsError
from kangaroo.types import Completion, SamplingParams


def completion(**overrides: Any) -> Completion:
    fields: dict[str, Any] = {
        "text": "abc",
        "token_ids": (5, 6, 7, 8, 9),
        "num_prompt_tokens": 3,
        "finish_reason": "length",
        "prefill_time_s": 0.25,
        "decode_time_s": 0.5,
        "num_steps": 2,
        "num_drafted": 4,
        "num_accepted": 1,
        "drafter": "kangaroo",
        "model": "demo",
    }
    return Completion(**fields | overrides)


@pytest.mark.parametrize(
    "setting",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": -1},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": 1e-9},
        {"seed": -1},
        {"seed": 2**63},
        {"top_k": -1},
        {"top_k": 2.5},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": "0.9"},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.nan},
        {"presence_penalty": -2.1},
        {"presence_penalty": math.inf},
        {"frequency_penalty": 2.1},
        {"n": 0},
        {"n": None},
        {"min_new_tokens": -1},
        {"min_new_tokens": 129},
        {"logprobs": -1},
        {"logprobs": 21},
        {"logprobs_of": "both"},
        {"acceptance": "typical"},
        {"stop": ("a", "")},
        {"stop": (5,)},
        {"stop_token_ids": (3, -1)},
        {"logit_bias": ((-1, 0.5),)},
        {"logit_bias": ((3, math.nan),)},
        {"logit_bias": ((3, math.inf),)},
        {"logit_bias": (("3", 0.5),)},
    ],
    ids=str,
)
def test_setting_out_of_range_is_refused_with_its_name_and_value(setting: dict[str, Any]) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(SettingsError, match=rf"{name} must be .*got {re.escape(repr(value))}$") as caught:
        SamplingParams(**setting)
    assert isinstance(caught.value, (KangarooError, ValueError))


def test_settings_at_the_edge_of_their_range_are_taken() -> None:
    params = SamplingParams(max_new_tokens=1, temperature=0.0, seed=2**63 - 1)
    assert (params.max_new_tokens, params.temperature, params.seed) == (1, 0.0, 2**63 - 1)
    edges = {"top_p": 1e-9, "min_p": 1.0, "frequency_penalty": -2.0, "logprobs": 20, "min_new_tokens": 128}
    params = SamplingParams(**edges, logit_bias={4: -math.inf})
    assert {name: getattr(params, name) for name in edges} == edges


def test_message_says_what_was_given_and_what_is_allowed() -> None:
    with pytest.raises(SettingsError) as caught:
        SamplingParams(top_p=1.5)
    assert str(caught.value) == "top_p must be in (0, 1], got 1.5"


def test_stop_texts_biases_and_stop_tokens_are_kept_in_one_unchangeable_form() -> None:
    bias, stop = {9: 1.5, 3: -math.inf}, ["a", "b"]
    params = SamplingParams(logit_bias=bias, stop=stop, stop_token_ids=[7, 8])
    bias[9], stop[0] = 0.0, "changed"
    assert params.logit_bias == ((3, -math.inf), (9, 1.5))
    assert (params.stop, params.stop_token_ids) == (("a", "b"), (7, 8))
    assert SamplingParams(stop="ab").stop == ("ab",)


def test_numbers_of_numpy_are_kept_as_plain_numbers() -> None:
    params = SamplingParams(temperature=np.float64(0.5), top_k=np.int64(3), top_p=1)  # type: ignore[arg-type]
    assert [type(value) for value in (params.temperature, params.top_k, params.top_p)] == [float, int, float]


def test_params_survive_pickling_copying_and_replacing() -> None:
    params = SamplingParams(logit_bias={5: 1.0}, stop="x", stop_token_ids=(4,), temperature=0.5, seed=3)
    for copied in (pickle.loads(pickle.dumps(params)), copy.deepcopy(params), dataclasses.replace(params)):
        assert copied == params
    replaced = dataclasses.replace(params, seed=9)
    assert (replaced.seed, replaced.logit_bias, replaced.stop) == (9, params.logit_bias, params.stop)


def test_rates_leave_out_the_first_token_which_belongs_to_the_prefill() -> None:
    done = completion()
    assert done.num_new_tokens == 5
    assert done.tokens_per_s == 8.0
    assert done.tokens_per_step == 2.0
    assert done.acceptance_rate == 0.25


@pytest.mark.parametrize(
    ("overrides", "rate"),
    [
        ({"decode_time_s": 0.0}, "tokens_per_s"),
        ({"num_steps": 0}, "tokens_per_step"),
        ({"num_drafted": 0, "num_accepted": 0}, "acceptance_rate"),
    ],
)
def test_rate_over_nothing_is_none_instead_of_a_division_error(overrides: dict[str, Any], rate: str) -> None:
    assert getattr(completion(**overrides), rate) is None


def test_to_dict_keeps_the_order_of_the_command_line_and_survives_json() -> None:
    record = completion(accepted_lengths=(3, 1)).to_dict()
    assert list(record) == [
        "text",
        "token_ids",
        "num_prompt_tokens",
        "num_new_tokens",
        "finish_reason",
        "prefill_time_s",
        "decode_time_s",
        "draft_time_s",
        "verify_time_s",
        "tokens_per_s",
        "num_steps",
        "tokens_per_step",
        "num_drafted",
        "num_accepted",
        "acceptance_rate",
        "drafter",
        "model",
        "seed",
        "index",
        "logprobs",
    ]
    assert json.loads(json.dumps(record)) == record
    assert record["token_ids"] == [5, 6, 7, 8, 9]
