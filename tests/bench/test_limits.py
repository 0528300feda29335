"""Limits recomputed by hand."""

from dataclasses import replace

import pytest

from kangaroo.bench import limits
from kangaroo.bench.limits import (
    LevelCounter,
    count_bytes,
    describe_drafted,
    describe_plain,
    measure_bandwidth,
    num_weights,
)
from kangaroo.bench.texts import Run
from kangaroo.cost import StepCosts
from kangaroo.drafters.base import Sequence
from kangaroo.model import packed
from kangaroo.types import Draft, Outcome, Request, SamplingParams
from tests.tiny import tiny_config, tiny_transformer

PLAIN = Run(num_tokens=100, num_steps=100, num_drafted=0, num_accepted=0, num_timed=100, decode_time_s=2.0,
            draft_time_s=0.0, verify_time_s=1.5)  # fmt: skip
DRAFTED = Run(num_tokens=100, num_steps=40, num_drafted=120, num_accepted=60, num_timed=100, decode_time_s=1.2,
              draft_time_s=0.4, verify_time_s=0.72)  # fmt: skip
COSTS = StepCosts(batch_size=1, plain_s=0.02, plain_engine_s=0.005, engine_s=0.002, draft_s={1: 0.004, 6: 0.014},
                  first_s=0.0, verify_s={1: 0.015, 2: 0.016})  # fmt: skip


@pytest.mark.parametrize(("storage", "size"), [("float32", 4), ("bfloat16", 2), ("int8", 1)])
def test_bytes_of_a_plain_step_are_all_matrices_and_the_keys_and_values_in_sight(storage: str, size: int) -> None:
    # Four layers: qkv [32 + 2 * 16, 32], output [32, 32], gate and up [96, 32], down [32, 48]; the head [258, 32].
    numbers = 4 * (64 * 32 + 32 * 32 + 96 * 32 + 32 * 48) + 258 * 32
    target = packed.pack(tiny_transformer(tiny_config()), storage)
    assert num_weights(target) == numbers
    # Two heads of 8 numbers, keys and values, float32 whatever the weights are in.
    assert count_bytes(target, 10) == (size * numbers, 4 * 10 * 2 * 2 * 8 * 4)
    windowed = tiny_transformer(tiny_config("mistral"))
    assert count_bytes(windowed, 10)[1] == 4 * 6 * 2 * 2 * 8 * 4


def test_plain_decoding_is_set_against_its_memory() -> None:
    found = describe_plain(PLAIN, num_bytes=(900, 100), bandwidth=100_000.0)
    assert found["ideal_tokens_per_s"] == 100
    assert found["tokens_per_s"] == 50
    assert found["share"] == pytest.approx(0.5)
    assert list(found["parts_s"].values()) == pytest.approx([0.01, 0.005, 0.005])
    assert sum(found["parts_s"].values()) == pytest.approx(found["step_s"]) == 0.02


def test_drafting_is_set_against_its_ideal() -> None:
    found = describe_drafted(DRAFTED, PLAIN, costs=COSTS, speedup=1.6, level_share=1.0)
    assert found["token_share"] == pytest.approx(0.1)
    assert found["ideal_speedup"] == pytest.approx(2.5 / (1 + 3 * 0.1))
    assert found["share"] == pytest.approx(1.6 / found["ideal_speedup"])
    assert list(found["parts_s"].values()) == pytest.approx([0.015, 0.003, 0.006, 0.004, 0.002])
    assert sum(found["parts_s"].values()) == pytest.approx(found["step_s"]) == 0.03


def test_nodes_beside_others_cost_what_they_do() -> None:
    costs = replace(COSTS, node_s=0.0005)
    found = describe_drafted(DRAFTED, PLAIN, costs=costs, speedup=1.6, level_share=0.75)
    # Three nodes a step, of which three quarters make the tree deeper.
    assert found["levels_per_step"] == pytest.approx(2.25)
    assert found["ideal_speedup"] == pytest.approx(2.5 / (1 + 2.25 * 0.1 + 0.75 * 0.025))
    assert found["parts_s"]["drafting tokens"] == pytest.approx(2.25 * 0.002 + 0.75 * 0.0005)


def test_levels_are_counted_apart_from_nodes() -> None:
    counter, sequence = LevelCounter(), Sequence(Request((1,), SamplingParams()), 0)
    assert counter.level_share == 1.0
    for parents, path in (([(-1, 0, 0, 1, 1)], [0, 1]), ([(-1, 0, 1)], [0]), ([(-1,)], [0])):
        draft = Draft(tokens=[list(range(len(parents[0])))], parents=parents)
        counter.limit([sequence])
        counter.observe(draft, Outcome((path,), ((7,),), ()), draft_time_s=1.0, verify_time_s=1.0)
    assert (counter.num_drafted, counter.num_levels) == (6, 4)
    assert counter.num_drafting == 2


def test_bandwidth_is_measured_by_what_runs_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BANDWIDTH_BYTES", 1 << 20)
    reference = tiny_transformer(tiny_config())
    assert measure_bandwidth(reference) > 1e6
    assert measure_bandwidth(packed.pack(reference)) > 1e6
