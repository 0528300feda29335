"""Training checkpoints: one safetensors file that holds weights, optimiser moments and progress.

One file replaced in one step, so a kill at any moment leaves either the old checkpoint or the new one.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kangaroo.errors import OutputError, ResumeError

STATE_FILE = "checkpoint/state.safetensors"


def prepare_output(output: Path, *, resume: bool, results: Iterable[str]) -> None:
    """Make the output folder and prove it writable before any work is done.

    results: the files a finished run leaves. Raises OutputError where the folder cannot be written or already
    holds a run that is not being resumed, ResumeError where there is nothing to resume.
    """
    if resume and not (output / STATE_FILE).exists():
        raise ResumeError(f"{output} holds no {STATE_FILE} to resume from; leave out --resume to start there")
    try:
        for name in () if resume else (STATE_FILE, *results):
            if (output / name).exists():
                raise OutputError(f"{output} already holds {name}; continue with --resume or give another folder")
        (output / STATE_FILE).parent.mkdir(parents=True, exist_ok=True)
        for folder in (output, (output / STATE_FILE).parent):
            with tempfile.TemporaryFile(dir=folder):
                pass
    except OSError as error:
        raise OutputError(f"cannot write to {output}: {error.strerror or error}; give another --output") from error


def save_state(output: Path, tensors: Mapping[str, Tensor], *, progress: Mapping[str, Any]) -> None:
    """Replace the checkpoint of output by tensors and progress (JSON); raises OutputError where that fails."""
    path = output / STATE_FILE
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(progress)
    metadata = {"progress": text, "digest": _digest(stored, text)}
    unfinished = path.with_suffix(".tmp")
    try:
        save_file(stored, unfinished, metadata=metadata)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write the checkpoint {path}: {error}") from error


def load_state(output: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and progress that save_state wrote; raises ResumeError where they are damaged."""
    path = output / STATE_FILE
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        progress = json.loads(metadata["progress"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ResumeError(f"{path} is damaged: {error}; {_ADVICE}") from error
    if not isinstance(progress, dict) or metadata.get("digest") != _digest(tensors, metadata["progress"]):
        raise ResumeError(f"{path} is damaged: its content does not match its checksum; {_ADVICE}")
    return tensors, progress


def check_same(kind: str, before: Mapping[str, Any], *, now: Mapping[str, Any]) -> None:
    """Raise ResumeError naming the first field that differs between the checkpoint's run and this one."""
    for name, value in now.items():
        if before.get(name) != value:
            raise ResumeError(f"the checkpoint's {kind} differs: {name} was {before.get(name)}, now {value}; "
                              "resume with the same settings or start in another folder")  # fmt: skip


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Tensor]:
    """The optimiser's state as named tensors; names maps the id of a parameter to its name."""
    return {
        f"optimizer.{names[id(parameter)]}.{key}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str], *, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what optimizer_tensors() returned; step counters (no dimensions) stay on the host."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            prefix = f"optimizer.{names[id(parameter)]}."
            optimizer.state[parameter] = {
                name.removeprefix(prefix): tensor.to(parameter.device) if tensor.ndim else tensor.clone()
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }


_ADVICE = "start again in another folder"


def _digest(tensors: Mapping[str, Tensor], progress: str) -> str:
    content = hashlib.sha256(progress.encode())
    for name in sorted(tensors):
        content.update(name.encode())
        content.update(tensors[name].numpy().tobytes())
    return content.hexdigest()
