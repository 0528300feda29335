"""A search on disk is resumed as it began, and never written over."""

from pathlib import Path

import pytest

from kangaroo.errors import OutputError, ResumeError, SettingsError
from kangaroo.search.study import STUDY_FILE, open_study

from .test_layers import make_plan


def test_a_folder_with_results_is_refused_unless_it_is_resumed(tmp_path: Path) -> None:
    open_study(tmp_path / "new", make_plan(), resume=False)
    with pytest.raises(OutputError, match=r"already holds search.sqlite; continue with --resume"):
        open_study(tmp_path / "new", make_plan(), resume=False)
    (tmp_path / "skip_layers.json").write_text("mine")
    with pytest.raises(OutputError, match=r"already holds skip_layers.json"):
        open_study(tmp_path, make_plan(), resume=False)
    assert (tmp_path / "skip_layers.json").read_text() == "mine"
    assert not (tmp_path / STUDY_FILE).exists()


def test_nothing_to_resume_is_said(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match=r"holds no search.sqlite to resume from"):
        open_study(tmp_path / "missing", make_plan(), resume=True)
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize("changes", [{"sampler": "gp"}, {"fingerprint": "other"}, {"gamma": 5}, {"seed": 1}])
def test_another_search_is_not_resumed(tmp_path: Path, changes: dict[str, object]) -> None:
    open_study(tmp_path, make_plan(), resume=False)
    (name,) = changes
    with pytest.raises(ResumeError, match=f"searched with {name} .*, got {changes[name]}"):
        open_study(tmp_path, make_plan(**changes), resume=True)  # type: ignore[arg-type]


def test_a_damaged_study_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / STUDY_FILE).write_bytes(b"no database" * 200)
    with pytest.raises(ResumeError, match="is no study that can be read") as info:
        open_study(tmp_path, make_plan(), resume=True)
    assert "\n" not in str(info.value)
    assert (tmp_path / STUDY_FILE).read_bytes() == b"no database" * 200


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write to"):
        open_study(tmp_path / "file" / "folder", make_plan(), resume=False)


def test_plans_outside_their_range_are_refused() -> None:
    with pytest.raises(SettingsError, match="gamma must be at least 1, got 0"):
        make_plan(gamma=0)
    with pytest.raises(SettingsError, match="max_new_tokens must be at least 2, got 1"):
        make_plan(max_new_tokens=1)
