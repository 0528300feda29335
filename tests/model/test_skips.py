"""Skip lists: kept in the format of Draft & Verify's repository, and refused in one line where they fit no model."""

import json
from pathlib import Path

import pytest

from kangaroo.errors import OutputError, SkipLayersError
from kangaroo.model.skips import SkippedSublayers, read_skip_layers, write_skip_layers

SKIPS = SkippedSublayers(attention=frozenset({3, 10, 1}), mlp=frozenset({2}))


def test_lists_of_several_models_are_read_back_by_name(tmp_path: Path) -> None:
    path, other = tmp_path / "skip_layers.json", SkippedSublayers(mlp=frozenset({0}))
    write_skip_layers(path, {"one": SKIPS, "two": other})
    assert json.loads(path.read_text())["one"] == {"attention": [1, 3, 10], "mlp": [2]}
    assert read_skip_layers(path, ("one",)) == SKIPS
    assert read_skip_layers(path, ("org/two", "two")) == other


def test_the_only_list_of_a_file_serves_a_model_of_any_name(tmp_path: Path) -> None:
    path = tmp_path / "skips.json"
    write_skip_layers(path, {"one": SKIPS})
    assert read_skip_layers(path, ("renamed",)) == SKIPS


def test_lists_of_other_models_are_named_in_the_refusal(tmp_path: Path) -> None:
    path = tmp_path / "skips.json"
    write_skip_layers(path, {"one": SKIPS, "two": SKIPS})
    with pytest.raises(SkipLayersError, match="has skip lists for one, two, none for three"):
        read_skip_layers(path, ("three",))


@pytest.mark.parametrize(
    "content",
    ["", "[", "[]", "{}", '{"m": []}', '{"m": {"attention": [1]}}', '{"m": {"attention": [1], "mlp": ["2"]}}',
     '{"m": {"attention": [true], "mlp": []}}', '{"m": {"attention": 1, "mlp": []}}'],
)  # fmt: skip
def test_malformed_files_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "skips.json"
    path.write_text(content)
    with pytest.raises(SkipLayersError, match=r"skips\.json"):
        read_skip_layers(path, ("m",))


def test_files_that_cannot_be_read_or_written_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SkipLayersError, match="kangaroo search layers"):
        read_skip_layers(tmp_path / "missing.json", ("m",))
    with pytest.raises(OutputError, match="cannot write"):
        write_skip_layers(tmp_path / "missing" / "skips.json", {"m": SKIPS})


@pytest.mark.parametrize("layer", [-1, 4, 99])
def test_unknown_layers_are_refused(layer: int) -> None:
    for skips in (SkippedSublayers(frozenset({layer})), SkippedSublayers(mlp=frozenset({0, layer}))):
        with pytest.raises(SkipLayersError, match=rf"here: layers must be in 0\.\.3, got {layer}"):
            skips.check(4, where="here")


def test_skipping_everything_is_refused_and_all_but_one_sublayer_is_not() -> None:
    every = frozenset(range(4))
    SkippedSublayers(every, every - {2}).check(4, where="here")
    with pytest.raises(SkipLayersError, match="here: skips all 8 sublayers"):
        SkippedSublayers(every, every).check(4, where="here")
