"""What the benchmarks say of the processor, on which their ratios depend."""

import platform
import re
from pathlib import Path

__all__ = ["processor"]


def processor() -> str:
    """The CPU's name, and its widest registers where Linux says so, such as ``"AMD EPYC, AVX-512"``."""
    try:
        described = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    name = re.search(r"^model name\s*: (.+)$", described, re.MULTILINE)
    flags = set(described.split())
    widest = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else ""
    return ", ".join(filter(None, (name[1] if name else platform.machine(), widest)))
