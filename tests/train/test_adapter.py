"""Training an adapter: what is learned, from what, and what is left behind."""

import json
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch.testing import assert_close

from kangaroo.drafters.adapter import KINDS, Adapter
from kangaroo.errors import AdapterError, DataError, SettingsError
from kangaroo.train import run as run_module
from kangaroo.train.adapter import AdapterRun, draft_cost
from kangaroo.train.metrics import Positions
from kangaroo.train.plan import AdapterPlan, resolve_precision
from tests.tiny import tiny_config, tiny_transformer


def gradients(target, dataset, plan, tokens, mask):
    """Weights after one step from the same start."""
    run = AdapterRun(target, dataset, plan=plan)
    run.learn(tokens, mask)
    return {name: tensor.detach().clone() for name, tensor in run.tensors.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_held_out_loss_and_raises_top1(kind, finish, target, dataset, plan, tmp_path):
    plan = replace(plan, adapter_kind=kind, exit_layer=3, num_steps=60, checkpoint_every=60, learning_rate=1e-2)
    before = AdapterRun(target, dataset, plan=plan).evaluate().summary()
    after = finish(plan, tmp_path)[-1].metrics
    assert after["loss"] < before["loss"] - 0.1
    assert after["top1"] > before["top1"] + 0.1
    assert after["expected_acceptance"] > before["expected_acceptance"]


def test_loss_is_the_mean_soft_cross_entropy_at_the_positions_before_masked_tokens(target, dataset, plan):
    run = AdapterRun(target, dataset, plan=plan)
    tokens = torch.randint(0, 258, (2, 17), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, 3:5] = mask[1, 9] = True
    shallow, final = run.target_states(tokens[:, :-1])
    with torch.no_grad():
        labels = target.logits(final).softmax(-1)
        losses = -(labels * target.head_logits(run.draft_states(shallow)).log_softmax(-1)).sum(-1)
    expected = (losses[0, 3] + losses[0, 4] + losses[1, 9]) / 3
    assert run.learn(tokens, mask) == pytest.approx(float(expected), rel=1e-5)


def test_text_after_the_last_masked_token_does_not_change_what_is_learned(target, dataset, plan):
    tokens = torch.randint(0, 258, (2, 17), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, 4:9] = True
    changed = tokens.clone()
    changed[:, 9:] = 7  # index 8 of the mask is token 9, whose label comes from the tokens before it
    before, after = (gradients(target, dataset, plan, t, mask) for t in (tokens, changed))
    assert all(torch.equal(before[name], after[name]) for name in before)
    mask[:, 9] = True
    after = gradients(target, dataset, plan, changed, mask)
    assert not torch.equal(before["output"], after["output"])


def test_learning_in_chunks_of_rows_equals_learning_at_once(target, dataset, plan, monkeypatch):
    tokens, mask = dataset.batch(4, seed=0, step=0)
    whole = gradients(target, dataset, plan, tokens, mask)
    monkeypatch.setattr(run_module, "LOGITS_PER_CHUNK", 258 * 5)
    for name, tensor in gradients(target, dataset, plan, tokens, mask).items():
        # Adam's first step is the sign of the gradient, so only entries with a gradient near zero may differ.
        assert (tensor - whole[name]).abs().gt(1e-6).float().mean() < 0.01, name


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_states_a_hundred_times_larger_are_learned_as_fast(kind, dataset, plan):
    plan = replace(plan, adapter_kind=kind, exit_layer=2, learning_rate=1e-2)
    losses = []
    for scale in (1.0, 100.0):
        # A larger residual stream behind norms: the same predictions from larger states.
        target = tiny_transformer(tiny_config(tie_word_embeddings=False, rms_norm_eps=1e-12))
        target.embedding = target.embedding * scale
        for layer in target.layers:
            layer.output = layer.output * scale
            layer.down = layer.down * scale
        run = AdapterRun(target, dataset, plan=plan)
        losses.append([run.advance().loss for _ in range(20)])
    assert losses[0][-1] < losses[0][0] - 0.05
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_the_target_stays_frozen(finish, target, plan, tmp_path):
    before = {name: tensor.clone() for name, tensor in target.parameters()}
    finish(plan, tmp_path)
    assert all(torch.equal(tensor, before[name]) and tensor.grad is None for name, tensor in target.parameters())


def test_a_finished_run_leaves_a_loadable_adapter_and_a_report(finish, target, plan, tmp_path):
    events = finish(plan, tmp_path)
    assert [event.step for event in events] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events if event.metrics] == [3, 6]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == events[-1].report
    loaded = Adapter.load(tmp_path, target)
    assert loaded.config.exit_layer == 2
    assert loaded.config.gamma in range(1, 7)
    assert 0 <= loaded.config.eta < 1
    assert report["num_parameters"] == sum(tensor.numel() for tensor in loaded.tensors.values())
    assert report["num_tokens_seen"] == 6 * 4 * 16
    assert {"command", "commit", "cpu", "torch"} <= report["stamp"].keys()


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_of_every_kind_is_learned_and_saved(kind, finish, target, plan, tmp_path):
    finish(replace(plan, adapter_kind=kind), tmp_path)
    before, after = Adapter.initialize(target, 2, kind=kind), Adapter.load(tmp_path, target)
    assert after.config.kind == kind
    assert not any(torch.equal(before.tensors[name], tensor) for name, tensor in after.tensors.items())


def test_weights_are_saved_in_the_dtype_of_the_plan(finish, target, plan, tmp_path):
    finish(replace(plan, num_steps=1, dtype="bfloat16"), tmp_path / "low")
    finish(replace(plan, num_steps=1), tmp_path / "full")
    low, full = (Adapter.load(tmp_path / name, target).tensors["qkv"] for name in ("low", "full"))
    assert torch.equal(low, full.bfloat16().float())


def test_bfloat16_training_stays_close_to_float32(finish, plan, tmp_path):
    reports = [
        finish(replace(plan, precision=precision), tmp_path / precision)[-1].report["metrics"]
        for precision in ("float32", "bfloat16")
    ]
    assert reports[1]["loss"] == pytest.approx(reports[0]["loss"], abs=0.05)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma2"])
def test_every_family_trains(family, dataset, plan):
    tokens, mask = dataset.batch(4, seed=0, step=0)
    run = AdapterRun(tiny_transformer(tiny_config(family)), dataset, plan=replace(plan, learning_rate=1e-3))
    losses = [run.learn(tokens, mask) for _ in range(8)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("exit_layer", [0, 4, -1])
def test_exit_layer_outside_the_model_is_refused(exit_layer, finish, plan, tmp_path):
    with pytest.raises(AdapterError, match=rf"exit_layer must be in 1\.\.3, got {exit_layer}"):
        finish(replace(plan, exit_layer=exit_layer), tmp_path)


def test_sequence_beyond_the_context_is_refused(finish, plan, tmp_path):
    with pytest.raises(SettingsError, match="sequence_length must be at most 256, the model's context, got 257"):
        finish(replace(plan, sequence_length=257), tmp_path)


def test_tokens_the_model_does_not_know_are_refused(finish, plan, dataset, tmp_path, monkeypatch):
    dataset.train._tokens[3] = 258
    with pytest.raises(DataError, match="the tokenizer makes id 258, the model knows 258"):
        finish(plan, tmp_path)


def test_a_diverged_run_stops_with_advice(finish, plan, tmp_path, monkeypatch):
    monkeypatch.setattr(AdapterRun, "learn", lambda *_: float("nan"))
    with pytest.raises(SettingsError, match="the loss is nan at step 1; start again with a learning_rate below"):
        finish(plan, tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_steps", 0), ("batch_size", 0), ("learning_rate", 0.0), ("learning_rate", float("nan")), ("seed", -1),
     ("adapter_kind", "mamba"), ("initialization", "zeros"), ("precision", "auto"), ("dtype", "int8"),
     ("evaluate_every", 0)],
)  # fmt: skip
def test_plans_outside_their_range_are_refused(field, value):
    with pytest.raises(SettingsError, match=f"{field} must be .*got {value}"):
        AdapterPlan(**{field: value})


def test_learning_rate_warms_up_then_falls_to_zero():
    plan = AdapterPlan(num_steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [plan.learning_rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 1e-3


def test_precision_auto_becomes_a_definite_one():
    assert resolve_precision("auto", torch.device("cpu")) in ("float32", "bfloat16")
    assert resolve_precision("float32", torch.device("cpu")) == "float32"
    with pytest.raises(SettingsError, match="precision must be one of auto, float32, bfloat16, got fp8"):
        resolve_precision("fp8", torch.device("cpu"))


def test_precision_auto_is_float32_where_pytorch_cannot_tell(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert resolve_precision("auto", torch.device("cpu")) == "float32"


def test_the_norms_start_where_the_plan_says(target, dataset, plan):
    norms = {
        start: AdapterRun(target, dataset, plan=replace(plan, initialization=start)).tensors["input_norm"]
        for start in ("target", "ones")
    }
    assert torch.equal(norms["target"], target.layers[plan.exit_layer].input_norm)
    assert torch.equal(norms["ones"], torch.ones_like(norms["ones"]))


def test_draft_cost_counts_the_parameters_read_per_token(target):
    qkv, output, mlp, norms = (4 + 2 * 2) * 8 * 32, 32 * 32, 3 * 48 * 32, 2 * 32
    layer, head = qkv + output + mlp + norms, 258 * 32
    attention = 3 * 32 * 32 + 32 * 32
    own = {"attention": attention + 2 * 32, "mlp": mlp + 2 * 32, "layer": attention + mlp + 3 * 32,
           "head": attention + 2 * 32}  # fmt: skip
    for exit_layer, kind in product((1, 3), KINDS):
        cost = draft_cost(target, Adapter.initialize(target, exit_layer, kind=kind))
        assert cost == pytest.approx((exit_layer * layer + own[kind] + head) / (4 * layer + head))


def test_the_recommended_settings_are_those_of_the_draft_cost(finish, target, plan, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(Positions, "recommend", lambda _, cost: asked.append(cost) or (3, 0.25))
    finish(plan, tmp_path)
    adapter = Adapter.load(tmp_path, target)
    assert (adapter.config.gamma, adapter.config.eta) == (3, 0.25)
    assert asked == [draft_cost(target, adapter)]


def test_evaluation_does_not_depend_on_the_batch_size(target, dataset, plan):
    run = AdapterRun(target, dataset, plan=plan)
    first = run.evaluate()
    run.plan = replace(plan, batch_size=3)
    assert_close(first.loss, run.evaluate().loss, rtol=1e-5, atol=1e-5)
