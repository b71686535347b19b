"""The rules of the house: imports go one way, heavy packages live in one place each, lib/ is never ignored."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lib" / "faceflow"

LAYERS = [
    {"errors"},
    {"tables", "config", "logs", "caches"},
    {"kernels", "storage", "cluster"},
    {"stages"},
    {
        "advance",
        "pipeline",
        "report",
        "runs",
        "evaluation",
        "synthesis",
        "importing",
        "housekeeping",
        "lease",
        "comparison",
        "comparing",
        "progress",
        "plots",
        "scaling",
        "planning",
    },
    {"commands"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
SEALED = {"kernels", "storage", "cluster"}
HOMES = {
    "ray": {"cluster"},
    "faiss": {"kernels"},
    "infomap": {"kernels"},
    "numba": {"kernels"},
    "s3fs": {"storage"},
    "fsspec": {"storage"},
    "deltalake": {"storage"},
    "pyiceberg": {"storage"},
    "matplotlib": {"plots"},
    "jinja2": {"report"},
    "PIL": {"report"},
}
STAGE_HELPERS = {
    "adoption", "arrivals", "base", "candidates", "cells", "certificate", "checking", "copies", "decisions", "floors",
    "forecast", "grouping", "history", "intake", "pieces", "quality", "reading", "renewal", "resampling", "unions",
}  # fmt: skip


def modules() -> list[Path]:
    found = sorted(PACKAGE.rglob("*.py"))
    assert len(found) > 20
    return found


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layer"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    here = room(path)
    if here == "__init__":
        return
    assert here in LEVEL, f"{path}: a new room needs a layer"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] in HOMES:
            assert here in HOMES[parts[0]], f"{path} imports {parts[0]}, which lives in {HOMES[parts[0]]}"
        if parts[0] != "faceflow" or len(parts) < 2 or parts[1].startswith("__"):
            continue
        there = parts[1]
        assert LEVEL[there] <= LEVEL[here], f"{path} imports {name}, a layer above its own"
        if here in SEALED and there in SEALED:
            assert here == there, f"{path} imports {name}: {here} and {there} never meet"
        if here == "stages" and there == "stages":
            helper = parts[2] if len(parts) > 2 else ""
            assert helper in STAGE_HELPERS or helper == "", f"{path} imports the stage {helper}: stages meet through files only"


def test_kernels_stay_silent() -> None:
    for path in (PACKAGE / "kernels").glob("*.py"):
        banned = {"logging", "os", "pathlib", "pyarrow", "tqdm"} & {name.split(".")[0] for name in imports(path)}
        assert not banned, f"{path} imports {banned}"
        assert "faceflow.config" not in {name.rsplit(".", 1)[0] for name in imports(path)}, path
        calls = [
            n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "print"
        ]
        assert not calls, f"{path} prints"


def test_infomap_is_imported_in_one_module() -> None:
    users = {p.name for p in modules() if any(name.split(".")[0] == "infomap" for name in imports(p))}
    assert users == {"infomap_engine.py"}


def test_no_pickle_anywhere() -> None:
    for path in modules():
        assert not {name.split(".")[0] for name in imports(path)} & {"pickle", "cloudpickle", "shelve", "marshal"}, path
        assert "allow_pickle=True" not in path.read_text(), path


def test_jobs_are_thin() -> None:
    for path in (ROOT / "jobs").glob("*.py"):
        assert len(path.read_text().splitlines()) < 20, f"{path} holds more than a call into the CLI"


def test_the_package_folder_is_not_ignored() -> None:
    # Ray does not upload ignored files to its workers.
    done = subprocess.run(["git", "check-ignore", "-q", "lib/faceflow/cli.py"], cwd=ROOT, check=False)
    if done.returncode == 128:
        pytest.skip("not a git checkout")
    assert done.returncode == 1
