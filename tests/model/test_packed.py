"""Whole models on the native kernels: bit for bit what plain decoding computes, and close to the reference."""

import functools
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kangaroo.errors import KernelError
from kangaroo.kernels import cpu
from kangaroo.model import packed
from kangaroo.model.cache import CachedPass, KVCache, Segment
from kangaroo.model.skips import SkippedSublayers
from kangaroo.model.transformer import Transformer
from kangaroo.model.weights import assemble, disassemble, load_transformer, save_checkpoint
from kangaroo.train.adapter import check_plan
from kangaroo.train.plan import AdapterPlan
from tests.native import every_instruction_set, threads  # noqa: F401
from tests.tiny import tiny_config, tiny_raw_config, tiny_transformer

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2"]
STORAGES = ["float32", "bfloat16", "float16", "int8"]
CPU = torch.device("cpu")


# Models, and what plain decoding makes of a text


@functools.cache
def reference_of(family: str, storage: str = "float32", **overrides: Any) -> Transformer:
    model = tiny_transformer(tiny_config(family, **overrides), seed=5)
    return assemble(disassemble(model), model.config, storage=storage, device=CPU)


@functools.cache
def packed_of(family: str, storage: str = "float32", **overrides: Any) -> Any:
    # Packing quantizes by itself; codes of codes would have scales of their own.
    base = reference_of(family, "float32" if storage == "int8" else storage, **overrides)
    return packed.pack(base, storage)


def random_tokens(model: Transformer, count: int, *, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (count,), generator=generator).tolist()


def run(model: Transformer, cache: KVCache, tokens: Sequence[int], segments: Sequence[Segment]) -> Tensor:
    """States [R, D] that leave the last layer in one pass."""
    entering = model.embed(torch.tensor(tokens))
    return model.forward(entering, (0, model.num_layers), attention=CachedPass(cache, list(segments)))[0]


def decode(model: Transformer, cache: KVCache, tokens: Sequence[int]) -> Tensor:
    """Plain decoding of sequence 0: one token a pass; states [T, D]."""
    states = [torch.empty(0, model.config.hidden_size)]
    for token in tokens:
        states.append(run(model, cache, [token], [Segment(0, cache.lengths[0], 1)]))
        cache.keep(0, [0])
    return torch.cat(states)


@dataclass(frozen=True)
class Text:
    """Committed tokens and a draft behind them; parents None for a chain."""

    context: tuple[int, ...]
    draft: tuple[int, ...]
    parents: tuple[int, ...] | None

    def path(self, node: int) -> list[int]:
        """The node's ancestors, root first, itself last."""
        if self.parents is None:
            return list(range(node + 1))
        parent = self.parents[node]
        return [*(self.path(parent) if parent >= 0 else []), node]

    def branch(self, node: int) -> list[int]:
        return [self.draft[one] for one in self.path(node)]


def plain_states(model: Transformer, text: Text) -> tuple[Tensor, Tensor]:
    """By plain decoding: states of the context's tokens, and of every node as the last token of its branch."""
    cache = model.new_cache(1, len(text.context) + len(text.draft))
    context = decode(model, cache, text.context)
    states: dict[int, Tensor] = {}
    for leaf in reversed(range(len(text.draft))):
        if leaf not in states:
            cache.truncate(0, len(text.context))
            states |= zip(text.path(leaf), decode(model, cache, text.branch(leaf)), strict=True)
    return context, torch.stack([states[node] for node in range(len(text.draft))])


def assert_same_rows(model: Transformer, states: Tensor, expected: Tensor) -> None:
    """Equal bit for bit, and so are logits, argmax and guess, all rows at once and one by one."""
    assert torch.equal(states, expected)
    logits, norm = model.logits(states), model.layers[0].input_norm
    ids, confidence = model.guess(states, norm)
    for row in range(len(states)):
        alone = states[row : row + 1].clone()
        assert torch.equal(model.logits(alone)[0], logits[row])
        assert torch.equal(model.argmax(alone)[0], model.argmax(states)[row])
        assert [one.item() for one in model.guess(alone, norm)] == [ids[row].item(), confidence[row].item()]
    assert torch.equal(model.argmax(states), logits.argmax(dim=-1))


def assert_lossless(model: Transformer, texts: Sequence[Text], *, num_slots: int, kept: int, num_threads: int) -> None:
    """Prefill, draft, keep a branch and go on, all texts beside each other: the rows of plain decoding throughout."""
    expected = [plain_states(model, text) for text in texts]
    cache = model.new_cache(len(texts), num_slots)
    slots = list(reversed(range(len(texts))))
    starts = [len(text.context) for text in texts]
    with threads(num_threads):
        if any(starts):
            segments = [Segment(slot, 0, start) for slot, start in zip(slots, starts, strict=True) if start]
            prompts = run(model, cache, [token for text in texts for token in text.context], segments)
            assert torch.equal(prompts, torch.cat([context for context, _ in expected]))
        for slot, start in zip(slots, starts, strict=True):
            cache.truncate(slot, start)
        segments = [
            Segment(slot, start, len(text.draft), text.parents)
            for slot, start, text in zip(slots, starts, texts, strict=True)
        ]
        states = run(model, cache, [token for text in texts for token in text.draft], segments)
        assert_same_rows(model, states, torch.cat([draft for _, draft in expected]))
        more = [
            keep_and_go_on(model, cache, slot, text, node=kept % len(text.draft))
            for slot, text in zip(slots, texts, strict=True)
        ]
    for text, states in zip(texts, more, strict=True):
        branch = [*text.context, *text.branch(kept % len(text.draft))]
        whole = decode(model, model.new_cache(1, len(branch) + len(states)), [*branch, *CONTINUATION[: len(states)]])
        assert torch.equal(states, whole[len(branch) :])


CONTINUATION = (1, 0, 3, 2)


def keep_and_go_on(model: Transformer, cache: KVCache, slot: int, text: Text, *, node: int) -> Tensor:
    """Accept the branch to a node, then run what still fits of the continuation in one pass."""
    cache.keep(slot, text.path(node))
    start = cache.lengths[slot]
    tokens = CONTINUATION[: cache.num_slots - start]
    if not tokens:
        return torch.empty(0, model.config.hidden_size)
    return run(model, cache, tokens, [Segment(slot, start, len(tokens))])


# Bit-identity, by random shapes and trees

TREES = st.lists(st.integers(0, 99), min_size=1, max_size=12).map(
    lambda raw: tuple(number % (node + 1) - 1 for node, number in enumerate(raw))
)
SHAPES = st.fixed_dictionaries(
    {
        "hidden_size": st.sampled_from([1, 7, 16, 33, 50]),
        "intermediate_size": st.sampled_from([1, 15, 32, 41]),
        "vocab_size": st.sampled_from([5, 17, 48, 131]),
        "sliding_window": st.sampled_from([1, 2, 3, 5, 17]),
    }
)
HEADS = st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 2), (6, 3), (7, 1)])
HEAD_DIMS = st.sampled_from([2, 6, 8, 10, 16, 22, 32, 34, 64, 100, 128, 256])


@st.composite
def texts_of(draw: st.DrawFn) -> list[Text]:
    """One to three texts over five tokens."""
    texts = []
    for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
        parents = draw(st.one_of(TREES, st.just(None)))
        size = draw(st.integers(1, 12)) if parents is None else len(parents)
        # The empty cache, edges of panels, and what fills whole panels to the last slot.
        start = draw(st.sampled_from([0, 1, 6, 15, 16, 17, 16 - size, 32 - size]))
        random = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        tokens = torch.randint(0, 5, (start + size,), generator=random).tolist()
        texts.append(Text(tuple(tokens[:start]), tuple(tokens[start:]), parents))
    return texts


@settings(deadline=None, max_examples=60)
@given(
    family=st.sampled_from(FAMILIES),
    storage=st.sampled_from(STORAGES),
    shape=SHAPES,
    heads=HEADS,
    head_dim=HEAD_DIMS,
    texts=texts_of(),
    spare=st.sampled_from([0, 0, 3, 20]),
    kept=st.integers(0, 11),
    num_threads=st.sampled_from([1, 1, 1, 2, 3, 5]),
)
def test_any_model_computes_for_any_draft_what_plain_decoding_computes(
    family: str,
    storage: str,
    shape: dict[str, int],
    heads: tuple[int, int],
    head_dim: int,
    texts: list[Text],
    spare: int,
    kept: int,
    num_threads: int,
) -> None:
    config = tiny_config(
        family,
        num_hidden_layers=2,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=head_dim,
        **shape,
    )
    model = packed.pack(tiny_transformer(config), storage)
    num_slots = max(len(text.context) + len(text.draft) for text in texts) + spare
    assert_lossless(model, texts, num_slots=num_slots, kept=kept, num_threads=num_threads)


# Bit-identity of every family in every storage

TREE = (-1, 0, 0, 1, 2, 4, 1, 5, 7, -1)
MIXED = [
    Text((3, 1, 4, 1, 5, 9, 2), (6, 5, 3, 5, 8, 9, 7, 9, 3, 2), TREE),
    Text((), (2, 7, 1, 8, 2, 8, 1, 8, 2), None),
    Text((1,), (4, 1, 4), (-1, -1, -1)),
]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_drafts_of_several_sequences_get_the_rows_of_plain_decoding(family: str, storage: str) -> None:
    assert_lossless(packed_of(family, storage), MIXED, num_slots=17, kept=8, num_threads=1)


@pytest.mark.parametrize("num_threads", [2, 3, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_the_same_on_every_number_of_threads(family: str, num_threads: int) -> None:
    assert_lossless(packed_of(family), MIXED, num_slots=17, kept=7, num_threads=num_threads)


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_windows_shorter_than_the_draft_hide_by_position_not_by_slot(family: str, window: int) -> None:
    model = packed_of(family, sliding_window=window)
    for kept in (5, 8, 9):
        assert_lossless(model, MIXED, num_slots=20, kept=kept, num_threads=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_may_be_filled_to_its_last_slot(family: str) -> None:
    model = packed_of(family)
    text = Text(tuple(random_tokens(model, 22)), tuple(random_tokens(model, 10, seed=1)), TREE)
    assert_lossless(model, [text], num_slots=32, kept=8, num_threads=1)
    with pytest.raises(ValueError, match="fit the cache"):
        run(model, model.new_cache(1, 32), text.draft, [Segment(0, 23, 10, TREE)])


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=3),
    growth=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 60)), min_size=1, max_size=3),
    family=st.sampled_from(["llama", "qwen3"]),
)
def test_grown_caches_keep_every_text(lengths: list[int], growth: list[tuple[int, int]], family: str) -> None:
    model = packed_of(family)
    grown, roomy = model.new_cache(len(lengths), max(1, *lengths)), model.new_cache(5, 80)
    for slot, length in enumerate(lengths):
        for cache in (grown, roomy):
            if length:
                run(model, cache, random_tokens(model, length, seed=slot), [Segment(slot, 0, length)])
            cache.truncate(slot, length)
    for num_sequences, num_slots in growth:
        before = len(grown.lengths), grown.num_slots
        grown.reserve(num_sequences, num_slots)
        assert (len(grown.lengths), grown.num_slots) == (max(before[0], num_sequences), max(before[1], num_slots))
        assert grown.storage.num_slots >= grown.num_slots
    grown.reserve(len(lengths) + 1, max(lengths) + 4)
    assert grown.lengths[: len(lengths)] == lengths
    # One more text in a new slot, and every old one goes on.
    segments = [Segment(slot, grown.lengths[slot], 4) for slot in range(len(lengths) + 1)]
    tokens = random_tokens(model, 4 * len(segments), seed=99)
    assert torch.equal(run(model, grown, tokens, segments), run(model, roomy, tokens, segments))


@pytest.mark.parametrize("pieces", [[130], [1, 129], [64, 66], [7, 16, 17, 1, 1, 88], [129, 1]])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_prompt_may_be_run_in_pieces(family: str, pieces: list[int]) -> None:
    model = packed_of(family, head_dim=20, sliding_window=37)
    tokens = random_tokens(model, 130)
    plain = decode(model, model.new_cache(1, 130), tokens)
    cache, states = model.new_cache(1, 130), []
    for size in pieces:
        start = cache.lengths[0]
        states.append(run(model, cache, tokens[start : start + size], [Segment(0, start, size)]))
        cache.keep(0, list(range(size)))
    assert torch.equal(torch.cat(states), plain)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_shallow_layers_token_by_token_and_deep_ones_at_once(family: str, storage: str) -> None:
    model = packed_of(family, storage)
    tokens = random_tokens(model, 16)
    plain = decode(model, model.new_cache(1, 16), tokens)
    cache = model.new_cache(1, 16)
    run(model, cache, tokens[:9], [Segment(0, 0, 9)])
    shallow = [
        model.forward(model.embed(torch.tensor(tokens[t : t + 1])), (0, 2), attention=CachedPass(cache, [one]))[0]
        for t in range(9, 16)
        for one in [Segment(0, t, 1)]
    ]
    attention = CachedPass(cache, [Segment(0, 9, 7)])
    deep, _ = model.forward(torch.cat(shallow), (2, 4), attention=attention)
    assert torch.equal(deep, plain[9:])


@pytest.mark.parametrize("family", FAMILIES)
def test_taps_are_the_states_that_enter_a_layer(family: str) -> None:
    model = packed_of(family)
    entering = model.embed(torch.tensor(random_tokens(model, 10)))
    cache, attention = model.new_cache(1, 10), [Segment(0, 0, 10, TREE)]
    hidden, taps = model.forward(entering, (0, 4), attention=CachedPass(cache, attention), taps=(0, 1, 2, 3, 4))
    assert sorted(taps) == [0, 1, 2, 3, 4]
    assert torch.equal(taps[0], entering)
    assert torch.equal(taps[4], hidden)
    for layer in range(4):
        leaving, none = model.forward(taps[layer], (layer, layer + 1), attention=CachedPass(cache, attention))
        assert torch.equal(leaving, taps[layer + 1])
        assert none == {}


SKIPS = SkippedSublayers(attention=frozenset({0, 2}), mlp=frozenset({1, 2}))


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_skip_sublayers_are_the_same_alone_and_beside_others(family: str) -> None:
    model = packed_of(family)
    tokens = random_tokens(model, 14)

    def forward(cache: KVCache, first: int, last: int, segment: Segment) -> Tensor:
        entering = model.embed(torch.tensor(tokens[first:last]))
        return model.forward(entering, (0, 4), attention=CachedPass(cache, [segment]), skips=SKIPS)[0]

    alone, together = model.new_cache(1, 32), model.new_cache(1, 32)
    for cache in (alone, together):
        run(model, cache, tokens[:5], [Segment(0, 0, 5)])
    expected = torch.cat([forward(alone, at, at + 1, Segment(0, at, 1)) for at in range(5, 14)])
    for num_threads in (1, 3):
        with threads(num_threads):
            assert torch.equal(forward(together, 5, 14, Segment(0, 5, 9)), expected)
    # The same rows as a branch behind others that they do not see.
    parents = (-1, 0, 0, -1, 3, 4, 5, 6, 7, 8, 9, 10)
    assert torch.equal(forward(together, 5, 14, Segment(0, 5, 9, parents, 3)), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_skipping_leaves_what_zero_weights_would_leave(family: str) -> None:
    reference = reference_of(family)
    layers = [replace(layer) for layer in reference.layers]
    for layer_id, layer in enumerate(layers):
        for name, skipped in (("output", SKIPS.attention), ("down", SKIPS.mlp)):
            if layer_id in skipped:
                setattr(layer, name, torch.zeros_like(getattr(layer, name)))
    zeroed = Transformer(reference.config, layers, embedding=reference.embedding, final_norm=reference.final_norm,
                         head=reference.head)  # fmt: skip
    for model, without in ((packed_of(family), packed.pack(zeroed)), (reference, zeroed)):
        entering = model.embed(torch.tensor(random_tokens(model, 9)))
        attention = CachedPass(model.new_cache(1, 9), [Segment(0, 0, 9)])
        hidden, taps = model.forward(entering, (0, 4), attention=attention, taps=(0, 1, 3, 4), skips=SKIPS)
        attention = CachedPass(without.new_cache(1, 9), [Segment(0, 0, 9)])
        expected, other_taps = without.forward(entering, (0, 4), attention=attention, taps=(0, 1, 3, 4))
        assert torch.equal(hidden, expected)
        assert all(torch.equal(taps[tap], other_taps[tap]) for tap in (0, 1, 3, 4))


# Agreement with the reference


def assert_rounding(out: Tensor, expected: Tensor) -> None:
    """Differences of a few float32 roundings, measured by the largest number of each row."""
    assert out.shape == expected.shape
    largest = expected.abs().amax(dim=-1, keepdim=True)
    torch.testing.assert_close(out / largest, expected / largest, atol=2e-5, rtol=0)


def assert_agreement(model: Transformer, reference: Transformer, text: Text, *, block: int) -> None:
    """Prefill in blocks, then the draft in one pass, on both."""
    caches = [one.new_cache(1, 64) for one in (model, reference)]
    for start in range(0, len(text.context), block):
        tokens = text.context[start : start + block]
        both = [
            run(one, cache, tokens, [Segment(0, start, len(tokens))])
            for one, cache in zip((model, reference), caches, strict=True)
        ]
        assert_rounding(*both)
    segment = Segment(0, len(text.context), len(text.draft), text.parents)
    states, expected = (
        run(one, cache, text.draft, [segment]) for one, cache in zip((model, reference), caches, strict=True)
    )
    assert_rounding(states, expected)
    assert_rounding(model.logits(states), reference.logits(expected))
    norm = reference.layers[1].input_norm
    assert_rounding(model.logits(states, norm), reference.logits(expected, norm))
    assert_rounding(model.head_logits(states), reference.head_logits(expected))
    assert torch.equal(model.argmax(states), reference.argmax(expected))
    (ids, confidence), (other_ids, other_confidence) = model.guess(states, norm), reference.guess(expected, norm)
    assert torch.equal(ids, other_ids)
    torch.testing.assert_close(confidence, other_confidence, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_models_agree_with_the_reference(family: str, storage: str) -> None:
    model, reference = packed_of(family, storage), reference_of(family, storage)
    assert torch.equal(model.embed(torch.arange(258)), reference.embed(torch.arange(258)))
    text = Text(tuple(random_tokens(model, 20)), tuple(random_tokens(model, 10, seed=1)), TREE)
    for block in (1, 3, 20):
        assert_agreement(model, reference, text, block=block)
    assert_agreement(model, reference, Text((), text.context, None), block=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_bfloat16_holds_say_the_same_kept_in_it_as_in_float32(family: str) -> None:
    rounded = reference_of(family, "bfloat16")
    tokens = random_tokens(rounded, 20)
    logits = []
    for storage in ("bfloat16", "float32"):
        model = packed.pack(rounded, storage)
        logits.append(model.logits(run(model, model.new_cache(1, 32), tokens, [Segment(0, 0, len(tokens))])))
    assert torch.equal(*logits)


@pytest.mark.parametrize("storage", ["float32", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_models_loaded_packed_are_the_models_packed_after_loading(family: str, storage: str, tmp_path: Path) -> None:
    config = tiny_config(family)
    save_checkpoint(tiny_transformer(config), tmp_path, raw_config=tiny_raw_config(family), dtype=torch.float32)
    loaded = load_transformer(tmp_path, config, storage=storage, device=CPU, backend="native")
    other = packed.pack(load_transformer(tmp_path, config, storage="float32", device=CPU), storage)
    assert (loaded.backend, loaded.storage, loaded.dtype, loaded.device) == ("native", storage, torch.float32, CPU)
    tokens = random_tokens(loaded, 9)
    both = [run(one, one.new_cache(1, 9), tokens, [Segment(0, 0, 9)]) for one in (loaded, other)]
    assert torch.equal(*both)
    assert torch.equal(loaded.logits(both[0]), other.logits(both[1]))


# Processes and threads


def test_python_threads_may_run_passes_at_once() -> None:
    models = [packed_of(family) for family in FAMILIES]
    tokens = [random_tokens(model, 30, seed=seed) for seed, model in enumerate(models)]

    def work(index: int) -> Tensor:
        model = models[index % len(models)]
        states = decode(model, model.new_cache(1, 30), tokens[index % len(models)])
        return torch.cat([model.logits(states), model.argmax(states)[:, None].float()], dim=1)

    expected = [work(index) for index in range(5)]
    with threads(2), ThreadPoolExecutor(5) as pool:
        results = list(pool.map(work, range(10)))
    assert all(torch.equal(result, expected[index % 5]) for index, result in enumerate(results))


FORK = """
import os, signal, sys
import torch
from kangaroo.kernels import cpu

signal.alarm(60)
weight = cpu.pack(torch.randn(300, 40), storage="float32")
head, hidden = cpu.Head(weight, norm_eps=1e-6, softcap=None), torch.randn(7, 40)
cpu.select(cpu.selected(), num_threads=1)
expected = head.guess(hidden, torch.ones(40))

def check(*counts):
    for count in counts:
        if count:
            cpu.select(cpu.selected(), num_threads=count)
        assert all(torch.equal(*pair) for pair in zip(head.guess(hidden, torch.ones(40)), expected)), count

for count in (1, 2, 3):
    check(count)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        check(*((None, 2, 1, 3) if count < 3 else (1, None, 3)))
        os._exit(0)
    check(None, 2, 1)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
"""

OUT_OF_MEMORY = """
import resource
import torch
from kangaroo.kernels import cpu

weight = cpu.pack(torch.ones(16384, 1), storage="float32")
head = cpu.Head(weight, norm_eps=1e-6, softcap=None)
head.guess(torch.ones(1, 1), None)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), -1))
try:
    head.guess(torch.ones(16384, 1), None)
except MemoryError:
    pass
else:
    raise SystemExit("a gigabyte was granted")
assert head.guess(torch.ones(2, 1), None)[0].tolist() == [0, 0]
"""


def run_script(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("every_instruction_set", cpu.instruction_sets()[-1:], indirect=True)
def test_a_forked_process_computes_on_threads_of_its_own() -> None:
    run_script(FORK)


@pytest.mark.parametrize("every_instruction_set", cpu.instruction_sets()[-1:], indirect=True)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the address space's size from /proc")
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer reserves terabytes")
def test_a_pass_too_large_for_memory_fails_alone() -> None:
    run_script(OUT_OF_MEMORY)


def test_packed_weights_are_neither_saved_nor_trained() -> None:
    model = packed.pack(tiny_transformer(tiny_config()))
    with pytest.raises(KernelError, match="backend='reference' to save"):
        disassemble(model)
    with pytest.raises(KernelError, match="backend='reference' to train"):
        check_plan(AdapterPlan(exit_layer=1), model)
