"""The command blocks of the READMEs: those that can run here are run, in order; every command line is one that exists."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from faceflow.cli.parser import build_parser
from tests.conftest import ROOT, S3

READMES = ("README.md", "jobs/README.md", "lib/README.md", "tests/README.md")
MOST_LINES = 150
FENCE = re.compile(r"(?:<!-- (?P<mark>[^>]*) -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)```", re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block. mark: `run`, or what it needs."""

    readme: str
    mark: str | None
    kind: str
    text: str


def blocks(readme: str) -> list[Block]:
    text = (ROOT / readme).read_text()
    return [Block(readme, m["mark"], m["kind"], m["text"]) for m in FENCE.finditer(text)]


def test_the_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MOST_LINES


def test_every_block_of_the_readme_runs_or_says_what_it_needs() -> None:
    found = [block for block in blocks("README.md") if block.kind in ("bash", "python")]
    assert len(found) >= 6
    assert all(block.mark == "run" or (block.mark or "").startswith("needs ") for block in found)


def run(block: Block, folder: Path, before: str = "", **env: str) -> str:
    """Run a block in a folder; Python ones after the code `before`."""
    program = ["bash", "-eu", "-c", block.text] if block.kind == "bash" else [sys.executable, "-c", before + block.text]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PATH": path} | env
    done = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, f"{block.readme}: {block.text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.timeout(600)
def test_blocks_that_can_run_here(tmp_path: Path, s3: S3) -> None:
    """The first run, reading its labels, `nightly`, and Python, one after the other as a new user would."""
    for block in [*blocks("README.md"), *blocks("lib/README.md")]:
        if block.mark == "run":
            output = run(block, tmp_path)
            if "evaluate" in block.text:
                f = [float(line.split()[-1]) for line in output.splitlines() if line.startswith(("pairwise", "bcubed"))]
                assert len(f) == 2
                assert min(f) > 0.99
    latest = json.loads((tmp_path / "demo" / "clusters" / "latest.json").read_text())
    assert pq.read_table(tmp_path / "demo" / "clusters" / latest["labels"], partitioning=None).num_rows == 20_000
    before = (
        f"import json\nlatest = json.load(open('demo/clusters/latest.json'))\nassert latest['run_id'] == {latest['run_id']!r}\n"
    )
    for block in blocks("README.md"):
        if block.mark == "needs polars, duckdb" and all(map(importlib.util.find_spec, ("polars", "duckdb"))):
            run(block, tmp_path, before)
        if block.mark == "needs s3":
            import s3fs

            fs = s3fs.S3FileSystem(**s3.options)
            fs.put(str(tmp_path / "demo" / "clusters" / "latest.json"), "faces/lake/clusters/latest.json")
            fs.put(f"{tmp_path}/demo/clusters/{latest['labels']}/", f"faces/lake/clusters/{latest['labels']}/", recursive=True)
            text = block.text.replace('"lake/', '"faces/lake/') + "assert labels.num_rows == 20_000\n"
            run(Block(block.readme, block.mark, block.kind, text), tmp_path, **s3.environment)


@pytest.mark.parametrize("readme", READMES)
def test_every_command_line_exists(readme: str) -> None:
    for block in blocks(readme):
        if block.kind not in ("bash", "sh"):
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            command = line.split("#")[0].strip()
            if not command.startswith("faceflow "):
                continue
            build_parser().parse_args(shlex.split(command)[1:])
