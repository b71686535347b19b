"""Community detection: the native engine, the infomap package and NetworKit (`pip install networkit`) on the graph of the
project's own search, in one run.

    python -m tests.benchmarks.mapequation --faces 100000
    python -m tests.benchmarks.mapequation --run OUTPUT/_runs/RUN --truth FACES     # the edges of an earlier run

NetworKit's LouvainMapEquation knows undirected graphs only and gets the symmetrised one; its codelength is that of its
modules under our directed objective. native-1 is the native engine on one thread.

Each engine gets a process of its own, for its memory. Seconds are what a user waits for: building the graph from the edge
parts (or handing over the links), the run, and reading the modules; compiled kernels are loaded before. The codelength of
both partitions is computed by our formula and, with --verify, by the package too, before any time is printed.
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
import psutil
from pyarrow.dataset import dataset

from faceflow.kernels.clusters import scores as metrics
from faceflow.kernels.graph.csr import build_graph
from faceflow.kernels.mapequation import infomap_package
from faceflow.kernels.mapequation import two_level as mapequation
from faceflow.kernels.mapequation.flow import directed_flow
from faceflow.storage import layout
from faceflow.storage.object_store import Store
from faceflow.tables import EdgeList
from tests.benchmarks.search import PeakMemory


def read_edges(folder: str) -> tuple[list[EdgeList], int]:
    run = Store.at(folder)
    starts = json.loads((Path(folder) / "manifests" / "ingest.json").read_text())["result"]["starts"]
    parts = [EdgeList.from_batch(run.read_batch(layout.part("edges", p)), starts[p]) for p in range(len(starts) - 1)]
    return parts, starts[-1]


def one(engine: str, folder: str, threads: int, out: str) -> None:
    """One engine in this process."""
    tiny = np.arange(4, dtype=np.int64), np.array([1, 2, 0], np.int32), np.ones(3, np.float32)
    for a in tiny:
        a.flags.writeable = False  # as arrays come from files
    mapequation.detect([tiny], threads=threads)
    parts, faces = read_edges(folder)
    before, memory = psutil.Process().memory_info().rss, PeakMemory()
    memory.start()
    begun = time.perf_counter()
    figures: dict[str, Any] = {}
    if engine.startswith("native"):
        partition = mapequation.detect([(e.offsets, e.rows, e.values) for e in parts], threads=threads)
        modules, figures["codelength"] = partition.modules, partition.codelength
    elif engine == "infomap":
        partition = infomap_package.detect(parts, faces, seed=0)
        modules, figures["codelength"] = partition.modules, partition.codelength
    else:
        modules = networkit_modules(parts, faces, threads)
    seconds = time.perf_counter() - begun
    peak = memory.stop()
    np.save(out, modules)
    figures |= {"seconds": round(seconds, 2), "modules": len(np.unique(modules))}
    print(json.dumps(figures | {"peak_bytes": peak, "peak_bytes_over_start": peak - before}))


def networkit_modules(parts: list[EdgeList], faces: int, threads: int) -> np.ndarray:
    import networkit
    from scipy import sparse

    networkit.setNumberOfThreads(threads)
    offsets = np.concatenate([[0], *(np.diff(e.offsets) for e in parts)]).cumsum()
    rows, values = np.concatenate([e.rows for e in parts]), np.concatenate([e.values for e in parts])
    directed = sparse.csr_matrix((values, rows, offsets), shape=(faces, faces))
    upper = sparse.triu(directed + directed.T, format="coo")
    graph = networkit.GraphFromCoo(upper, n=faces, weighted=True, directed=False)
    return np.array(networkit.community.LouvainMapEquation(graph, hierarchical=True).run().getPartition().getVector())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", type=int, default=100_000)
    parser.add_argument("--neighbors", type=int, default=50)
    parser.add_argument("--run", help="run directory with edges, in place of a new synthetic one")
    parser.add_argument("--engines", default="native,native-1,infomap,networkit")
    parser.add_argument("--truth", help="Parquet with the faces' labels, in input order")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--verify", action="store_true", help="have the package score the native partition too")
    parser.add_argument("--one", nargs=2, metavar=("ENGINE", "OUT"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.one:
        one(a.one[0], a.run, a.threads, a.one[1])
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = a.run or make_run(Path(temporary), a.faces, a.neighbors)
        if not a.run:
            a.truth = str(Path(temporary) / "in")
        print(json.dumps(compare(a, folder, Path(temporary))))


def make_run(temporary: Path, faces: int, neighbors: int) -> str:
    from faceflow import ClusterConfig, run_clustering
    from faceflow.tools.datasets.synthesize import synthesize

    synthesize(str(temporary / "in"), faces)
    config = ClusterConfig(
        str(temporary / "in"), str(temporary / "out"), neighbors=neighbors, min_similarity=0.58, edges="threshold",
        index="cells", run_id="bench",
    )  # fmt: skip
    run_clustering(config, progress=False, report=False)
    return str(temporary / "out" / "_runs" / "bench")


def compare(a: argparse.Namespace, folder: str, temporary: Path) -> dict[str, Any]:
    parts, faces = read_edges(folder)
    graph = build_graph([(e.offsets, e.rows, e.values) for e in parts])
    flow = directed_flow(graph, a.threads)
    del parts
    line: dict[str, Any] = {"faces": faces, "edges": len(graph.targets), "threads": a.threads}
    labels = dataset(a.truth, format="parquet").to_table(columns=["label"])["label"].to_numpy() if a.truth else None
    for engine in a.engines.split(","):
        out = temporary / f"{engine}.npy"
        command = [
            sys.executable,
            "-m",
            "tests.benchmarks.mapequation",
            "--run",
            folder,
            "--threads",
            "1" if engine == "native-1" else str(a.threads),
        ]
        done = subprocess.run([*command, "--one", engine, str(out)], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        figures = json.loads(done.stdout.splitlines()[-1])
        modules = np.load(out)
        checked = mapequation.codelength(graph, flow, modules)
        claimed = figures.setdefault("codelength", checked)
        assert abs(checked - claimed) < 1e-7, f"{engine}: {claimed} claimed, {checked} computed"
        if engine == "native":
            native = modules
        if engine == "native-1" and "native" in line:
            np.testing.assert_array_equal(modules, native, "labels depend on the threads")
        if labels is not None:
            scores = metrics.score(np.unique(modules, return_inverse=True)[1], np.unique(labels, return_inverse=True)[1])
            figures |= {"pairwise_f": round(scores.pairwise_f, 4), "bcubed_f": round(scores.bcubed_f, 4)}
        if a.verify and engine == "native":
            figures["codelength_by_package"] = infomap_package.score(read_edges(folder)[0], modules)
            assert abs(figures["codelength_by_package"] - checked) < 1e-7
        figures["peak_bytes_an_edge"] = round(figures["peak_bytes_over_start"] / max(1, len(graph.targets)), 1)
        line[engine] = figures
    if "native" in line and "infomap" in line:
        line["times_faster"] = round(line["infomap"]["seconds"] / line["native"]["seconds"], 2)
        line["codelength_ratio"] = line["native"]["codelength"] / line["infomap"]["codelength"]
        line["memory_ratio"] = round(line["native"]["peak_bytes_over_start"] / line["infomap"]["peak_bytes_over_start"], 3)
    return line


if __name__ == "__main__":
    main()
