"""The rules of the house: imports go one way, each heavy package lives in one place, lib/ is never ignored."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lib" / "faceflow"

LAYERS = [
    {"errors"},
    {"setting_types"},
    {"tables", "config", "config_loading", "logs", "kernel_cache"},
    {"kernels", "storage", "cluster"},
    {"stages"},
    {"runs"},
    {"people", "tools"},
    {"api"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
SEALED = {"kernels", "storage", "cluster"}
HOMES = {
    "ray": "cluster",
    "numba": "kernels",
    "faiss": "kernels/knn/gpu_search.py",
    "infomap": "kernels/mapequation/infomap_package.py",
    "sklearn": "kernels/methods",
    "scipy": "kernels/methods",
    "igraph": "kernels/methods",
    "leidenalg": "kernels/methods",
    "s3fs": "storage/object_store.py",
    "fsspec": "storage/object_store.py",
    "deltalake": "storage/table_formats.py",
    "pyiceberg": "storage/table_formats.py",
    "matplotlib": "tools/figures.py",
    "jinja2": "tools/report",
    "PIL": "tools/report",
}
"""Where a package may be imported: a file, or a folder and all below it."""


def modules() -> list[Path]:
    paths = sorted(PACKAGE.rglob("*.py"))
    assert len(paths) > 20
    return paths


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


def stage_folder(parts: tuple[str, ...]) -> str | None:
    """The stage that a module below stages/ belongs to: a folder with a stage.py; None for what stages share."""
    if parts[:1] == ("stages",) and len(parts) > 1 and (PACKAGE / "stages" / parts[1] / "stage.py").exists():
        return parts[1]
    return None


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    source = room(path)
    if source in ("__init__", "__main__"):
        return
    assert source in LEVEL, f"{path}: a new room needs a layer"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "faceflow" or len(parts) < 2 or parts[1].startswith("__"):
            continue
        target = parts[1]
        assert LEVEL[target] <= LEVEL[source], f"{path} imports {name}, a layer above its own"
        if source in SEALED and target in SEALED:
            assert source == target, f"{path} imports {name}: {source} and {target} never meet"
        stage = stage_folder(tuple(parts[1:]))
        if source == "stages" and stage is not None:
            mine = stage_folder(path.relative_to(PACKAGE).parts)
            assert stage == mine, f"{path} imports the stage {stage}: stages meet through files only"


def test_each_package_lives_in_one_place() -> None:
    for path in modules():
        relative = path.relative_to(PACKAGE)
        for package in {name.split(".")[0] for name in imports(path)} & HOMES.keys():
            home = Path(HOMES[package])
            assert relative == home or home in relative.parents, f"{relative} imports {package}, which lives in {home}"


def test_kernels_stay_silent() -> None:
    paths = sorted((PACKAGE / "kernels").rglob("*.py"))
    assert len(paths) > 20
    for path in paths:
        banned = {"logging", "os", "pathlib", "pyarrow", "tqdm"} & {name.split(".")[0] for name in imports(path)}
        assert not banned, f"{path} imports {banned}"
        assert "faceflow.config" not in {name.rsplit(".", 1)[0] for name in imports(path)}, path
        calls = [
            n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "print"
        ]
        assert not calls, f"{path} prints"


def test_every_stage_has_its_entry() -> None:
    folders = {path.parent.name for path in (PACKAGE / "stages").glob("*/stage.py")}
    assert folders == {"ingest", "quantize", "search", "link", "detect", "publish"}


def test_no_pickle_anywhere() -> None:
    for path in modules():
        assert not {name.split(".")[0] for name in imports(path)} & {"pickle", "cloudpickle", "shelve", "marshal"}, path
        assert "allow_pickle=True" not in path.read_text(), path


def test_jobs_are_thin() -> None:
    for path in (ROOT / "jobs").glob("*.py"):
        assert len(path.read_text().splitlines()) < 20, f"{path} holds more than a call into the CLI"


def test_the_package_folder_is_not_ignored() -> None:
    # Ray does not upload ignored files to its workers.
    done = subprocess.run(["git", "check-ignore", "-q", "lib/faceflow/api.py"], cwd=ROOT, check=False)
    if done.returncode == 128:
        pytest.skip("not a git checkout")
    assert done.returncode == 1
