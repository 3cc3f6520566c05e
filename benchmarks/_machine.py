"""Properties of the machine that determine speed."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

LIBRARIES = (
    "torch",
    "transformers",
    "timm",
    "open_clip_torch",
    "decord2",
    "av",
    "simplejpeg",
    "opencv-python-headless",
    "numpy",
    "snakemake",
)
# Instruction sets that determine how fast float32 and bfloat16 are.
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "bf16", "sve")
BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")


def describe() -> dict[str, str]:
    """Human-readable properties by topic: processor, flags, memory, GPU, system, versions."""
    flags = cpu_flags()
    properties = {
        "processor": f"{_cpu_value('model name') or platform.machine()}, {os.cpu_count()} cores",
        "flags": ", ".join(flag for flag in FLAGS if flag in flags) or "none known",
        "bfloat16 in the processor": "yes" if has_bf16() else "no",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "GPU": describe_gpu(),
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {number}" for name in LIBRARIES if (number := _version(name))),
    }
    return {name: value for name, value in properties.items() if value}


def describe_gpu() -> str:
    if not torch.cuda.is_available():
        return ""
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"


def has_bf16() -> bool:
    """Whether the processor has bfloat16 instructions; without them bfloat16 is slower than float32."""
    return not cpu_flags().isdisjoint(BF16_FLAGS)


def cpu_flags() -> set[str]:
    return set((_cpu_value("flags") or _cpu_value("Features")).split())


def _cpu_value(name: str) -> str:
    """The first processor's value in /proc/cpuinfo; empty if there is none."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), "")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
