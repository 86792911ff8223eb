"""What is known of this machine: facts for a report, and the key that results are kept under."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx

from pyengine import _ext
from pyengine.doctor.device import Metal


def facts() -> dict[str, Any]:
    """Chip, cores, system, memory; on a Mac with the GPU's."""
    found: dict[str, Any] = {
        "chip": chip(),
        "cores": os.cpu_count(),
        "os": platform.platform(),
        "os_build": os_build(),
        "instruction_set": _ext.instruction_set(),
    }
    if mx.metal.is_available():
        found |= gpu()
    return found


def gpu() -> dict[str, Any]:
    """What Metal says of the GPU, and how much memory the user lets be wired."""
    info = dict(mx.device_info())
    return {
        "gpu": info.get("device_name"),
        "architecture": info.get("architecture"),
        "memory_bytes": info.get("memory_size"),
        "working_set_bytes": info.get("max_recommended_working_set_size"),
        "wired_limit_mb": _sysctl("iogpu.wired_limit_mb"),
    }


@cache
def chip() -> str:
    """The processor's name."""
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@cache
def os_build() -> str:
    """macOS's build, which its drivers and its Metal compiler come with; elsewhere the kernel."""
    return (_sysctl("kern.osversion") if sys.platform == "darwin" else None) or platform.release()


def key(device: str) -> dict[str, str]:
    """What a result of the doctor depends on: another system, chip or build may do otherwise."""
    where = str(mx.device_info().get("architecture")) if device == Metal.name else ""
    return {
        "device": device,
        "os_build": os_build(),
        "chip": chip(),
        "runs": where or _ext.instruction_set(),
        "mlx": metadata.version("mlx"),
        "sources": _ext.built_from,
    }


def digest(key: dict[str, str]) -> str:
    text = json.dumps(key, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _sysctl(name: str) -> str | None:
    """A value of the kernel's; None where there is none of that name."""
    if sys.platform != "darwin":
        return None
    try:
        done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
