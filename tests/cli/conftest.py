"""A tiny model folder, and the command line run in this process."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from kangaroo.cli import main
from kangaroo.drafters.adapter import Adapter
from kangaroo.drafters.medusa_heads import MedusaHeads
from kangaroo.model.weights import save_checkpoint
from tests.tiny import save_tiny_tokenizer, tiny_raw_config, tiny_transformer
from tests.tiny import tiny_config as make_config


class Ran(NamedTuple):
    status: object
    out: str
    err: str


Run = Callable[..., Ran]
MakeModel = Callable[..., Path]


def build_model(folder: Path, *, seed: int = 0, adapter_seed: int | None = None, layers: int = 4) -> Path:
    """A checkpoint folder; with an adapter at exit layer 1 beside it for the model of adapter_seed, if given."""
    overrides = {"num_hidden_layers": layers}
    model = tiny_transformer(make_config(**overrides), seed)
    save_checkpoint(model, folder, raw_config=tiny_raw_config(**overrides), dtype=torch.float32)
    save_tiny_tokenizer(folder)
    if adapter_seed is not None:
        (folder / "adapter").mkdir()
        Adapter.initialize(tiny_transformer(make_config(**overrides), adapter_seed), 1).save(folder / "adapter")
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its adapter and Medusa heads; read only."""
    folder = build_model(tmp_path_factory.mktemp("model"), adapter_seed=0)
    (folder / "medusa").mkdir()
    MedusaHeads.initialize(tiny_transformer(make_config()), 2).save(folder / "medusa")
    return folder


@pytest.fixture(scope="session")
def bare_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model alone; read only."""
    return build_model(tmp_path_factory.mktemp("bare"))


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """A tiny model to damage."""
    return lambda **settings: build_model(tmp_path / "damaged", **settings)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process."""

    def run_main(*argv: object) -> Ran:
        words: Sequence[str] = [str(word) for word in argv]
        with pytest.raises(SystemExit) as exit_info:
            main(words)
        return Ran(exit_info.value.code, *capsys.readouterr())

    return run_main
