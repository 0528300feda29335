"""What `kangaroo tune` found to serve an adapter best on a machine: kept in the user's cache, and used unless told not.

The file is tuning.json in the folder KANGAROO_CACHE, else in the folder kangaroo of XDG_CACHE_HOME or ~/.cache.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kangaroo.drafters.settings import KangarooSettings
from kangaroo.errors import OutputError
from kangaroo.kernels import REFERENCE, describe_backend, read_processor

if TYPE_CHECKING:
    from kangaroo.model.checkpoint import LoadedModel
    from kangaroo.model.transformer import Transformer

Key = dict[str, str | int]


class Tuned(BaseModel):
    """The settings that served a batch size best; predicted and measured: their speedup over plain decoding."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch_size: Annotated[int, Field(ge=1)]
    gamma: Annotated[int, Field(ge=1)]
    eta: Annotated[float, Field(ge=0, le=1)]
    num_siblings: Annotated[int, Field(ge=1)]
    max_nodes: Annotated[int, Field(ge=2, le=64)]
    predicted: float
    measured: float


class _Entry(BaseModel):
    key: Key
    tuned: Annotated[list[Tuned], Field(min_length=1)]
    stamp: dict[str, Any]


class _Content(BaseModel):
    version: Literal[1] = 1
    entries: list[_Entry] = []


def tuning_file() -> Path:
    """Where the file is, or would be."""
    if named := os.environ.get("KANGAROO_CACHE"):
        return Path(named).expanduser() / "tuning.json"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kangaroo" / "tuning.json"


def tuning_key(target: Transformer, adapter: Path) -> Key:
    """What settings were tuned for: the adapter's weights, and what its steps run on.

    Raises OSError where the adapter cannot be read.
    """
    import torch

    with (adapter / "adapter.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    device, is_native = target.device, target.backend != REFERENCE
    on_gpu = device.type == "cuda"
    return {
        "adapter": digest[:16],
        "processor": torch.cuda.get_device_name(device) if on_gpu else read_processor().get("model name", "unknown"),
        "kernels": describe_backend(device.type) if is_native else REFERENCE,
        "threads": torch.get_num_threads(),
        "dtype": target.storage,
    }


def read_tuned(key: Key, *, batch_size: int = 1) -> Tuned | None:
    """What was found for this key at the largest batch size up to this one; None for nothing.

    What serves a larger batch says nothing of a smaller one, where other drafts pay. A file that cannot be read counts
    as none, which is logged as a warning.
    """
    every = [tuned for entry in _read().entries if entry.key == key for tuned in entry.tuned]
    fitting = [one for one in every if one.batch_size <= batch_size]
    return max(fitting, key=lambda one: one.batch_size, default=None)


def write_tuned(key: Key, tuned: Sequence[Tuned], *, stamp: dict[str, Any]) -> Path:
    """Put this in the place of what the file holds for the key at the same batch sizes; others stay as they are.

    stamp: of the run that found it. Raises OutputError where the file cannot be written.
    """
    path, sizes = tuning_file(), {one.batch_size for one in tuned}
    entries = [_Entry(key=key, tuned=list(tuned), stamp=stamp)]
    for old in _read().entries:
        kept = [one for one in old.tuned if old.key != key or one.batch_size not in sizes]
        if kept:
            entries.append(_Entry(key=old.key, tuned=kept, stamp=old.stamp))
    content = _Content(entries=entries)
    try:
        make_folder()
        fresh = path.with_suffix(f".{os.getpid()}")
        fresh.write_text(content.model_dump_json(indent=1) + "\n", encoding="utf-8")
        fresh.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    return path


def make_folder() -> None:
    """Make the cache folder where there is none; raises OutputError where it cannot be written to."""
    folder = tuning_file().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise _unwritable(folder, error) from error


def count_tuned() -> int:
    """How many keys the file holds for this processor."""
    processor = read_processor().get("model name", "unknown")
    found = [one.key for one in _read().entries if one.key.get("processor") == processor]
    return sum(key not in found[:index] for index, key in enumerate(found))


def apply_tuning(settings: KangarooSettings, model: LoadedModel, *, batch_size: int = 1) -> KangarooSettings:
    """The settings as they were tuned for their adapter on this machine, if they were, and leave all of that open.

    What was tuned belongs together: one that is given by the user leaves the others to the adapter's recommendation.
    """
    names = ("gamma", "eta", "num_siblings", "max_nodes")
    if any(getattr(settings, name) is not None for name in names) or not tuning_file().exists():
        return settings
    try:
        key = tuning_key(model.target, Path(settings.adapter or model.adapter_folder).expanduser())
    except OSError:
        # Whoever builds the drafter says what is wrong with the adapter.
        return settings
    tuned = read_tuned(key, batch_size=batch_size)
    if tuned is None:
        return settings
    return replace(settings, **{name: getattr(tuned, name) for name in names})


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(f"cannot write {path}: {error.strerror or error}; "
                       "set KANGAROO_CACHE to a folder that can be written")  # fmt: skip


def _read() -> _Content:
    path = tuning_file()
    try:
        return _Content.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return _Content()
    except (OSError, ValidationError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
        logging.getLogger(__name__).warning(
            "%s is ignored, as it cannot be read (%s); run `kangaroo tune` again", path, reason
        )
        return _Content()
