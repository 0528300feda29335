"""Train the demo target from scratch on the corpus that corpus.py made.

The schedule follows the clock, not the step count, so that the recipe fits the time there is: a constant
learning rate, then a linear decay to zero; the last stretch runs on the full context length. A run that
finds a state in its output folder continues from it.

    python recipes/pretrain.py --corpus build/demo/corpus --output build/demo/target --minutes 70
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors import safe_open
from safetensors.torch import save_file
from target import CONTEXT, Plan, build_model, loss_of
from torch import Tensor

from kangaroo.model.transformer import Transformer

TRAIN_LENGTH = 1024
LONG_SHARE = 0.08
DECAY_SHARE = 0.5
WARMUP_STEPS = 40
LOG_EVERY = 20
SAVE_EVERY_S = 240


@dataclass
class Progress:
    """How far a run has come; kept beside its weights."""

    elapsed_s: float = 0.0
    step: int = 0
    num_tokens: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    done: bool = False


def draw_batch(stream: np.ndarray, num_sequences: int, *, length: int, seed: tuple[int, ...]) -> Tensor:
    """Random windows [num_sequences, length + 1] of the token stream; the same seed draws the same batch."""
    starts = np.random.default_rng(seed).integers(0, len(stream) - length - 1, num_sequences)
    return torch.from_numpy(np.stack([stream[s : s + length + 1].astype(np.int64) for s in starts]))


def learning_rate_scale(share: float, step: int) -> float:
    """Warm-up over the first steps, constant, then a linear decay over the last DECAY_SHARE of the time."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * min(1.0, max(0.0, (1 - share) / DECAY_SHARE))


def held_out_loss(model: Transformer, stream: np.ndarray, *, num_tokens: int) -> float:
    """Mean loss in nats per token over the first num_tokens of the held-out stream, in training-length windows."""
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, min(num_tokens, len(stream) - 1) - TRAIN_LENGTH, TRAIN_LENGTH):
            window = torch.from_numpy(stream[start : start + TRAIN_LENGTH + 1].astype(np.int64))[None]
            total += loss_of(model, window.to(model.device)).item()
            count += 1
    return total / max(count, 1)


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Average gradients over the processes in one exchange."""
    if not dist.is_initialized():
        return
    flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    offset = 0
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.copy_(flat[offset : offset + parameter.numel()].view_as(parameter))
            offset += parameter.numel()


def agreed_share(elapsed_s: float, plan: Plan) -> float:
    """The first process's share of the time used, so that all processes follow one schedule."""
    clock = torch.tensor([elapsed_s / (60 * plan.minutes)], dtype=torch.float64)
    if dist.is_initialized():
        dist.broadcast(clock, 0)
    return float(clock)


class Training:
    """One process's copy of a run: model, optimisers, data and progress; process 0 reports and saves."""

    def __init__(self, plan: Plan, rank: int) -> None:
        corpus = Path(plan.corpus)
        self.plan, self.rank, self.folder = plan, rank, Path(plan.output)
        self.bytes_per_token = json.loads((corpus / "corpus.json").read_text())["heldout_bytes_per_token"]
        self.stream = np.memmap(corpus / "train.bin", dtype="<u2", mode="r")
        self.held_out = np.fromfile(corpus / "heldout.bin", dtype="<u2")
        self.model = build_model(plan, len(json.loads((corpus / "tokenizer.json").read_text())["model"]["vocab"]))
        named = list(self.model.parameters())
        self.parameters = [p for _, p in named]
        matrices = [p for n, p in named if p.ndim == 2 and n != "embedding"]
        others = [p for n, p in named if p.ndim != 2 or n == "embedding"]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=plan.muon_lr, weight_decay=0.01, momentum=0.95),
            torch.optim.AdamW(others, lr=plan.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.progress = Progress()
        if (self.folder / "state.safetensors").exists():
            self._load()

    def run(self) -> None:
        """Train until the time is used up."""
        progress, running = self.progress, float("nan")
        last, saved_s = time.perf_counter(), progress.elapsed_s
        while (share := agreed_share(progress.elapsed_s, self.plan)) < 1:
            loss = self.step(share)
            running = loss if math.isnan(running) else 0.95 * running + 0.05 * loss
            now = time.perf_counter()
            progress.elapsed_s, last = progress.elapsed_s + now - last, now
            if self.rank == 0 and progress.step % LOG_EVERY == 0:
                print(f"step {progress.step} {share:.1%} tokens {progress.num_tokens / 1e6:.2f}M loss {running:.3f} "
                      f"{progress.num_tokens / progress.elapsed_s:.0f} tokens/s", flush=True)  # fmt: skip
            if self.rank == 0 and progress.elapsed_s - saved_s > SAVE_EVERY_S:
                saved_s = progress.elapsed_s
                self._evaluate_and_save(num_tokens=60_000)
        if self.rank == 0 and not progress.done:
            progress.done = True
            self._evaluate_and_save(num_tokens=400_000)
            print(f"done: {progress.step} steps, {progress.num_tokens} tokens", flush=True)

    def step(self, share: float) -> float:
        """One optimiser step at this share of the time; returns the loss of this process's batch."""
        plan, step = self.plan, self.progress.step
        length = CONTEXT if share > 1 - LONG_SHARE else TRAIN_LENGTH
        per_process = max(1, plan.batch_tokens // length // plan.num_processes)
        batch = draw_batch(self.stream, per_process, length=length, seed=(plan.seed, step, self.rank))
        loss = loss_of(self.model, batch.to(plan.device))
        loss.backward()
        average_gradients(self.parameters)
        scale = learning_rate_scale(share, step)
        for optimizer, rate in zip(self.optimizers, (plan.muon_lr, plan.adam_lr), strict=True):
            optimizer.param_groups[0]["lr"] = rate * scale
            optimizer.step()
            optimizer.zero_grad()
        self.progress.step += 1
        self.progress.num_tokens += per_process * length * plan.num_processes
        return loss.item()

    def _evaluate_and_save(self, *, num_tokens: int) -> None:
        progress = self.progress
        loss = held_out_loss(self.model, self.held_out, num_tokens=num_tokens) / self.bytes_per_token
        progress.history.append({"step": progress.step, "num_tokens": progress.num_tokens,
                                 "elapsed_s": progress.elapsed_s, "held_out_nats_per_byte": loss})  # fmt: skip
        print(f"  held out: {loss:.4f} nats per byte", flush=True)
        self._save()

    def _save(self) -> None:
        """Write weights, optimiser moments and progress; the previous state survives a kill half-way."""
        tensors = {name: tensor.detach() for name, tensor in self.model.parameters()}
        names = {id(tensor): name for name, tensor in self.model.parameters()}
        for optimizer in self.optimizers:
            for parameter, state in optimizer.state.items():
                for key, value in state.items():
                    tensors[f"optimizer.{names[id(parameter)]}.{key}"] = torch.as_tensor(value)
        progress = {**asdict(self.progress), "plan": asdict(self.plan)}
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, self.folder / "state.tmp",
                  metadata={"progress": json.dumps(progress)})  # fmt: skip
        (self.folder / "state.tmp").replace(self.folder / "state.safetensors")
        (self.folder / "progress.json").write_text(json.dumps(progress, indent=1))

    def _load(self) -> None:
        """Continue from what _save wrote."""
        with safe_open(self.folder / "state.safetensors", framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            kept = json.loads(file.metadata()["progress"])
        names = {id(tensor): name for name, tensor in self.model.parameters()}
        with torch.no_grad():
            for name, tensor in self.model.parameters():
                tensor.copy_(tensors[name])
        for optimizer in self.optimizers:
            for parameter in optimizer.param_groups[0]["params"]:
                prefix = f"optimizer.{names[id(parameter)]}."
                state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                optimizer.state[parameter] = {k: v.to(parameter.device) if v.ndim else v for k, v in state.items()}
        del kept["plan"]
        self.progress = Progress(**kept)
        # A finished run that is given more minutes goes on.
        self.progress.done = self.progress.done and self.progress.elapsed_s >= 60 * self.plan.minutes


def train(rank: int, plan: Plan) -> None:
    """One process of the training."""
    if plan.num_processes > 1:
        rendezvous = f"file://{Path(plan.output).resolve() / 'rendezvous'}"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=plan.num_processes)
        torch.set_num_threads(max(1, torch.get_num_threads() // plan.num_processes))
    Training(plan, rank).run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--corpus", required=True, help="folder written by corpus.py")
    parser.add_argument("--output", required=True, help="folder for the training state")
    parser.add_argument("--minutes", type=float, default=70.0)
    parser.add_argument("--num-processes", type=int, default=2)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--num-layers", type=int, default=20)
    parser.add_argument("--hidden-size", type=int, default=192)
    parser.add_argument("--intermediate-size", type=int, default=512)
    parser.add_argument("--num-heads", type=int, default=3)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.003)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    plan = Plan(**vars(parser.parse_args()))
    Path(plan.output).mkdir(parents=True, exist_ok=True)
    (Path(plan.output) / "rendezvous").unlink(missing_ok=True)
    # Process 0 is this one: where it is killed, its connections close, and the others end at their next exchange.
    for rank in range(1, plan.num_processes):
        mp.get_context("spawn").Process(target=train, args=(rank, plan), daemon=True).start()
    train(0, plan)


if __name__ == "__main__":
    main()
