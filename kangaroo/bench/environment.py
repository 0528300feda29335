"""What a measurement or a bug report depends on: versions, processor, devices, kernels."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from kangaroo import __version__
from kangaroo.kernels import describe_backend, read_processor

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors")
# The flags that decide which kernels a CPU can run, x86 and Arm.
INSTRUCTION_SETS = (
    *("avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"),
    *("avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "bf16", "i8mm", "sve", "sve2"),
)


def environment(device: str = "cpu") -> dict[str, object]:
    """The facts by name: text, counts and lists of text; None for what is not installed or not known.

    device: cpu or cuda, whose kernels are named.
    """
    cpu = read_processor()
    flags = set(cpu.get("flags", cpu.get("Features", "")).split())
    versions = {name: _version(name) for name in PACKAGES}
    return {
        "kangaroo": __version__,
        "commit": _commit(Path(__file__).parents[1]),
        "python": platform.python_version(),
        **versions,
        "platform": platform.platform(),
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_flags": [name for name in INSTRUCTION_SETS if name in flags],
        "threads": torch.get_num_threads(),
        "cuda_devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "kernel_backend": describe_backend(device),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit(package: Path) -> str | None:
    """Short hash of the checkout this package belongs to, marked where the package has uncommitted changes.

    None outside one: a package installed in a virtual environment may lie inside some other repository.
    """
    questions = (["ls-files", "--full-name", "__init__.py"], ["rev-parse", "--short", "HEAD"],
                 ["status", "--porcelain", "."])  # fmt: skip
    try:
        tracked, head, changes = (
            subprocess.run(["git", "-C", package, *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in questions
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    if tracked != "kangaroo/__init__.py":
        return None
    return head + ("+changes" if changes else "")
