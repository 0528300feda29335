"""Settings are checked where they are made, and a completion's rates are plain arithmetic."""

import json
import math
from typing import Any

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
        {"seed": -1},
        {"seed": 2**63},
    ],
)
def test_setting_out_of_range_is_refused_with_its_name_and_value(setting: dict[str, Any]) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(SettingsError, match=rf"{name} must be .*got {value}") as caught:
        SamplingParams(**setting)
    assert isinstance(caught.value, (KangarooError, ValueError))


def test_settings_at_the_edge_of_their_range_are_taken() -> None:
    params = SamplingParams(max_new_tokens=1, temperature=0.0, seed=2**63 - 1)
    assert (params.max_new_tokens, params.temperature, params.seed) == (1, 0.0, 2**63 - 1)


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
        "tokens_per_s",
        "num_steps",
        "tokens_per_step",
        "num_drafted",
        "num_accepted",
        "acceptance_rate",
        "drafter",
        "model",
    ]
    assert json.loads(json.dumps(record)) == record
    assert record["token_ids"] == [5, 6, 7, 8, 9]
