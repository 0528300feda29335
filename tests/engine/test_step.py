"""One step of the loop: what verification computes, keeps and hands back, for chains, trees and batches."""

from collections.abc import Sequence as SequenceOf
from typing import Any

import pytest
import torch
from torch import Tensor

from kangaroo.drafters.base import Batch, Drafter, Sequence
from kangaroo.drafters.plain import PlainDrafter
from kangaroo.engine.step import prefill, verify_draft
from kangaroo.model.cache import CachedPass, KVCache, Segment
from kangaroo.model.transformer import FullSequencePass, Transformer
from kangaroo.types import Draft, Outcome, Request, SamplingParams
from tests.tiny import tiny_config, tiny_transformer

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2"]
PROMPTS = [[5, 200, 31, 7, 7, 90, 14, 3, 66], [11, 12]]
# Trees as parents of the nodes behind the root: three siblings and uneven depth; a chain.
TREES = [[0, 0, 1, 0, 3, 5, 2], [0, 1, 2]]


class GrowingTrees:
    """Guesses a given tree per sequence, with the true continuation along its deepest branch where known."""

    name = "growing"

    def __init__(self, trees: SequenceOf[SequenceOf[int]], taps: tuple[int, ...] = ()) -> None:
        self.taps = taps
        self.outcomes: list[Outcome] = []
        self.known: dict[Sequence, list[int]] = {}
        self._trees = trees

    def begin(self, sequences: SequenceOf[Sequence], *, num_slots: int) -> None:
        pass

    def draft(self, batch: Batch) -> Draft:
        parents = tuple((-1, *tree) for tree in self._trees)
        rows = [self._grow(sequence, tree) for sequence, tree in zip(batch.sequences, parents, strict=True)]
        return Draft(rows, parents)

    def _grow(self, sequence: Sequence, parents: tuple[int, ...]) -> list[int]:
        depths = Segment(0, 0, len(parents), parents).depths()
        branch = [depths.index(max(depths))]
        while branch[0]:
            branch.insert(0, parents[branch[0]])
        tokens = [sequence.tokens[-1], *((7 * node + 50) % 258 for node in range(1, len(parents)))]
        coming = self.known.get(sequence, [])[len(sequence.tokens) :]
        for node, token in zip(branch[1:], coming, strict=False):
            tokens[node] = token
        return tokens

    def accept(self, sequences: SequenceOf[Sequence], outcome: Outcome) -> None:
        self.outcomes.append(outcome)

    def end(self, sequences: SequenceOf[Sequence]) -> None:
        pass


def make_batch(target: Transformer, prompts: SequenceOf[list[int]], params: SamplingParams | None = None) -> Batch:
    cache = KVCache(target.config, len(prompts), num_slots=64, dtype=torch.float32, device=target.device)
    sequences = [
        Sequence(Request(tuple(prompt), params or SamplingParams()), slot=slot) for slot, prompt in enumerate(prompts)
    ]
    return Batch(target, cache, sequences)


def decode_step(batch: Batch, drafter: Drafter) -> tuple[Draft, Outcome]:
    """One turn of the loop."""
    draft = drafter.draft(batch)
    return draft, verify_draft(batch, drafter, draft=draft)


def commit(batch: Batch, outcome: Outcome) -> None:
    for sequence, tokens in zip(batch.sequences, outcome.tokens, strict=True):
        for index, token in enumerate(tokens):
            sequence.append(token, "bonus" if index == len(tokens) - 1 else "draft")


def read(batch: Batch, drafter: Drafter) -> Outcome:
    """Read the prompts to their ends in one pass."""
    return prefill(batch, drafter, num_rows=[len(sequence.tokens) for sequence in batch.sequences])


def plain_text(target: Transformer, prompt: list[int], num_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(target.logits(full_states(target, tokens)[target.num_layers][-1]).argmax()))
    return tokens


def full_states(target: Transformer, tokens: list[int]) -> dict[int, Tensor]:
    """States [T, D] entering every layer, and those that leave the last, by one pass without a cache."""
    attention = FullSequencePass(target.config, len(tokens), device=target.device)
    span, layers = (0, target.num_layers), tuple(range(target.num_layers + 1))
    _, taps = target.forward(target.embed(torch.tensor([tokens])), span, attention=attention, taps=layers)
    return {layer: states[0] for layer, states in taps.items()}


def assert_cache_holds_text(batch: Batch) -> None:
    """Keys and values of every layer are those of a fresh pass over each sequence's committed tokens but the last."""
    for sequence in batch.sequences:
        fresh = make_batch(batch.target, [sequence.tokens[:-1]])
        read(fresh, PlainDrafter())
        num_tokens = len(sequence.tokens) - 1
        assert batch.cache.lengths[sequence.slot] == num_tokens
        for kept, expected in zip(
            batch.cache.keys + batch.cache.values, fresh.cache.keys + fresh.cache.values, strict=True
        ):
            torch.testing.assert_close(
                kept[sequence.slot, :, :num_tokens], expected[0, :, :num_tokens], rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_verification_logits_equal_a_full_pass_over_each_branch(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    target, plain = tiny_transformer(tiny_config(family)), tiny_transformer(tiny_config(family))
    batch, drafter = make_batch(target, PROMPTS), GrowingTrees(TREES)
    seen: list[tuple[Tensor, Tensor]] = []
    forward = target.forward

    def spy(entering: Tensor, span: tuple[int, int], *, attention: CachedPass, taps: SequenceOf[int]) -> Any:
        hidden, tapped = forward(entering, span, attention=attention, taps=taps)
        seen.append((target.logits(hidden), attention.positions))
        return hidden, tapped

    commit(batch, read(batch, drafter))
    for sequence in batch.sequences:
        drafter.known[sequence] = plain_text(plain, sequence.tokens, 12)
    monkeypatch.setattr(target, "forward", spy)
    for _ in range(3):
        texts = [list(sequence.tokens) for sequence in batch.sequences]
        draft, outcome = decode_step(batch, drafter)
        commit(batch, outcome)
        logits, positions = seen.pop()
        row = 0
        for text, tokens, parents in zip(texts, draft.tokens, draft.parents, strict=True):
            for node in range(len(parents)):
                branch = [node]
                while parents[branch[0]] >= 0:
                    branch.insert(0, parents[branch[0]])
                full = text[:-1] + [tokens[one] for one in branch]
                expected = plain.logits(full_states(plain, full)[plain.num_layers][-1])
                torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)
                assert positions[row] == len(full) - 1
                row += 1
        assert row == len(logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_of_trees_and_chains_emits_and_keeps_what_each_sequence_alone_does(family: str) -> None:
    target = tiny_transformer(tiny_config(family))
    batch, drafter = make_batch(target, PROMPTS), GrowingTrees(TREES, taps=(0, 2, 4))
    commit(batch, read(batch, drafter))
    texts = [plain_text(target, prompt, 21) for prompt in PROMPTS]
    # The second sequence's guesses stay wrong.
    drafter.known[batch.sequences[0]] = texts[0]
    for _ in range(4):
        _, outcome = decode_step(batch, drafter)
        assert [sequence.error for sequence in batch.sequences] == [None, None]
        commit(batch, outcome)
        assert [len(path) for path in outcome.paths] == [5, 1]
        assert outcome.paths[0] == (0, 1, 3, 5, 6)
    for sequence, text in zip(batch.sequences, texts, strict=True):
        assert sequence.tokens == text[: len(sequence.tokens)]
    assert_cache_holds_text(batch)


def test_plain_drafter_decodes_a_batch() -> None:
    target = tiny_transformer(tiny_config())
    batch = make_batch(target, PROMPTS)
    commit(batch, read(batch, PlainDrafter()))
    for _ in range(5):
        draft, outcome = decode_step(batch, PlainDrafter())
        assert draft.num_nodes == (1, 1)
        commit(batch, outcome)
    assert [sequence.tokens for sequence in batch.sequences] == [plain_text(target, prompt, 6) for prompt in PROMPTS]


def test_taps_are_the_states_of_the_committed_tokens() -> None:
    target = tiny_transformer(tiny_config())
    taps = (0, 2, target.num_layers)
    batch, drafter = make_batch(target, PROMPTS), GrowingTrees(TREES, taps=taps)
    commit(batch, read(batch, drafter))
    for sequence, prompt in zip(batch.sequences, PROMPTS, strict=True):
        drafter.known[sequence] = plain_text(target, prompt, 6)
    for _ in range(3):
        commit(batch, decode_step(batch, drafter)[1])
    for row, sequence in enumerate(batch.sequences):
        expected = full_states(target, sequence.tokens[:-1])
        for layer in taps:
            tapped = torch.cat([outcome.taps[row][layer] for outcome in drafter.outcomes])
            torch.testing.assert_close(tapped, expected[layer], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_rows", [1, 4, 9])
def test_prompts_read_in_blocks_equal_prompts_read_at_once(family: str, num_rows: int) -> None:
    target = tiny_transformer(tiny_config(family))
    whole, whole_drafter = make_batch(target, PROMPTS), GrowingTrees(TREES, taps=(1,))
    outcome = read(whole, whole_drafter)
    blocks, blocks_drafter = make_batch(target, PROMPTS), GrowingTrees(TREES, taps=(1,))
    emitted: dict[int, tuple[int, ...]] = {}
    while len(emitted) < len(PROMPTS):
        # Whoever is done stands aside, as in the engine.
        slots = [slot for slot in range(len(PROMPTS)) if slot not in emitted]
        left = [len(PROMPTS[slot]) - blocks.cache.lengths[slot] for slot in slots]
        counts = [min(num_rows, count) for count in left]
        batch = Batch(target, blocks.cache, [blocks.sequences[slot] for slot in slots])
        block = prefill(batch, blocks_drafter, num_rows=counts)
        assert block.paths == tuple(tuple(range(count)) for count in counts)
        for slot, count, rest, tokens in zip(slots, counts, left, block.tokens, strict=True):
            assert len(tokens) == (count == rest)
            emitted |= {slot: tokens} if tokens else {}
    assert tuple(emitted[slot] for slot in range(len(PROMPTS))) == outcome.tokens
    assert blocks.cache.lengths == whole.cache.lengths == [9, 2]
    for mine, other in zip(blocks.cache.keys, whole.cache.keys, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    # The first sequence is in every block.
    tapped = torch.cat([block.taps[0][1] for block in blocks_drafter.outcomes])
    torch.testing.assert_close(tapped, outcome.taps[0][1], rtol=1e-4, atol=1e-4)


def test_sampled_choice_depends_on_the_position_and_not_on_the_slot_in_the_draft() -> None:
    target = tiny_transformer(tiny_config())
    params = SamplingParams(temperature=0.9, seed=6)
    plain = make_batch(target, PROMPTS[:1], params)
    commit(plain, read(plain, PlainDrafter()))
    for _ in range(8):
        commit(plain, decode_step(plain, PlainDrafter())[1])
    text = plain.sequences[0].tokens
    batch, drafter = make_batch(target, PROMPTS[:1], params), GrowingTrees(TREES[:1])
    commit(batch, read(batch, drafter))
    drafter.known[batch.sequences[0]] = text
    commit(batch, decode_step(batch, drafter)[1])
    assert batch.sequences[0].tokens == text[: len(PROMPTS[0]) + 6]


class Refused(Exception):
    """What a rule of acceptance might raise."""


def test_error_in_one_sequence_leaves_the_others_their_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: object, **others: object) -> int:
        raise Refused

    target = tiny_transformer(tiny_config())
    batch, drafter = make_batch(target, PROMPTS), GrowingTrees(TREES)
    commit(batch, read(batch, drafter))
    second = batch.sequences[1]
    second.request = Request(second.request.prompt_ids, SamplingParams(temperature=1.0, seed=1))
    second.needs_logits = True
    monkeypatch.setattr("kangaroo.engine.step.choose", lambda logits, params, **others: (
        failing() if params.temperature else int(logits.argmax())
    ))  # fmt: skip
    drafter.known[batch.sequences[0]] = plain_text(target, PROMPTS[0], 8)
    _, outcome = decode_step(batch, drafter)
    assert batch.sequences[0].error is None
    assert isinstance(second.error, Refused)
    assert [len(path) for path in outcome.paths] == [5, 1]
    assert outcome.tokens[1] == ()
    commit(batch, outcome)
    assert batch.sequences[0].tokens == plain_text(target, PROMPTS[0], 6)
