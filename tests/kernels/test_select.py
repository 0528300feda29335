"""Which kernels a model gets, by the environment and by what is built."""

import os
import sys
from collections.abc import Iterator

import pytest
import torch

from kangaroo import kernels
from kangaroo.errors import SettingsError
from kangaroo.kernels import NATIVE, REFERENCE, TESTED, cpu, describe_backend, select_backend


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = cpu.selected(), cpu.num_threads()
    for name in ("KANGAROO_KERNELS", "KANGAROO_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    yield
    cpu.select(before[0], num_threads=before[1])


BY_DEFAULT = NATIVE if cpu.instruction_sets()[-1] in TESTED else REFERENCE


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the extension had never been built."""
    for name in ("cpu", "_native"):
        monkeypatch.delitem(sys.modules, f"kangaroo.kernels.{name}", raising=False)
        monkeypatch.delattr(kernels, name, raising=False)
    monkeypatch.setitem(sys.modules, "kangaroo.kernels._native", None)


def test_fastest_native_kernels_on_torchs_threads_unless_told_otherwise() -> None:
    assert select_backend("cpu") == BY_DEFAULT
    if BY_DEFAULT == REFERENCE:
        pytest.skip("no instruction set of this machine is tested yet")
    assert cpu.selected() == cpu.instruction_sets()[-1]
    assert cpu.num_threads() == torch.get_num_threads()
    assert describe_backend("cpu") == f"native ({cpu.selected()}, {cpu.num_threads()} threads)"


def test_other_devices_get_the_reference_kernels() -> None:
    assert select_backend("cuda") == describe_backend("cuda") == REFERENCE


def test_reference_kernels_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KANGAROO_KERNELS", "reference")
    assert select_backend("cpu") == describe_backend("cpu") == REFERENCE


@pytest.mark.parametrize("name", cpu.instruction_sets())
def test_an_instruction_set_on_demand(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KANGAROO_KERNELS", name)
    assert select_backend("cpu") == NATIVE
    assert cpu.selected() == name
    monkeypatch.delenv("KANGAROO_KERNELS")
    if select_backend("cpu") == NATIVE:
        assert cpu.selected() == cpu.instruction_sets()[-1]


@pytest.mark.parametrize("name", ["nonsense", "AVX2", "native", "avx2 "])
def test_unknown_kernels_are_refused_with_what_is_allowed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KANGAROO_KERNELS", name)
    allowed = ", ".join(("reference", *cpu.instruction_sets()))
    with pytest.raises(SettingsError, match=f"KANGAROO_KERNELS must be one of {allowed} on this machine, got {name}"):
        select_backend("cpu")


@pytest.mark.parametrize("count", [1, 2, 5])
def test_number_of_threads_on_demand(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KANGAROO_NUM_THREADS", str(count))
    select_backend("cpu")
    assert cpu.num_threads() == count
    weight = cpu.pack(torch.ones(3, 2), storage="float32")
    assert cpu.linear(torch.ones(1, 2), weight).tolist() == [[2.0, 2.0, 2.0]]


@pytest.mark.parametrize("text", ["0", "-1", "1025", "two", "1.5", " 2", "\u00b2"])
def test_other_numbers_of_threads_are_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KANGAROO_NUM_THREADS", text)
    with pytest.raises(SettingsError, match=f"KANGAROO_NUM_THREADS must be in 1..1024, got {text}"):
        select_backend("cpu")


@pytest.mark.usefixtures("without_native")
def test_reference_kernels_where_the_native_ones_are_not_built() -> None:
    assert select_backend("cpu") == describe_backend("cpu") == REFERENCE


@pytest.mark.usefixtures("without_native")
@pytest.mark.parametrize("name", ["avx2", "baseline"])
def test_asking_for_kernels_that_are_not_built_says_what_to_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KANGAROO_KERNELS", name)
    with pytest.raises(SettingsError, match=f"KANGAROO_KERNELS={name}: the native kernels are not built .* compiler"):
        select_backend("cpu")
    monkeypatch.setenv("KANGAROO_KERNELS", "reference")
    assert select_backend("cpu") == REFERENCE


def test_native_kernels_are_there_again_after_the_tests_above() -> None:
    assert "KANGAROO_KERNELS" not in os.environ
    assert select_backend("cpu") == BY_DEFAULT
