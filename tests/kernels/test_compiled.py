"""Compiled kernels: never those of other sources, shared by every copy of the package, and possible without a home."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from faceflow import kernel_cache
from tests.conftest import ROOT

SCRIPT = """
import numpy as np
from faceflow.kernels.knn import tile_kernel, topk
angles = np.linspace(1.5, 0, 60)
x = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
buffers = topk.Buffers.empty(len(x), 2, None)
tile_kernel.TileKernel(x, np.arange(len(x), dtype=np.int32), buffers).within(np.arange(len(x)), x)
from faceflow.kernels import compiled
print(int(buffers.counts.sum()), sum(tile_kernel._push_block.stats.cache_hits.values()), compiled.folder())
"""


@pytest.fixture
def room(tmp_path: Path) -> Path:
    return tmp_path


def copy(to: Path) -> Path:
    shutil.copytree(ROOT / "lib" / "faceflow", to / "faceflow", ignore=shutil.ignore_patterns("__pycache__"))
    return to


def run(package: Path, **env: str | None) -> list[str]:
    plain = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "NUMBA_CACHE_DIR", kernel_cache.FOLDER)}
    plain |= {"PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1"} | {k: v for k, v in env.items() if v is not None}
    plain = {k: v for k, v in plain.items() if k not in env or env[k] is not None}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=plain, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_an_upgrade_in_place_compiles_what_others_have_inlined(room: Path) -> None:
    """`topk.room_for` is inlined by the kernels of `tile_kernel`, whose own source stays as it is: with stale ones, a slot
    that is smaller now is written to past its end."""
    package, env = copy(room / "a"), {"XDG_CACHE_HOME": str(room / "cache")}
    before = run(package, **env)
    topk = package / "faceflow" / "kernels" / "knn" / "topk.py"
    text = topk.read_text()
    assert text.count("return k + k // 2 + 1") == 1
    topk.write_text(text.replace("return k + k // 2 + 1", "return 6 * k"))
    after, fresh = run(package, **env), run(package, XDG_CACHE_HOME=str(room / "empty"))
    assert after[0] == fresh[0] != before[0]
    assert after[1] == "0"


def test_copies_of_the_package_share_what_is_compiled(room: Path) -> None:
    env = {"XDG_CACHE_HOME": str(room / "cache")}
    first, second = (run(copy(room / name), **env) for name in ("a", "b"))
    assert first[2] == second[2]
    assert (first[1], second[1]) == ("0", "1")
    assert not list((room / "a").rglob("*.nbc"))


def test_without_a_home_a_folder_of_the_user_s_own_in_the_temporary_one_serves(room: Path) -> None:
    """As in a container with a read-only root and a user without an entry in passwd."""
    package, temporary = copy(room / "a"), room / "tmp"
    temporary.mkdir()
    mine = temporary / f"faceflow-{os.getuid()}"
    env = {"HOME": "/proc/no-home", "XDG_CACHE_HOME": None, "TMPDIR": str(temporary)}  # where root cannot make it either
    results = [run(package, **env) for _ in range(2)]
    assert results[0][2].startswith(f"{mine}/")
    assert (results[0][1], results[1][1]) == ("0", "1")
    assert mine.stat().st_mode & 0o777 == 0o700
    # One that others may write is not used: what lies there would be run.
    mine.chmod(0o777)
    assert not run(package, **env)[2].startswith(f"{mine}/")


def test_a_folder_of_the_user_s_choice(room: Path) -> None:
    results = run(copy(room / "a"), **{kernel_cache.FOLDER: str(room / "mine")})
    assert results[2] == str(room / "mine" / Path(results[2]).name)
