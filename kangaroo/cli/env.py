"""`kangaroo env`: what a measurement or a bug report depends on."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from kangaroo import __version__
from kangaroo.cli.shared import JsonOption

env_app = typer.Typer()

# The flags that decide which kernels a CPU can run, x86 and Arm.
INSTRUCTION_SETS = ("avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni",
                    "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
                    "asimd", "asimddp", "bf16", "i8mm", "sve", "sve2")  # fmt: skip


@env_app.command()
def env(json_output: Annotated[bool, JsonOption] = False) -> None:
    """Print versions, processor, devices and the kernel backend."""
    facts = environment()
    if json_output:
        print(json.dumps(facts))
        return
    for name, value in facts.items():
        shown = ", ".join(value) if isinstance(value, list) else value
        print(f"{name}: {'none' if shown in (None, '') else shown}")


def environment() -> dict[str, object]:
    """The facts by name: text, counts and lists of text; None for what is not installed or not known."""
    import torch

    cpu = _cpu_info()
    flags = set(cpu.get("flags", cpu.get("Features", "")).split())
    cuda = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "kangaroo": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tokenizers": _version("tokenizers"),
        "safetensors": _version("safetensors"),
        "platform": platform.platform(),
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_flags": [name for name in INSTRUCTION_SETS if name in flags],
        "threads": torch.get_num_threads(),
        "cuda_devices": cuda,
        "kernel_backend": "reference",
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_info() -> dict[str, str]:
    """The first processor of /proc/cpuinfo by field; {} where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}
