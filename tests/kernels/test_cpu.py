"""The native kernels: a row's value depends on the row alone, and agrees with the reference."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kangaroo.errors import SettingsError
from kangaroo.kernels import cpu, reference
from kangaroo.model.config import RopeSettings
from kangaroo.model.transformer import Rotary
from tests.native import every_instruction_set, threads  # noqa: F401

STORAGES = ["float32", "bfloat16", "float16", "int8"]
EPS = torch.finfo(torch.float32).eps
SIZES = st.one_of(st.integers(1, 70), st.sampled_from([96, 127, 256]))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(weight: torch.Tensor, storage: str) -> torch.Tensor:
    """The float32 numbers that a weight kept in this storage stands for."""
    if storage == "int8":
        return reference.dequantize(*reference.quantize(weight))
    return weight.to(getattr(torch, storage)).float()


def each_alone(call: Callable[[torch.Tensor], Any], hidden: torch.Tensor) -> Any:
    """The results of one call for every row."""
    results = [call(hidden[row : row + 1].clone()) for row in range(len(hidden))]
    if isinstance(results[0], tuple):
        return tuple(torch.cat(parts) for parts in zip(*results, strict=True))
    return torch.cat(results)


def assert_same(left: Any, right: Any) -> None:
    if isinstance(left, tuple):
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
    else:
        assert torch.equal(left, right)


def assert_row_invariant(call: Callable[[torch.Tensor], Any], hidden: torch.Tensor, *, num_threads: int) -> None:
    """The call gives every row the same, alone or beside others, in whatever order, on so many threads."""
    alone = each_alone(call, hidden)
    order = torch.randperm(len(hidden), generator=torch.Generator().manual_seed(len(hidden)))
    shuffled = tuple(one[order] for one in alone) if isinstance(alone, tuple) else alone[order]
    assert_same(call(hidden), alone)
    assert_same(call(hidden[order].contiguous()), shuffled)
    with threads(num_threads):
        assert_same(call(hidden), alone)


# Linear and gather


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.tuples(st.integers(1, 21), SIZES, SIZES),
    storage=st.sampled_from(STORAGES),
    biased=st.booleans(),
    num_threads=st.sampled_from([2, 3, 5]),
)
def test_linear_gives_a_row_the_same_whatever_runs_beside_it(
    sizes: tuple[int, int, int], storage: str, biased: bool, num_threads: int
) -> None:
    num_rows, num_inputs, num_outputs = sizes
    bias = noise(num_outputs, seed=2) if biased else None
    weight = cpu.pack(noise(num_outputs, num_inputs, seed=1), storage=storage, bias=bias)
    hidden = noise(num_rows, num_inputs)
    assert_row_invariant(lambda rows: cpu.linear(rows, weight), hidden, num_threads=num_threads)


@settings(deadline=None, max_examples=60)
@given(sizes=st.tuples(st.integers(1, 9), SIZES, SIZES), storage=st.sampled_from(STORAGES), biased=st.booleans())
@example(sizes=(9, 2048, 515), storage="float32", biased=True)
@example(sizes=(3, 4000, 17), storage="int8", biased=False)
def test_linear_agrees_with_exact_arithmetic_within_rounding(
    sizes: tuple[int, int, int], storage: str, biased: bool
) -> None:
    num_rows, num_inputs, num_outputs = sizes
    rows, hidden = noise(num_outputs, num_inputs, seed=1), noise(num_rows, num_inputs)
    bias = noise(num_outputs, seed=2) if biased else torch.zeros(num_outputs)
    weight = cpu.pack(rows, storage=storage, bias=bias if biased else None)
    wide = stored(rows, storage).double()
    exact = hidden.double() @ wide.T + bias
    size = hidden.double().abs() @ wide.abs().T + bias.abs()
    assert ((cpu.linear(hidden, weight) - exact).abs() <= (num_inputs + 4) * EPS * size).all()


@settings(deadline=None, max_examples=40)
@given(sizes=st.tuples(SIZES, SIZES), storage=st.sampled_from(STORAGES), paired=st.booleans(), data=st.data())
def test_gather_reads_the_stored_rows(sizes: tuple[int, int], storage: str, paired: bool, data: st.DataObject) -> None:
    num_rows, num_inputs = sizes[0] * (2 if paired else 1), sizes[1]
    rows = noise(num_rows, num_inputs)
    weight = cpu.pack(rows, storage=storage, paired=paired)
    ids = torch.tensor(data.draw(st.lists(st.integers(0, num_rows - 1), max_size=9)), dtype=torch.int64)
    assert (weight.num_rows, weight.num_inputs) == (num_rows, num_inputs)
    assert torch.equal(cpu.gather(weight, ids.tolist()), stored(rows, storage)[ids])


def test_gather_and_linear_keep_every_finite_float16_and_bfloat16() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        every = every[every.isfinite()].reshape(-1, 1)
        weight = cpu.pack(every, storage=str(dtype).removeprefix("torch."))
        assert torch.equal(cpu.gather(weight, [*range(len(every))]), every.float())
        assert torch.equal(cpu.linear(torch.ones(1, 1), weight)[0], every.float()[:, 0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_infinities_of_a_weight_stay_infinite_and_nans_stay_nans(dtype: torch.dtype) -> None:
    special = torch.tensor([[float("inf")], [-float("inf")], [float("nan")]]).to(dtype)
    weight = cpu.pack(special, storage=str(dtype).removeprefix("torch."))
    out = torch.stack([cpu.linear(torch.ones(1, 1), weight)[0], cpu.gather(weight, [0, 1, 2])[:, 0]])
    assert torch.equal(out[:, :2], special.float()[:2, 0].expand(2, 2))
    assert out[:, 2].isnan().all()


def test_weights_take_the_bytes_of_their_storage() -> None:
    sizes = {storage: cpu.pack(noise(32, 10), storage=storage).num_bytes for storage in STORAGES}
    assert sizes == {"float32": 1280, "bfloat16": 640, "float16": 640, "int8": 320}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("storage", STORAGES)
def test_a_row_of_nans_or_infinities_leaves_its_neighbours_alone(storage: str, bad: float) -> None:
    weight = cpu.pack(noise(37, 19, seed=1), storage=storage)
    head = cpu.Head(weight, norm_eps=1e-6, softcap=None)
    clean = noise(9, 19)
    dirty = clean.clone()
    dirty[1::3] = bad
    kept = torch.tensor([row for row in range(9) if row % 3 != 1])
    for call in (lambda rows: cpu.linear(rows, weight), lambda rows: head.logits(rows, torch.ones(19))):
        assert torch.equal(call(dirty)[kept], call(clean)[kept])
    for one, other in zip(head.guess(dirty, torch.ones(19)), head.guess(clean, torch.ones(19)), strict=True):
        assert torch.equal(one[kept], other[kept])


# Head


def head_of(num_outputs: int, size: int, storage: str, softcap: float | None) -> Any:
    return cpu.Head(cpu.pack(noise(num_outputs, size, seed=1), storage=storage), norm_eps=1e-5, softcap=softcap)


HEADS = {
    "sizes": st.tuples(st.integers(1, 19), SIZES, SIZES),
    "storage": st.sampled_from(STORAGES),
    "softcap": st.sampled_from([None, 3.0]),
    "normed": st.booleans(),
}


@settings(deadline=None, max_examples=25)
@given(**HEADS, num_threads=st.sampled_from([2, 3, 5]))
def test_head_gives_a_row_the_same_whatever_runs_beside_it(
    sizes: tuple[int, int, int], storage: str, softcap: float | None, normed: bool, num_threads: int
) -> None:
    num_rows, size, num_outputs = sizes
    head, norm = head_of(num_outputs, size, storage, softcap), None if normed else noise(size, seed=2)
    for call in (head.logits, head.argmax, head.guess):
        assert_row_invariant(lambda rows, call=call: call(rows, norm), noise(num_rows, size), num_threads=num_threads)


@settings(deadline=None, max_examples=60)
@given(**HEADS)
def test_head_agrees_with_the_reference(
    sizes: tuple[int, int, int], storage: str, softcap: float | None, normed: bool
) -> None:
    num_rows, size, num_outputs = sizes
    head, norm = head_of(num_outputs, size, storage, softcap), None if normed else noise(size, seed=2)
    hidden = noise(num_rows, size)
    entering = hidden if norm is None else reference.rms_norm(hidden, norm, eps=1e-5)
    weight = stored(noise(num_outputs, size, seed=1), storage)
    expected = reference.linear(entering, weight)
    expected = expected if softcap is None else softcap * torch.tanh(expected / softcap)
    logits, (ids, confidence) = head.logits(hidden, norm), head.guess(hidden, norm)
    torch.testing.assert_close(logits, expected, atol=3e-5, rtol=1e-5)
    lowest = [int((row == row.max()).nonzero()[0]) for row in logits]
    assert ids.tolist() == head.argmax(hidden, norm).tolist() == lowest
    torch.testing.assert_close(confidence, torch.softmax(logits, dim=-1).amax(dim=-1), atol=1e-6, rtol=1e-5)


@settings(deadline=None, max_examples=40)
@given(
    num_outputs=SIZES,
    tied=st.sets(st.integers(0, 255), min_size=1, max_size=6),
    num_threads=st.sampled_from([1, 2, 3, 5]),
    storage=st.sampled_from(STORAGES),
    softcap=st.sampled_from([None, 0.5]),
)
def test_lowest_id_wins_ties(
    num_outputs: int, tied: set[int], num_threads: int, storage: str, softcap: float | None
) -> None:
    winners = {one % num_outputs for one in tied}
    rows = noise(num_outputs, 5).clamp(-1, 1)
    rows[list(winners)] = 2.0
    head = cpu.Head(cpu.pack(rows, storage=storage), norm_eps=1e-6, softcap=softcap)
    with threads(num_threads):
        hidden = torch.full((3, 5), 0.5 if softcap is None else 30.0)
        # Under the soft cap at 30 many logits reach the cap exactly, the winners among them.
        logits = head.logits(hidden, None)
        lowest = [int((row == row.max()).nonzero()[0]) for row in logits]
        assert head.argmax(hidden, None).tolist() == head.guess(hidden, None)[0].tolist() == lowest
        assert softcap is not None or lowest == [min(winners)] * 3


@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_a_row_without_a_largest_logit_names_the_lowest_id(bad: float) -> None:
    head = cpu.Head(cpu.pack(torch.ones(20, 1), storage="float32"), norm_eps=1e-6, softcap=None)
    hidden = torch.tensor([[1.0], [bad], [2.0]])
    assert head.argmax(hidden, None).tolist() == [0, 0, 0]
    assert head.guess(hidden, None)[0].tolist() == [0, 0, 0]


def test_an_infinite_logit_wins() -> None:
    rows = torch.ones(40, 1)
    rows[33] = 2e38
    head = cpu.Head(cpu.pack(rows, storage="float32"), norm_eps=1e-6, softcap=None)
    assert head.argmax(torch.tensor([[10.0]]), None).tolist() == [33]


# Stack: kernels/csrc/span.cpp by itself; tests/model/test_packed.py runs it as whole models


class SmallStack:
    """A few random layers with odd sizes, and the tensors that made them."""

    def __init__(
        self,
        *,
        sizes: tuple[int, int, int, int] = (20, 2, 1, 6),
        inner: int | None = 23,
        num_layers: int = 2,
        window: int | None = None,
        softcap: float | None = None,
        storage: str = "float32",
    ) -> None:
        size, heads, kv_heads, dim = self.sizes = sizes
        self.num_layers = num_layers
        self.stack = cpu.Stack(sizes, norm_eps=1e-6, attention_scale=0.3, softcap=softcap, activation="silu")
        rotary = Rotary(RopeSettings(), dim, device=torch.device("cpu"))
        self.tables = rotary.tables(64)
        shapes = {"qkv": ((heads + 2 * kv_heads) * dim, size), "output": (size, heads * dim)}
        if inner is not None:
            shapes |= {"gate_up": (2 * inner, size), "down": (size, inner)}
        for layer in range(num_layers):
            weights = [
                cpu.pack(0.4 * noise(*shapes[name], seed=9 * layer + index), storage=storage, paired=name == "gate_up")
                if name in shapes
                else None
                for index, name in enumerate(("qkv", "output", "gate_up", "down"))
            ]
            norms = {"input_norm": noise(size, seed=layer + 50)} | (
                {} if inner is None else {"mlp_norm": noise(size, seed=layer + 60)}
            )
            self.stack.add_layer(weights, norms, window=window)

    def cache(self, num_sequences: int = 1, num_slots: int = 32) -> Any:
        return cpu.Cache(self.num_layers, num_sequences, self.sizes[2], num_slots, self.sizes[3])

    def run(self, hidden: torch.Tensor, cache: Any, *segments: Any, **options: Any) -> torch.Tensor:
        arguments = {"span": (0, self.num_layers), "tables": self.tables} | options
        cached = (cache, cpu.Tables(arguments.pop("tables")))
        return self.stack.run(hidden, arguments.pop("span"), cached=cached, segments=segments, **arguments)[0]


def one_by_one(small: SmallStack, hidden: torch.Tensor) -> torch.Tensor:
    """Plain decoding: every row alone, after those before it."""
    cache = small.cache()
    return torch.cat([small.run(hidden[t : t + 1], cache, (0, t, 1, None, 0)) for t in range(len(hidden))])


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 0.5}, {"inner": None, "num_layers": 1}])
@pytest.mark.parametrize("storage", STORAGES)
def test_stack_gives_a_chain_the_states_of_plain_decoding(storage: str, options: dict[str, Any]) -> None:
    small = SmallStack(storage=storage, **options)
    hidden = noise(32, 20)
    plain = one_by_one(small, hidden)
    assert torch.equal(small.run(hidden, small.cache(), (0, 0, 32, None, 0)), plain)
    for num_threads in (2, 3, 5):
        with threads(num_threads):
            cache = small.cache()
            assert torch.equal(small.run(hidden[:31], cache, (0, 0, 31, None, 0)), plain[:31])
            assert torch.equal(small.run(hidden[31:], cache, (0, 31, 1, None, 0)), plain[31:])


@pytest.mark.parametrize("window", [None, 2, 4])
def test_nodes_of_a_draft_may_be_run_in_several_passes(window: int | None) -> None:
    small, hidden, parents = SmallStack(window=window), noise(9, 20), [-1, 0, 0, 1, 2, 4, 1, 6, -1]
    prompt, whole, parts = noise(5, 20, seed=1), small.cache(), small.cache()
    for cache in (whole, parts):
        small.run(prompt, cache, (0, 0, 5, None, 0))
    expected = small.run(hidden, whole, (0, 5, 9, parents, 0))
    pieces = [small.run(hidden[a:b], parts, (0, 5, b - a, parents[:b], a)) for a, b in ((0, 1), (1, 2), (2, 6), (6, 9))]
    assert torch.equal(torch.cat(pieces), expected)
    chain = [small.run(hidden[a:b], parts, (0, 5, b - a, None, a)) for a, b in ((0, 4), (4, 5), (5, 9))]
    assert torch.equal(torch.cat(chain), small.run(hidden, whole, (0, 5, 9, None, 0)))


def test_two_segments_of_one_sequence_may_follow_each_other_in_a_pass() -> None:
    small, hidden = SmallStack(), noise(11, 20)
    out = small.run(hidden, small.cache(), (0, 0, 4, None, 0), (0, 4, 7, None, 0))
    assert torch.equal(out, one_by_one(small, hidden))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_bad_rows_leave_other_sequences_branches_and_later_passes_alone(bad: float) -> None:
    small, hidden = SmallStack(softcap=0.5), noise(12, 20)
    dirty = hidden.clone()
    dirty[[1, 4, 9]] = bad
    parents = [-1, 0, 0, 2, 1, 3]
    clean_cache, dirty_cache = small.cache(2), small.cache(2)
    segments = ((0, 0, 6, parents, 0), (1, 0, 6, None, 0))
    clean, out = small.run(hidden, clean_cache, *segments), small.run(dirty, dirty_cache, *segments)
    kept = [0, 2, 3, 5, 6, 7, 8]
    assert torch.equal(out[kept], clean[kept])
    assert not torch.equal(out[[1, 4, 9, 10]], clean[[1, 4, 9, 10]])
    # What was refused lies behind the committed slots until the next pass writes there.
    again = noise(3, 20, seed=2)
    for segment in ((0, 1, 3, None, 0), (1, 3, 3, [-1, -1, 0], 0)):
        assert torch.equal(small.run(again, dirty_cache, segment), small.run(again, clean_cache, segment))


def test_stack_reports_the_states_that_enter_each_tapped_layer() -> None:
    small, hidden = SmallStack(num_layers=4), noise(5, 20)
    call = {"segments": [(0, 0, 5, None, 0)], "cached": (small.cache(), cpu.Tables(small.tables))}
    out, taps = small.stack.run(hidden, (0, 4), taps=(0, 1, 3, 4, 9), **call)
    assert sorted(taps) == [0, 1, 3, 4]
    assert torch.equal(taps[0], hidden)
    assert torch.equal(taps[4], out)
    for layer in (1, 3):
        start = 0 if layer == 1 else 1
        entering = hidden if layer == 1 else taps[1]
        assert torch.equal(small.stack.run(entering, (start, layer), **call)[0], taps[layer])


@pytest.mark.parametrize("skips", [[], [3, 0, 3], [3, 3, 3]])
def test_states_that_enter_are_left_as_they_are(skips: list[int]) -> None:
    small, hidden = SmallStack(num_layers=3), noise(5, 20)
    before = hidden.clone()
    small.run(hidden, small.cache(), (0, 0, 5, None, 0), skips=skips)
    assert torch.equal(hidden, before)


@pytest.mark.parametrize("skips", list(itertools.product([0, 1, 2, 3], repeat=2)))
def test_a_stack_without_some_sublayers_gives_a_row_the_same_whatever_runs_beside_it(skips: tuple[int, int]) -> None:
    # More rows than a thread norms for itself, so that they share a buffer.
    small, hidden = SmallStack(), noise(40, 20)
    cache = small.cache(num_slots=48)
    plain = torch.cat([small.run(hidden[t : t + 1], cache, (0, t, 1, None, 0), skips=skips) for t in range(40)])
    for num_threads in (1, 2, 3):
        with threads(num_threads):
            cache = small.cache(num_slots=48)
            assert torch.equal(small.run(hidden, cache, (0, 0, 40, None, 0), skips=skips), plain)
            assert torch.equal(small.run(hidden[30:], cache, (0, 30, 10, None, 0), skips=skips), plain[30:])


def test_states_pass_a_layer_that_is_skipped_whole_and_are_tapped_behind_it() -> None:
    small, hidden = SmallStack(num_layers=3), noise(5, 20)
    call = {"segments": [(0, 0, 5, None, 0)], "cached": (small.cache(), cpu.Tables(small.tables))}
    out, taps = small.stack.run(hidden, (0, 3), taps=(1, 2, 3), skips=[3, 0, 3], **call)
    assert torch.equal(taps[1], hidden)
    assert torch.equal(taps[2], small.stack.run(hidden, (1, 2), **call)[0])
    assert torch.equal(out, taps[2])
    assert torch.equal(small.stack.run(hidden, (0, 3), skips=[3, 3, 3], **call)[0], hidden)


def test_a_skipped_attention_writes_no_keys_and_values() -> None:
    small, prompt, more = SmallStack(), noise(5, 20), noise(1, 20, seed=1)
    untouched, cache = small.cache(), small.cache()
    for one in (untouched, cache):
        small.run(prompt, one, (0, 0, 5, None, 0))
    small.run(noise(5, 20, seed=2), cache, (0, 0, 5, None, 0), skips=[1, 3])
    expected = small.run(more, untouched, (0, 5, 1, None, 0))
    assert torch.equal(small.run(more, cache, (0, 5, 1, None, 0)), expected)
    small.run(noise(5, 20, seed=2), cache, (0, 0, 5, None, 0), skips=[2, 1])
    assert not torch.equal(small.run(more, cache, (0, 5, 1, None, 0)), expected)


def test_skips_of_another_number_of_layers_are_refused() -> None:
    small = SmallStack()
    refused(lambda: small.run(noise(1, 20), small.cache(), (0, 0, 1, None, 0), skips=[1]), "every layer or none")


# Arguments that do not fit


def refused(call: Callable[[], object], match: str | None = None) -> None:
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize(
    "hidden",
    [torch.ones(2, 4), torch.ones(2, 3).double(), torch.ones(3, 2).T, torch.ones(1, 2, 3), torch.ones(3)],
    ids=["shape", "dtype", "strides", "three-dimensional", "one-dimensional"],
)
def test_states_of_another_form_are_refused(hidden: torch.Tensor) -> None:
    weight = cpu.pack(noise(5, 3), storage="float32")
    head = cpu.Head(weight, norm_eps=1e-6, softcap=None)
    refused(lambda: cpu.linear(hidden, weight), "contiguous float32")
    for call in (head.logits, head.argmax, head.guess):
        refused(lambda call=call: call(hidden, torch.ones(3)), "contiguous float32")


def test_norms_and_tables_of_another_form_are_refused() -> None:
    head = cpu.Head(cpu.pack(noise(5, 3), storage="float32"), norm_eps=1e-6, softcap=None)
    refused(lambda: head.logits(noise(2, 3), torch.ones(4)), "contiguous float32")
    small = SmallStack()
    for tables in (small.tables[:1], small.tables[..., :4], small.tables.double(), small.tables.transpose(1, 2)):
        refused(lambda tables=tables: small.run(noise(1, 20), small.cache(), (0, 0, 1, None, 0), tables=tables))
    narrow = small.tables[..., :4].contiguous()
    refused(lambda: small.run(noise(1, 20), small.cache(), (0, 0, 1, None, 0), tables=narrow), "for heads of")


def test_passes_without_rows_are_refused() -> None:
    weight, small = cpu.pack(noise(5, 3), storage="float32"), SmallStack()
    refused(lambda: cpu.linear(torch.empty(0, 3), weight), "at least one row")
    refused(lambda: cpu.Head(weight, norm_eps=1e-6, softcap=None).argmax(torch.empty(0, 3), None), "at least one row")
    refused(lambda: small.run(torch.empty(0, 20), small.cache()), "at least one row")


def test_paired_weights_serve_the_mlp_alone() -> None:
    paired = cpu.pack(noise(6, 3), storage="float32", paired=True)
    refused(lambda: cpu.linear(noise(2, 3), paired), "unpaired")
    refused(lambda: cpu.Head(paired, norm_eps=1e-6, softcap=None).argmax(noise(2, 3), None), "paired")
    refused(lambda: cpu.pack(noise(5, 3), storage="float32", paired=True), "even")


def test_weights_that_fit_nothing_are_refused() -> None:
    refused(lambda: cpu.pack(torch.empty(0, 3), storage="float32"), "empty")
    refused(lambda: cpu.pack(torch.empty(3, 0), storage="float32"), "empty")
    refused(lambda: cpu.pack(noise(5, 3), storage="float32", bias=noise(4)), "bias")
    refused(lambda: cpu.Weight(noise(5, 3), scales=noise(5)), "int8")
    refused(lambda: cpu.Weight(noise(5, 3).to(torch.int8)), "int8")
    refused(lambda: cpu.Weight(noise(5, 3).to(torch.int8), scales=noise(4)), "scale")
    refused(lambda: cpu.Weight(noise(5, 3).to(torch.int32)), "float32, bfloat16, float16 or int8")
    refused(lambda: cpu.Weight(noise(5, 3).double()), "float32, bfloat16, float16 or int8")


def test_row_ids_outside_a_weight_are_refused() -> None:
    weight = cpu.pack(noise(5, 3), storage="float32")
    refused(lambda: cpu.gather(weight, [0, 5]), "row ids")
    with pytest.raises(TypeError):
        cpu.gather(weight, [-1])


SEGMENTS = {
    "unknown sequence": (1, 0, 2, None, 0),
    "no rows": (0, 0, 0, None, 0),
    "too long a chain": (0, 31, 2, None, 0),
    "beyond the cache": (0, 32, 2, None, 0),
    "first node beyond the cache": (0, 30, 2, None, 1),
    "overflowing base": (0, 2**64 - 1, 2, None, 0),
    "overflowing node": (0, 2, 2, None, 2**64 - 1),
    "too few parents": (0, 0, 2, [-1], 0),
    "too many parents": (0, 0, 2, [-1, 0, 1], 0),
    "parent below minus one": (0, 0, 2, [-1, -2], 0),
    "parent of itself": (0, 0, 2, [-1, 1], 0),
    "later parent": (0, 0, 2, [1, -1], 0),
    "parents of the new nodes alone": (0, 0, 2, [-1, 0], 2),
}


@pytest.mark.parametrize("segment", SEGMENTS.values(), ids=SEGMENTS)
def test_segments_that_fit_no_cache_or_tree_are_refused(segment: Any) -> None:
    small = SmallStack()
    refused(lambda: small.run(noise(2, 20), small.cache(), segment))


def test_states_must_be_as_many_as_the_segments_rows() -> None:
    small = SmallStack()
    refused(lambda: small.run(noise(3, 20), small.cache(), (0, 0, 2, None, 0)), "every row needs a state")
    refused(lambda: small.run(noise(1, 20), small.cache(), (0, 0, 2, None, 0)), "every row needs a state")


def test_positions_beyond_the_rotary_tables_are_refused() -> None:
    small = SmallStack()
    tables = small.tables[:, :4].contiguous()
    refused(lambda: small.run(noise(2, 20), small.cache(), (0, 3, 2, None, 0), tables=tables), "rotary")
    small.run(noise(2, 20), small.cache(), (0, 3, 2, [-1, -1], 0), tables=tables)


@pytest.mark.parametrize("span", [(0, 0), (1, 1), (1, 0), (0, 3), (2, 3)])
def test_spans_of_no_layers_are_refused(span: tuple[int, int]) -> None:
    small = SmallStack()
    refused(lambda: small.run(noise(1, 20), small.cache(), (0, 0, 1, None, 0), span=span), "span")


@pytest.mark.parametrize("sizes", [(3, 1, 1, 6), (2, 1, 2, 6), (2, 1, 1, 8)], ids=["layers", "heads", "head size"])
def test_caches_of_other_layers_are_refused(sizes: tuple[int, int, int, int]) -> None:
    cache = cpu.Cache(*sizes[:3], 32, sizes[3])
    refused(lambda: SmallStack().run(noise(1, 20), cache, (0, 0, 1, None, 0)), "cache")


@pytest.mark.parametrize("call", [(1, 0, [1]), (0, 31, [1]), (0, 0, [1, 0]), (0, 0, [0, 0]), (0, 2**64 - 1, [2])],
                         ids=["sequence", "outside", "backwards", "twice", "overflow"])  # fmt: skip
def test_paths_that_lie_in_no_cache_are_refused(call: tuple[int, int, list[int]]) -> None:
    refused(lambda: SmallStack().cache().keep(*call))


@settings(deadline=None, max_examples=30)
@given(num_slots=st.integers(1, 40), num_held=st.integers(0, 40), more=st.integers(0, 30), sequence=st.integers(0, 2))
def test_copied_slots_are_read_as_the_originals(num_slots: int, num_held: int, more: int, sequence: int) -> None:
    small, num_held = SmallStack(), min(num_held, num_slots)
    held, other = small.cache(3, num_slots), small.cache(4, num_slots + more + 1)
    if num_held:
        small.run(noise(num_held, 20, seed=1), held, (sequence, 0, num_held, None, 0))
        # What the place held before does not show through.
        small.run(noise(num_held, 20, seed=2), other, (sequence, 0, num_held, None, 0))
    other.copy(held, sequence, num_held)
    roomy = small.cache(3, num_slots + more + 1)
    if num_held:
        small.run(noise(num_held, 20, seed=1), roomy, (sequence, 0, num_held, None, 0))
    after = noise(1, 20, seed=3), (sequence, num_held, 1, None, 0)
    assert torch.equal(small.run(after[0], other, after[1]), small.run(after[0], roomy, after[1]))


@pytest.mark.parametrize(
    ("sizes", "call"),
    [
        ((3, 1, 1, 32, 6), (0, 1)),
        ((2, 1, 2, 32, 6), (0, 1)),
        ((2, 1, 1, 32, 8), (0, 1)),
        ((2, 1, 1, 32, 6), (1, 1)),
        ((2, 2, 1, 32, 6), (1, 1)),
        ((2, 1, 1, 16, 6), (0, 17)),
        ((2, 1, 1, 64, 6), (0, 33)),
        ((2, 1, 1, 32, 6), (0, 2**64 - 1)),
    ],
    ids=[
        "layers",
        "heads",
        "head size",
        "no sequence",
        "no sequence here",
        "too few slots",
        "too few here",
        "overflow",
    ],
)
def test_slots_that_lie_in_no_cache_are_not_copied(sizes: tuple[int, ...], call: tuple[int, int]) -> None:
    refused(lambda: SmallStack().cache().copy(cpu.Cache(*sizes), *call))


@pytest.mark.parametrize("sizes", [(20, 3, 2, 6), (20, 2, 1, 5), (20, 2, 0, 6), (0, 2, 1, 6), (20, 2, 1, 0)])
def test_impossible_shapes_are_refused(sizes: tuple[int, int, int, int]) -> None:
    refused(lambda: cpu.Stack(sizes, norm_eps=1e-6, attention_scale=1.0, softcap=None, activation="silu"))


def test_layers_that_do_not_fit_their_stack_are_refused() -> None:
    def weight(num_outputs: int, num_inputs: int, *, paired: bool = False) -> Any:
        return cpu.pack(noise(num_outputs, num_inputs), storage="float32", paired=paired)

    norms = {"input_norm": torch.ones(20), "mlp_norm": torch.ones(20)}
    qkv, output, gate_up, down = weight(24, 20), weight(20, 12), weight(46, 20, paired=True), weight(20, 23)
    stack = SmallStack().stack
    for weights in ([None, output, gate_up, down], [qkv, None, gate_up, down], [None] * 4,
                    [qkv, output, None, down], [qkv, output, gate_up, None],
                    [output, output, gate_up, down], [qkv, output, weight(46, 20), down],
                    [qkv, output, gate_up, weight(20, 46)], [qkv, output, None, None],
                    [qkv, output, weight(48, 20, paired=True), weight(20, 24)], [qkv, output, gate_up]):  # fmt: skip
        refused(lambda weights=weights: stack.add_layer(weights, norms, window=None))
    for wrong in ({"input_norm": torch.ones(20)}, {"mlp_norm": torch.ones(20)}, norms | {"input_norm": torch.ones(19)},
                  norms | {"query_norm": torch.ones(7)}):  # fmt: skip
        refused(lambda wrong=wrong: stack.add_layer([qkv, output, gate_up, down], wrong, window=None))
    refused(lambda: stack.add_layer([qkv, output, gate_up, down], norms, window=-1))
    stack.add_layer([qkv, output, gate_up, down], norms, window=None)


def test_a_stack_runs_on_after_refusing_a_layer() -> None:
    small, hidden = SmallStack(), noise(3, 20)
    expected = small.run(hidden, small.cache(), (0, 0, 3, None, 0))
    shapes = ((24, 20), (20, 12), (46, 20), (20, 23))
    weights = [cpu.pack(noise(*shape), storage="float32", paired=shape[0] == 46) for shape in shapes]
    with pytest.raises(ValueError, match="norm is missing"):
        small.stack.add_layer(weights, {"input_norm": torch.ones(20)}, window=None)
    # What is multiplied after the last layer must not be what was refused, and is gone.
    del weights
    assert torch.equal(small.run(hidden, small.cache(), (0, 0, 3, None, 0)), expected)


# Embedding, layers and head in one call


class SmallModel(SmallStack):
    """A small stack between an embedding and a head."""

    def __init__(self, *, scale: float = 1.0, storage: str = "float32") -> None:
        super().__init__(storage=storage)
        self.scale = scale
        self.embedding = cpu.pack(noise(30, 20, seed=70), storage=storage)
        self.head = cpu.Head(cpu.pack(noise(30, 20, seed=71), storage=storage), norm_eps=1e-6, softcap=None)
        self.norm = noise(20, seed=72)

    def decide(self, entering: Any, segment: Any, *, taps: Any = (), **parts: Any) -> Any:
        ends = (
            parts.get("embedding", self.embedding),
            self.scale,
            parts.get("head", self.head).describe(self.norm, (0, 0, 0)),
        )
        span = 0, self.num_layers
        cached = self.cache(), cpu.Tables(self.tables)
        return self.stack.decide(entering, span, cached=cached, segments=(segment,), taps=taps, ends=ends)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_tokens_are_decided_as_their_states_are_run(storage: str, scale: float) -> None:
    small, tokens, segment = SmallModel(scale=scale, storage=storage), [7, 0, 29, 7], (0, 0, 4, None, 0)
    states = cpu.gather(small.embedding, tokens) * scale
    out, tapped = small.stack.run(
        states, (0, 2), cached=(small.cache(), cpu.Tables(small.tables)), segments=(segment,), taps=(1,)
    )
    expected = small.head.argmax(out, small.norm).tolist()
    ids, inner = small.decide(tokens, segment, taps=(1, 2))
    assert ids == expected
    assert len(set(ids)) > 1
    assert_same((inner[1], inner[2]), (tapped[1], out))
    ids, every = small.decide(states, segment, taps=(0, 1, 2))
    assert ids == expected
    assert_same((every[0], every[1], every[2]), (states, tapped[1], out))


def test_what_does_not_fit_the_stack_is_not_decided() -> None:
    small, segment = SmallModel(), (0, 0, 2, None, 0)
    for tokens in ([1], [1, 2, 3], []):
        refused(lambda tokens=tokens: small.decide(tokens, segment), "every row needs a state")
    refused(lambda: small.decide([1, 30], segment), "row ids must be below")
    refused(lambda: small.decide(noise(2, 19), segment))
    narrow = cpu.pack(noise(30, 19), storage="float32")
    refused(lambda: small.decide([1, 2], segment, embedding=narrow), "every row needs a token")
    with pytest.raises(TypeError):
        small.decide([1, -1], segment)
    head, small.norm = cpu.Head(narrow, norm_eps=1e-6, softcap=None), noise(19)
    refused(lambda: small.decide([1, 2], segment, head=head), "one hidden size")


# Drafting in one call; tests/drafters/test_kangaroo.py compares it with drafting level by level

CHAIN_BOUNDS = 1, 1, 8
NO_LIMITS = 0.0, 0.0, 0.0
GREEDY_DRAW = 0, 0.0, 0, 1.0, 0.0


class Planned:
    """Drafts with the first layer of a small model and an adapter."""

    def __init__(self, *, bounds: tuple[int, int, int] = CHAIN_BOUNDS, **parts: Any) -> None:
        self.model, self.adapter = SmallModel(), parts.get("adapter") or SmallStack(num_layers=1)
        head = parts.get("head", self.model.head)
        self.plan = cpu.DraftPlan(
            self.model.stack,
            self.adapter.stack,
            bounds=bounds,
            embedding=(parts.get("embedding", self.model.embedding), 1.0),
            heads=[(head, noise(head.weight.num_inputs, seed=73)), (self.model.head, self.model.norm)],
        )
        self.caches = [self.model.cache(), self.adapter.cache()]

    def draft(self, *, depth: int = 4, base: int = 0, root: int = 7, pending: torch.Tensor | None = None,
              taps: Any = None, tables: torch.Tensor | None = None) -> Any:  # fmt: skip
        pending = torch.empty(0, 20) if pending is None else pending
        tables = self.model.tables if tables is None else tables
        start = 0, base, 0, base, root, pending.shape[0], depth, GREEDY_DRAW
        target, adapter = [(cache, cpu.Tables(tables)) for cache in self.caches]
        return self.plan.draft(target, adapter, starts=[start], limits=NO_LIMITS, pending=pending, taps=taps)


@pytest.mark.parametrize("taps", [(), (1,), (2,), (1, 2)])
@pytest.mark.parametrize("depth", [1, 4, 7])
def test_a_draft_is_verified_in_its_own_call_as_by_a_pass_of_its_own(depth: int, taps: tuple[int, ...]) -> None:
    nodes, states, (following, time_s, tapped) = Planned().draft(depth=depth, taps=taps)
    small = SmallModel()
    (tokens,), (parents,), (confidences,) = nodes
    assert tokens[0] == 7
    assert parents == list(range(-1, depth))
    assert len(tokens) == len(confidences) == depth + 1
    expected, inner = small.decide(tokens, (0, 0, depth + 1, None, 0), taps=(1, 2))
    assert torch.equal(states, inner[1])
    assert following == expected
    for layer in taps:
        assert torch.equal(tapped[layer], inner[layer])
    assert time_s > 0


@pytest.mark.parametrize("taps", [None, (0,), (1, 3)])
def test_a_draft_is_left_unverified_where_that_is_not_wanted_or_needs_more(taps: tuple[int, ...] | None) -> None:
    nodes, states, verified = Planned().draft(taps=taps)
    expected, others, _ = Planned().draft(taps=())
    assert nodes == expected
    assert torch.equal(states, others)
    assert verified is None


def test_states_of_a_draft_lie_where_the_next_one_writes() -> None:
    planned = Planned()
    _, states, _ = planned.draft()
    before, place = states.clone(), states.data_ptr()
    assert torch.equal(planned.plan.states(2, 4), before[2:4])
    _, others, _ = planned.draft(root=3)
    assert others.data_ptr() == place
    assert not torch.equal(planned.plan.states(2, 4), before[2:4])


@pytest.mark.parametrize(
    ("bounds", "match"),
    [((0, 1, 8), "behind an inner layer"), ((2, 1, 8), "behind an inner layer"), ((1, 0, 8), "room for guesses"),
     ((1, 1, 1), "room for guesses")],
)  # fmt: skip
def test_plans_that_cannot_be_are_refused(bounds: tuple[int, int, int], match: str) -> None:
    refused(lambda: Planned(bounds=bounds), match)


def test_parts_that_do_not_fit_a_plan_are_refused() -> None:
    narrow = cpu.pack(noise(30, 19), storage="float32")
    refused(lambda: Planned(adapter=SmallStack()), "adapter of one layer")
    refused(lambda: Planned(adapter=SmallStack(sizes=(19, 2, 1, 6), num_layers=1)), "one hidden size")
    refused(lambda: Planned(embedding=narrow), "one hidden size")
    refused(lambda: Planned(head=cpu.Head(narrow, norm_eps=1e-6, softcap=None)), "one hidden size")
    refused(lambda: Planned(embedding=cpu.pack(noise(29, 20), storage="float32")), "must have an embedding")
    paired = cpu.pack(noise(60, 20), storage="float32", paired=True)
    refused(lambda: Planned(embedding=paired), "no paired weight")


def test_drafts_that_do_not_fit_are_refused_and_the_next_one_is_made() -> None:
    planned = Planned()
    expected = planned.draft()[0]
    refused(lambda: planned.draft(root=30), "must have an embedding")
    refused(lambda: planned.draft(root=-1), "must have an embedding")
    refused(lambda: planned.draft(base=28), "must fit the cache")
    refused(lambda: planned.draft(pending=noise(1, 19)), "contiguous float32")
    refused(lambda: planned.draft(tables=planned.model.tables[..., :4].contiguous()), "for heads of")
    assert planned.draft()[0] == expected


def test_unknown_instruction_sets_and_thread_counts_are_refused() -> None:
    chosen = cpu.selected(), cpu.num_threads()
    with pytest.raises(SettingsError, match=r"instruction set must be one of .*baseline.*, got sse9"):
        cpu.select("sse9")
    refused(lambda: cpu.select(cpu.selected(), num_threads=1025), "1024")
    assert (cpu.selected(), cpu.num_threads()) == chosen


def test_values_do_not_depend_on_a_threads_floating_point_mode() -> None:
    # The mode is each thread's own; a pool that took its threads' modes would flush half of these products to zero.
    weight = cpu.pack(torch.full((64, 16), 1e-30), storage="float32")
    hidden = torch.full((1, 16), 1e-10)
    cpu.select(cpu.selected(), num_threads=2)
    expected = cpu.linear(hidden, weight)
    assert (expected > 0).all()
    small = SmallModel(scale=1e-30)
    small.embedding = cpu.pack(torch.full((30, 20), 1e-10) * noise(30, 20).sign(), storage="float32")
    ids, inner = small.decide([1, 2, 3], (0, 0, 3, None, 0), taps=(1,))
    flushes = torch.set_flush_denormal(True)
    try:
        assert torch.equal(cpu.linear(hidden, weight), expected)
        again, found = small.decide([1, 2, 3], (0, 0, 3, None, 0), taps=(1,))
        assert again == ids
        assert torch.equal(found[1], inner[1])
    finally:
        torch.set_flush_denormal(False)
    assert flushes or not torch.backends.cpu.get_cpu_capability()
