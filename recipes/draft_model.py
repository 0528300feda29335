"""Distil a small draft model from a target: some of its layers, trained on the target's own distributions.

Embedding, head and norms stay the target's; only the matrices of the layers are trained::

    python recipes/draft_model.py --model build/demo/model --data build/demo/own.jsonl --output build/demo/draft_model

Shapes: B windows, T positions, D hidden size, V vocabulary.
"""

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kangaroo.model.checkpoint import load_model
from kangaroo.model.transformer import FullSequencePass, Transformer
from kangaroo.model.weights import DTYPES, save_checkpoint
from kangaroo.train.checkpoint import prepare_output
from kangaroo.train.data import Dataset, read_corpus
from kangaroo.train.metrics import Positions
from kangaroo.train.plan import TrainingPlan, resolve_precision
from kangaroo.train.run import REPORT_FILE, TrainingRun, autocast, check_dataset, check_plan, train

MATRICES = ("qkv", "output", "gate_up", "down")


def thin_out(target: Transformer, layer_ids: list[int]) -> Transformer:
    """A copy of the target with only these layers, its matrices in float32."""
    layers = []
    for layer_id in layer_ids:
        layer = target.layers[layer_id]
        layers.append(replace(layer, **{name: getattr(layer, name).float().clone() for name in MATRICES}))
    config = replace(target.config, num_layers=len(layers))
    return Transformer(config, layers, embedding=target.embedding, final_norm=target.final_norm, head=target.head)


class DraftModelRun(TrainingRun[TrainingPlan]):
    """The state of one training run of a draft model."""

    noun = "draft_model"

    def __init__(self, target: Transformer, dataset: Dataset, *, plan: TrainingPlan, layer_ids: list[int]) -> None:
        self.student, self.layer_ids = thin_out(target, layer_ids), layer_ids
        tensors = {f"{index}.{name}": getattr(layer, name) for index, layer in enumerate(self.student.layers)
                   for name in MATRICES}  # fmt: skip
        super().__init__(target, dataset, plan=plan, tensors=tensors)
        self.facts["layers"] = layer_ids

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Muon, whose steps suit matrices of any scale."""
        groups: list[dict[str, Any]] = [{"params": list(self.tensors.values()), "scale": 1.0}]
        return torch.optim.Muon(groups, lr=self.plan.learning_rate, weight_decay=self.plan.weight_decay, momentum=0.95)

    def learn(self, tokens: Tensor, mask: Tensor) -> float:
        """One optimiser step on windows [B, T + 1] with the mask [B, T] of predicted tokens; returns the loss."""
        with self.training_precision():
            with torch.no_grad():
                labels = torch.softmax(logits_of(self.target, tokens), dim=-1)[mask]
            logits = logits_of(self.student, tokens)[mask]
        loss = torch.nn.functional.cross_entropy(logits.float(), labels.float())
        loss.backward()
        self.descend()
        return float(loss.detach())

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """How well the draft model foresees the target's choices on held-out text, teacher-forced."""
        parts = []
        for tokens, mask in self.held_out_batches():
            with autocast(self.target.device, DTYPES[self.plan.precision]):
                draft, target = logits_of(self.student, tokens).float(), logits_of(self.target, tokens).float()
            parts.append(Positions.compare(draft, target, mask=mask))
        return Positions.join(parts, shape=(-1, self.plan.sequence_length)).summary()

    def save_result(self, output: Path) -> dict[str, Any]:
        """Write the draft model as a checkpoint of its own, with the target's tokenizer."""
        source = Path(self.plan.model)
        raw = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": len(self.layer_ids)}
        save_checkpoint(self.student, output, raw_config=raw, dtype=DTYPES[self.plan.dtype])
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copy(source / name, output / name)
        return {"layers": self.layer_ids}


def logits_of(model: Transformer, tokens: Tensor) -> Tensor:
    """Logits [B, T, V] of windows [B, T + 1]; small vocabularies only."""
    attention = FullSequencePass(model.config, tokens.shape[1] - 1, device=tokens.device)
    hidden, _ = model.forward(model.embed(tokens[:, :-1]), (0, model.num_layers), attention=attention)
    return model.logits(hidden)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the target")
    parser.add_argument("--data", type=Path, required=True, help="text of the target's own (continuations.py)")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--layers", type=int, nargs="+", help="the target's layers to begin with; its first and last unless given"
    )
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    model = load_model(args.model, backend="reference")
    plan = TrainingPlan(
        model=args.model, num_steps=args.steps, batch_size=args.batch_size, sequence_length=args.sequence_length,
        learning_rate=args.learning_rate, precision=resolve_precision("auto", torch.device("cpu")), dtype="bfloat16",
    )  # fmt: skip
    corpus = read_corpus([args.data], model.tokenizer, eos_id=min(model.eos_ids, default=None))
    dataset = Dataset(corpus, sequence_length=plan.sequence_length)
    check_plan(plan, model.target)
    check_dataset(dataset, model.target)
    prepare_output(args.output, resume=args.resume, results=("config.json", "model.safetensors", REPORT_FILE))
    layer_ids = args.layers or [0, model.target.num_layers - 1]
    run = DraftModelRun(model.target, dataset, plan=plan, layer_ids=layer_ids)
    for progress in train(run, args.output, resume=args.resume):
        if progress.metrics is not None or progress.step % 20 == 0:
            facts = f"loss {progress.loss:.3f} {progress.tokens_per_s:.0f} tokens/s"
            print(f"step {progress.step} {facts}", progress.metrics or "", flush=True)


if __name__ == "__main__":
    main()
