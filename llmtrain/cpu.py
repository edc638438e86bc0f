"""What the CPU is good at, and how much of it is ours; read without torch."""

import os
from pathlib import Path


def has_fast_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether products in bf16 are faster than in fp32.

    They are with AMX, and with AMD's AVX-512 (Zen 4 on). Intel's AVX-512 has the instruction too, and takes twice as
    long with it as in fp32 where there is no AMX, or where a virtual machine hides it (docs/log.md).
    """
    words = set(cpuinfo.read_text(encoding="utf-8").split()) if cpuinfo.exists() else set[str]()
    return "amx_bf16" in words or {"avx512_bf16", "AuthenticAMD"} <= words


def usable_cores() -> int:
    """Cores that this process may use; of a SLURM job those that it was given, also where nothing confines it to
    them."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = os.environ.get("SLURM_CPUS_ON_NODE", "")
    return min(there, max(1, int(given))) if given.isdecimal() else there
