"""Accuracy without tuning: the default settings against plain threshold Infomap at its best fixed threshold, on the same faces.

    python -m tests.benchmarks.accuracy --data FOLDER                       # LFW (two embeddings) and CelebA, where they are
    python -m tests.benchmarks.accuracy --synthetic 100000 --look ms1m      # and dense sets
    python -m tests.benchmarks.accuracy --growth 30000 --look ms1m          # N, 3N, 9N: what a threshold tuned at N is worth
    later

F is the mean of pairwise and BCubed F. The best fixed threshold is looked for in steps of .01 about the automatic one, once
with the 80 and once with the 200 nearest neighbors, with the labels; the default knows no labels. (Above LARGE faces: every
third, then all about the best of these.) One JSON line a set; `recipes` has F of every edge recipe at the automatic threshold.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from pyarrow.dataset import dataset

from faceflow.kernels.clusters import scores as metrics
from faceflow.kernels.graph import edge_recipes
from faceflow.kernels.graph.csr import compress
from faceflow.kernels.mapequation import two_level as mapequation
from faceflow.storage import layout
from faceflow.storage.object_store import Store
from faceflow.tables import NeighborTable

ROOT = Path(__file__).resolve().parents[2]
SETS = ("lfw_mobilefacenet128", "lfw_dlib128", "celeba_dev_mobilefacenet128")
REACH, STEP = 0.12, 0.01
PLAIN_NEIGHBORS = (80, 200)
LARGE = 500_000


def f_of(modules: np.ndarray, identities: np.ndarray) -> float:
    """Mean of pairwise and BCubed F."""
    scores = metrics.score(np.unique(modules, return_inverse=True)[1], identities)
    return (scores.pairwise_f + scores.bcubed_f) / 2


def job(source: str, output: Path, *flags: str) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "jobs" / "cluster.py"), source, str(output), "--json", "--quiet", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def identities_of(source: str) -> np.ndarray:
    """The faces' labels in the order of the run's rows: sorted files, rows in them."""
    return np.unique(dataset(source, format="parquet").to_table(columns=["label"])["label"].to_numpy(), return_inverse=True)[1]


def clusters_of(output: Path) -> np.ndarray:
    pointer = json.loads((output / "latest.json").read_text())
    files = sorted((output / pointer["labels"]).glob("part-*.parquet"))
    return np.concatenate([pq.read_table(f, columns=["cluster"], partitioning=None)["cluster"].to_numpy() for f in files])


def thresholds_of(output: Path, run_id: str) -> dict[str, Any]:
    found = json.loads((output / "_runs" / run_id / "manifests" / "quantize.json").read_text())["result"]["threshold"]
    return {key: found[key] for key in ("similarity", "support", "valley", "impostors_per_face")}


def tables(output: Path, run_id: str) -> NeighborTable:
    """The neighbor tables of a run, as one."""
    run = Store.at(str(output / "_runs" / run_id))
    starts = json.loads((output / "_runs" / run_id / "manifests" / "ingest.json").read_text())["result"]["starts"]
    parts = [NeighborTable.from_batch(run.read_batch(layout.part("neighbors", p)), 0) for p in range(len(starts) - 1)]
    offsets = np.concatenate([[0], *(np.diff(part.offsets) for part in parts)]).cumsum()
    return NeighborTable(0, offsets, np.concatenate([p.rows for p in parts]), np.concatenate([p.values for p in parts]))


def plain(table: NeighborTable, neighbors: int, threshold: float, identities: np.ndarray) -> float:
    """F of threshold Infomap."""
    results = edge_recipes.threshold(table, neighbors, threshold)
    return f_of(mapequation.detect([(results.offsets, results.rows, results.values)], threads=2).modules, identities)


def sweep(table: NeighborTable, identities: np.ndarray, lowest: float, highest: float) -> dict[str, Any]:
    """The best of all thresholds in steps of STEP; for a large set of every third one, and of all about the best of these."""
    thresholds = [round(float(threshold), 2) for threshold in np.arange(lowest, min(highest, 0.995), STEP)]
    tried: list[tuple[float, int, float]] = []
    for k in PLAIN_NEIGHBORS:
        coarse = range(1, len(thresholds), 3) if len(identities) > LARGE else range(len(thresholds))
        seen = {i: plain(table, k, thresholds[i], identities) for i in coarse}
        top = max(seen, key=lambda i: seen[i])
        seen |= {
            i: plain(table, k, thresholds[i], identities)
            for i in range(max(0, top - 2), min(len(thresholds), top + 3))
            if i not in seen
        }
        tried += [(f, k, thresholds[i]) for i, f in seen.items()]
    best = max(tried)
    return {"f": round(best[0], 4), "neighbors": best[1], "threshold": best[2]}


def recipes(table: NeighborTable, identities: np.ndarray, thresholds: dict[str, Any]) -> dict[str, float]:
    above = table.values >= np.float32(thresholds["similarity"])
    block = edge_recipes.kept((table.offsets, table.rows, table.values), above)
    *block, order = compress([block], 2)
    out = {}
    for name in ("shared", "nep", "facemap", "tpdi"):
        results = getattr(edge_recipes, name)(tuple(block))
        modules = np.empty(len(order), np.int64)
        modules[order] = mapequation.detect([results], threads=2).modules
        out[name] = round(f_of(modules, identities), 4)
    return out


def compare(name: str, source: str, folder: Path) -> dict[str, Any]:
    identities = identities_of(source)
    begun = time.perf_counter()
    run = job(source, folder / "default")
    seconds = time.perf_counter() - begun
    ours = f_of(clusters_of(folder / "default"), identities)
    thresholds = thresholds_of(folder / "default", run["run_id"])
    lowest = max(0.0, round(thresholds["similarity"] - REACH, 2))
    wide = job(source, folder / "wide", "--min-similarity", str(lowest), "--edges", "threshold", "--neighbors", "200",
               "--min-recall", "0")  # fmt: skip
    table = tables(folder / "wide", wide["run_id"])
    best = sweep(table, identities, lowest, thresholds["similarity"] + REACH)
    line = {"set": name, "faces": len(identities), "default": round(ours, 4), "best_fixed": best}
    line["ahead"] = round(ours - best["f"], 4)
    line |= thresholds | {"recipes": recipes(table, identities, thresholds), "seconds": round(seconds, 1)}
    return line


def growth(faces: int, look: str, folder: Path) -> list[dict[str, Any]]:
    """F of the defaults, and of plain threshold Infomap with the threshold that is best at the smallest size."""
    lines: list[dict[str, Any]] = []
    tuned: dict[str, Any] = {}
    for times in (1, 3, 9):
        source = str(folder / f"in-{times}")
        synthesize_to(source, faces * times, look)
        identities = identities_of(source)
        run = job(source, folder / f"default-{times}")
        ours = f_of(clusters_of(folder / f"default-{times}"), identities)
        thresholds = thresholds_of(folder / f"default-{times}", run["run_id"])
        lowest = tuned["threshold"] if tuned else max(0.0, round(thresholds["similarity"] - REACH, 2))
        wide = job(source, folder / f"wide-{times}", "--min-similarity", str(lowest), "--edges", "threshold", "--neighbors",
                   str(tuned.get("neighbors", 200)), "--min-recall", "0")  # fmt: skip
        table = tables(folder / f"wide-{times}", wide["run_id"])
        tuned = tuned or sweep(table, identities, lowest, thresholds["similarity"] + REACH)
        theirs = plain(table, tuned["neighbors"], tuned["threshold"], identities)
        line = {"faces": faces * times, "default": round(ours, 4), "tuned_at_first": round(theirs, 4)}
        lines.append(
            line
            | {
                "threshold": thresholds["similarity"],
                "tuned_threshold": tuned["threshold"],
                "tuned_neighbors": tuned["neighbors"],
            }
        )
        print(json.dumps(lines[-1]), flush=True)
    return lines


def synthesize_to(folder: str, faces: int, look: str) -> None:
    from faceflow.tools.datasets.synthesize import synthesize

    synthesize(folder, faces, look=look)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of labeled sets")
    parser.add_argument("--synthetic", type=int, help="faces of a dense synthetic set")
    parser.add_argument("--growth", type=int, help="faces of the smallest of three synthetic sets")
    parser.add_argument("--look", default="ms1m")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for name in SETS if a.data else ():
            source = Path(a.data) / f"{name}.parquet"
            if source.exists():
                print(json.dumps(compare(name, str(source), Path(temporary) / name)), flush=True)
        if a.synthetic:
            synthesize_to(str(Path(temporary) / "in"), a.synthetic, a.look)
            print(json.dumps(compare(f"{a.look} {a.synthetic}", str(Path(temporary) / "in"), Path(temporary))), flush=True)
        if a.growth:
            growth(a.growth, a.look, Path(temporary))


if __name__ == "__main__":
    main()
