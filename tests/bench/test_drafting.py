"""What is told of a drafter: settings in full, and companions by what they hold."""

from pathlib import Path

import pytest

from kangaroo.bench.drafting import DIGEST_BYTES, describe_drafter, digest_files
from kangaroo.drafters.settings import AutoSettings, DraftModelSettings, KangarooSettings, PlainSettings
from kangaroo.model.checkpoint import LoadedModel, load_model
from tests.cli.conftest import build_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(build_model(tmp_path_factory.mktemp("model"), adapter_seed=0)))


def test_what_is_left_open_is_told_as_it_is_drafted_by(model: LoadedModel) -> None:
    assert describe_drafter(model, PlainSettings()) == {}
    assert describe_drafter(model, KangarooSettings(eta=0.5)) == {
        "adapter": f"adapter ({digest_files(model.adapter_folder)})", "exit_layer": None, "gamma": 6, "eta": 0.5,
        "num_siblings": 1, "max_nodes": 64,
    }  # fmt: skip
    # A hub id is no path.
    assert describe_drafter(model, DraftModelSettings(model="someone/small"))["model"] == "someone/small"


def test_sources_of_auto_are_told_with_their_settings(model: LoadedModel) -> None:
    for sources in ((), ("prompt_lookup", "kangaroo")):
        told = describe_drafter(model, AutoSettings(sources))["sources"]
        assert isinstance(told, dict)
        assert list(told) == ["prompt_lookup", "kangaroo"]
        assert told["kangaroo"] == describe_drafter(model, KangarooSettings())


def test_what_auto_gives_to_its_sources_is_told_with_them(model: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    settings = AutoSettings(("retrieval", "prompt_lookup"), datastore=str(tmp_path / "store"))
    told = describe_drafter(model, settings)["sources"]
    assert isinstance(told, dict)
    assert told["retrieval"]["datastore"] == f"store ({digest_files(tmp_path / 'store')})"


def test_a_digest_is_of_names_sizes_and_beginnings(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    file = tmp_path / "a"
    found = []
    for content in (b"", b"x", b"y", b"x" * DIGEST_BYTES, b"x" * DIGEST_BYTES + b"y"):
        for one in (file, tmp_path / "b", tmp_path / "folder" / "a"):
            one.write_bytes(content)
        assert digest_files(file) == digest_files(tmp_path / "b")
        found += [digest_files(file), digest_files(tmp_path / "folder")]
        (tmp_path / "folder" / "a").rename(tmp_path / "folder" / "b")
        found.append(digest_files(tmp_path / "folder"))
        (tmp_path / "folder" / "b").unlink()
    assert len(set(found)) == len(found) == 15
