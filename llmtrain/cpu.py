"""What the CPU is good at, read without torch."""

from pathlib import Path


def has_fast_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether products in bf16 are faster than in fp32.

    They are with AMX, and with AMD's AVX-512 (Zen 4 on). Intel's AVX-512 has the instruction too, and takes twice as
    long with it as in fp32 where there is no AMX, or where a virtual machine hides it (docs/log.md).
    """
    words = set(cpuinfo.read_text(encoding="utf-8").split()) if cpuinfo.exists() else set[str]()
    return "amx_bf16" in words or {"avx512_bf16", "AuthenticAMD"} <= words
