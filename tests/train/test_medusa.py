"""Training Medusa heads: which token each head learns, from what, and what is left behind."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from kangaroo.drafters.medusa_heads import MedusaHeads
from kangaroo.errors import KernelError, OutputError, ResumeError, SettingsError
from kangaroo.model import packed
from kangaroo.model.transformer import Transformer
from kangaroo.train import run as run_module
from kangaroo.train.checkpoint import STATE_FILE
from kangaroo.train.data import Dataset
from kangaroo.train.medusa import MedusaRun, predictable, train_medusa
from kangaroo.train.plan import MedusaPlan
from kangaroo.train.run import Progress
from tests.tiny import tiny_config, tiny_transformer

Finish = Callable[..., list[Progress]]


@pytest.fixture
def plan() -> MedusaPlan:
    return MedusaPlan(num_steps=6, batch_size=4, sequence_length=16, warmup_steps=2, evaluate_every=3,
                      checkpoint_every=2, num_heads=3)  # fmt: skip


@pytest.fixture
def finish(target: Transformer, dataset: Dataset) -> Finish:
    def run(plan: MedusaPlan, output: Path, **options: Any) -> list[Progress]:
        return list(train_medusa(target, dataset, plan=plan, output=output, **options))

    return run


def random_batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 258, (2, 17), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, 3:8] = mask[1, 9:12] = True
    return tokens, mask


def learned(target: Transformer, dataset: Dataset, plan: MedusaPlan, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Weights after one step from the same start."""
    run = MedusaRun(target, dataset, plan=plan)
    run.learn(*batch)
    return {name: tensor.detach().clone() for name, tensor in run.tensors.items()}


def test_training_teaches_every_head_the_text(target: Transformer, dataset: Dataset, plan: MedusaPlan) -> None:
    # Every held-out text repeats one sentence, whose next tokens a random model's choices do not tell.
    plan = replace(plan, num_steps=60, learning_rate=1e-2, evaluate_every=60)
    run = MedusaRun(target, dataset, plan=plan)

    def accuracies() -> list[float]:
        found = []
        for number in (1, 2, 3):
            hits = []
            for tokens, mask in run.held_out_batches():
                normed, counted = run.heads.normalize(run.target_states(tokens[:, :-1])), predictable(mask, number)
                guesses = run.heads.logits(normed[:, :-number], number).argmax(-1)
                hits.append((guesses == tokens[:, 1 + number :])[counted])
            found.append(float(torch.cat(hits).float().mean()))
        return found

    before = accuracies()
    losses = [run.advance().loss for _ in range(60)]
    assert losses[-1] < 0.6 * losses[0]
    assert all(now > then + 0.2 for then, now in zip(before, accuracies(), strict=True))


def test_head_k_learns_the_token_k_places_behind_the_next_with_its_share_of_the_loss(
    target: Transformer, dataset: Dataset, plan: MedusaPlan
) -> None:
    run = MedusaRun(target, dataset, plan=replace(plan, head_decay=0.5))
    tokens, mask = random_batch()
    normed = run.heads.normalize(run.target_states(tokens[:, :-1]))
    expected = 0.0
    # mask[row, t] says that token t + 1 is learned; head k at position t learns token t + 1 + k.
    places = {1: [(0, 3), (0, 4), (0, 5), (0, 6), (1, 9), (1, 10)], 2: [(0, 3), (0, 4), (0, 5), (1, 9)],
              3: [(0, 3), (0, 4)]}  # fmt: skip
    for number, at in places.items():
        with torch.no_grad():
            logits = torch.stack([run.heads.logits(normed[row, place], number) for row, place in at])
        labels = torch.stack([tokens[row, place + 1 + number] for row, place in at])
        expected += 0.5**number * float(cross_entropy(logits, labels))
    assert run.learn(tokens, mask) == pytest.approx(expected, rel=1e-5)


def test_tokens_that_are_not_to_be_predicted_change_no_head(
    target: Transformer, dataset: Dataset, plan: MedusaPlan
) -> None:
    tokens, mask = random_batch()
    changed = tokens.clone()
    changed[0, 9:] = changed[1, 13:] = 7
    before, after = (learned(target, dataset, plan, (one, mask)) for one in (tokens, changed))
    assert all(torch.equal(before[name], after[name]) for name in before)
    changed[0, 8] = (tokens[0, 8] + 1) % 258
    after = learned(target, dataset, plan, (changed, mask))
    assert not torch.equal(before["head.3"], after["head.3"])


def test_a_text_too_short_for_a_head_trains_the_others(target: Transformer, dataset: Dataset, plan: MedusaPlan) -> None:
    tokens, mask = random_batch()
    mask[:] = False
    mask[0, 3:5] = True
    before = MedusaHeads.initialize(target, 3).tensors
    after = learned(target, dataset, replace(plan, weight_decay=0.0), (tokens, mask))
    assert not torch.equal(after["head.1"], before["head.1"])
    assert torch.equal(after["head.2"], before["head.2"])


def test_learning_in_chunks_of_rows_equals_learning_at_once(
    target: Transformer, dataset: Dataset, plan: MedusaPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = dataset.batch(4, seed=0, step=0)
    whole = learned(target, dataset, plan, batch)
    monkeypatch.setattr(run_module, "LOGITS_PER_CHUNK", 258 * 5)
    for name, tensor in learned(target, dataset, plan, batch).items():
        # Adam's first step is the sign of the gradient, so only entries with a gradient near zero may differ.
        assert (tensor - whole[name]).abs().gt(1e-6).float().mean() < 0.01, name


def test_metrics_compare_every_head_with_the_choice_of_the_target_as_far_ahead(
    target: Transformer, dataset: Dataset, plan: MedusaPlan
) -> None:
    run = MedusaRun(target, dataset, plan=plan)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in run.tensors.values():
            tensor += 0.05 * torch.randn(tensor.shape, generator=generator)
    agreeing, counted = [], []
    for tokens, mask in run.held_out_batches():
        hidden = run.target_states(tokens[:, :-1])
        choices, normed = target.argmax(hidden), run.heads.normalize(hidden)
        with torch.no_grad():
            guesses = [run.heads.logits(normed, number).argmax(-1) for number in (1, 2, 3)]
        for row in range(len(tokens)):
            for place in range(16 - 3):
                agreeing.append([bool(guesses[k - 1][row, place] == choices[row, place + k]) for k in (1, 2, 3)])
                counted.append([bool(mask[row, place : place + k + 1].all()) for k in (1, 2, 3)])
    metrics = run.measure()
    for k in (1, 2, 3):
        kept = [all(one[:k]) for one, is_counted in zip(agreeing, counted, strict=True) if is_counted[k - 1]]
        alone = [one[k - 1] for one, is_counted in zip(agreeing, counted, strict=True) if is_counted[k - 1]]
        assert metrics[f"ctar_{k}"] == pytest.approx(sum(kept) / len(kept))
        assert metrics[f"top1_{k}"] == pytest.approx(sum(alone) / len(alone))
    assert metrics["top1_2"] > 0
    expected = 1 + sum(metrics[f"ctar_{k}"] for k in (1, 2, 3))
    assert metrics["expected_tokens_per_step"] == pytest.approx(expected)


def test_a_finished_run_leaves_loadable_heads_and_a_report(
    finish: Finish, target: Transformer, plan: MedusaPlan, tmp_path: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in target.parameters()}
    events = finish(replace(plan, dtype="bfloat16"), tmp_path)
    assert [event.step for event in events if event.metrics] == [3, 6]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == events[-1].report
    assert report["num_tokens_seen"] == 6 * 4 * 16
    assert report["stamp"]["kernel_backend"] == "reference"
    heads = MedusaHeads.load(tmp_path, target)
    assert report["heads"] == heads.config.model_dump()
    assert report["num_parameters"] == sum(tensor.numel() for tensor in heads.tensors.values())
    assert all(tensor.dtype == torch.bfloat16 for tensor in load_file(tmp_path / "heads.safetensors").values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.parameters())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    precision: str, finish: Finish, target: Transformer, dataset: Dataset, plan: MedusaPlan, tmp_path: Path
) -> None:
    plan = replace(plan, precision=precision)
    whole = finish(plan, tmp_path / "whole")
    list(islice(train_medusa(target, dataset, plan=plan, output=tmp_path / "killed"), 5))
    resumed = finish(plan, tmp_path / "killed", resume=True)
    assert [event.loss for event in resumed] == [event.loss for event in whole[4:]]
    for name in ("heads.safetensors", STATE_FILE):
        first, second = (load_file(tmp_path / folder / name) for folder in ("whole", "killed"))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_resuming_with_other_heads_or_where_something_lies_is_refused(
    finish: Finish, plan: MedusaPlan, tmp_path: Path
) -> None:
    finish(plan, tmp_path)
    with pytest.raises(ResumeError, match="plan differs: num_heads was 3, now 2"):
        finish(replace(plan, num_heads=2), tmp_path, resume=True)
    with pytest.raises(OutputError, match=r"already holds checkpoint/state\.safetensors; continue with --resume"):
        finish(plan, tmp_path)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma2"])
def test_every_family_trains(family: str, dataset: Dataset, plan: MedusaPlan) -> None:
    batch = dataset.batch(4, seed=0, step=0)
    run = MedusaRun(tiny_transformer(tiny_config(family)), dataset, plan=plan)
    losses = [run.learn(*batch) for _ in range(8)]
    assert losses[-1] < losses[0]


def test_packed_weights_are_not_trained(
    dataset: Dataset, plan: MedusaPlan, target: Transformer, tmp_path: Path
) -> None:
    with pytest.raises(KernelError, match="load the model with backend='reference' to train"):
        train_medusa(packed.pack(target), dataset, plan=plan, output=tmp_path)


@pytest.mark.parametrize(
    ("field", "value"), [("num_heads", 0), ("num_heads", 16), ("head_decay", 0.0), ("head_decay", 1.1)]
)
def test_plans_outside_their_range_are_refused(field: str, value: float, plan: MedusaPlan) -> None:
    with pytest.raises(SettingsError, match=f"{field} must be in .*got {value}"):
        replace(plan, **{field: value})
