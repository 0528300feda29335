"""Kernel backends: `reference` is plain PyTorch and defines the truth, `cpu` is native and row-invariant.

Which one a model gets is decided when it is loaded. KANGAROO_KERNELS=reference forces the former; the name of an
instruction set (baseline, avx2, avx512, neon) forces the native kernels compiled for it. KANGAROO_NUM_THREADS sizes the
native kernels' threads, PyTorch's own setting unless given.
"""

import os
from pathlib import Path

from kangaroo.errors import SettingsError

REFERENCE, NATIVE = "reference", "native"
# Chosen without being asked for: those whose tests have run on such a machine.
TESTED = ("baseline", "avx2", "avx512")


def select_backend(device: str) -> str:
    """The backend for models on this kind of device (cpu, cuda), made ready: "native" or "reference".

    Raises SettingsError where the environment asks for what is not there.
    """
    wanted = os.environ.get("KANGAROO_KERNELS", "")
    if device != "cpu" or wanted == REFERENCE:
        return REFERENCE
    try:
        from kangaroo.kernels import cpu
    except ImportError as error:
        if wanted:
            raise SettingsError(f"KANGAROO_KERNELS={wanted}: the native kernels are not built ({error}); "
                                "install the package again with a C++ compiler at hand") from error  # fmt: skip
        return REFERENCE
    available = cpu.instruction_sets()
    if not wanted and available[-1] not in TESTED:
        return REFERENCE
    if wanted and wanted not in available:
        allowed = ", ".join((REFERENCE, *available))
        raise SettingsError(f"KANGAROO_KERNELS must be one of {allowed} on this machine, got {wanted}")
    cpu.select(wanted or available[-1], num_threads=_num_threads())
    return NATIVE


def describe_backend(device: str) -> str:
    """The backend for this kind of device in words, with its instruction set and threads."""
    if select_backend(device) == REFERENCE:
        return REFERENCE
    from kangaroo.kernels import cpu

    return f"native ({cpu.selected()}, {cpu.num_threads()} threads)"


def read_processor() -> dict[str, str]:
    """What /proc/cpuinfo says of the first processor, by field; {} where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def _num_threads() -> int | None:
    """KANGAROO_NUM_THREADS, or None for PyTorch's setting."""
    text = os.environ.get("KANGAROO_NUM_THREADS", "")
    if not text:
        return None
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise SettingsError(f"KANGAROO_NUM_THREADS must be in 1..1024, got {text}")
    return int(text)
