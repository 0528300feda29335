"""Tiny models run fastest on one thread, whatever else the machine is doing."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def no_user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing reads what the user tuned, fixtures that outlive a test included."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KANGAROO_CACHE", str(tmp_path_factory.mktemp("no-cache")))
        yield


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for every test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("KANGAROO_CACHE", str(folder))
    return folder
