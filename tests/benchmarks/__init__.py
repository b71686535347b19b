"""Benchmarks: each is a program of its own, checks its answer, and prints one JSON line."""

import os
from pathlib import Path

# A fair baseline: the OpenBLAS inside faiss-cpu 1.15.1 does not know newer processors and falls back to code for one of 2004,
# three times slower. It reads this when it is loaded, so it stands here; NumPy's OpenBLAS chooses the same by itself.
_FLAGS = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
if "avx512f" in _FLAGS or "avx2" in _FLAGS:
    os.environ.setdefault("OPENBLAS_CORETYPE", "SKYLAKEX" if "avx512f" in _FLAGS else "HASWELL")
