"""What a run will take: seconds, memory and disk, from sizes and measured constants. Arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass

from faceflow.kernels.ivf import plan as plans

# Core-seconds of what is not a matrix product, measured on 2 cores of an AMD EPYC with AVX-512 (80 GFLOP/s a core), 1,000,000
# and 5,200,000 x 256 synthetic faces, 91 neighbors a face, all defaults, 2026-11. What is one, counts as operations at the
# speed measured on the cluster itself.
INGEST_VALUE = 3.0e-8
"""A value (face x dimension) that is read, checked, normalised and written."""

PAIR_COUNTED = 2.4e-9
"""A pair of the sample that goes into the histogram of similarities."""

PROBE_SCANNED = 5.0e-8
"""A held-out face x cell, when the probes are chosen."""

ASSIGN_OVERHEAD = 1.2
"""Of assignment, beside its product."""

TILE_SCAN = 1.5
"""What a tile takes beside its product and its hits: the scan for hits, and gathering its faces."""

HIT_PUSHED = 1.1e-7
"""A neighbor found, in the search; and MERGED, in the merge."""
MERGED = 5.2e-8

CERTIFY_OVERHEAD = 1.2

LINKED = 1.6e-7
"""A neighbor, through an edge recipe that compares two faces' neighbors; THRESHOLDED: through `threshold`."""
THRESHOLDED = 1.5e-8

DETECTED, DETECT_SERIAL, DETECT_GROWTH = 2.4e-7, 0.19, 0.2
"""An edge, in community detection by one thread of the native engine at a million faces; the share that more threads do not
help (19.0 s with one, 11.3 s with two); and the power of the faces with which it grows, as memory is reached at random."""

PACKAGE_DETECTED = 4.0e-6
"""An edge, in community detection by the infomap package."""

ASSIGN_SINGLE = 1.6
"""Of giving singletons to clusters, beside its product: the nearest ones are kept."""

PUBLISHED, JUDGED = 1.5e-6, 3.0e-8
"""A face whose label is written; a neighbor that its cluster's quality counts."""

STAGE_SECONDS = 0.15
"""What a stage takes whatever it does: its tasks travel."""

START_SECONDS = 6.0
"""Of a private Ray, until its first task runs."""

BASE_BYTES = 350 * 2**20
"""A worker that has loaded its packages and compiled kernels."""

GRAPH_BYTES = 20
"""A neighbor or edge, in link and detect at their peak: with FACE_BYTES 2.4e9 bytes of the largest worker at 1M faces and 91M
neighbors (2.4e9 measured), 11.0e9 at 5.2M and 472M (10.2e9)."""

FACE_BYTES = 239
"""A face, there: in graphs of 2 and 30 edges a face detection took 222 and 662 bytes a face (3M faces), of which 190 by this
law are the face's."""

DRIVER_BYTES = 260 * 2**20
"""Whatever the faces' number: measured up to 5,200,000."""

EXACT_BLOCK_BYTES, INGEST_PART_BYTES = 400 * 2**20, 300 * 2**20
"""Two blocks of the exact plan with their product; what a worker keeps of the parts that it has read and written."""

ROW_DISK, ENTRY_DISK = 130, 16
"""Bytes of the run directory a face beside vector and id, and a neighbor: tables beside candidates, or beside edges."""


@dataclass(frozen=True)
class Workload:
    """What a run has to do, and with what.

    faces, dim; neighbors, edges: a face, expected; cells: of the quantizer (0: all pairs are compared); probes: a face, mean;
    single: share of faces without an edge; people: clusters that these may be given to (0: they stay alone);
    sampled: faces of which all pairs are counted for the threshold (0: it is given); certified: faces searched exactly;
    iterations, per_cell: of the quantizer's training; held_out: faces held out of it; shared: whether the edge recipe compares
    neighbors; native: the engine; id_bytes: a face's id, mean; workers: tasks at once; threads: of the machine for link and
    detect; flops: operations a second of one worker.
    """

    faces: int
    dim: int
    neighbors: float
    edges: float
    single: float
    people: float
    cells: int
    probes: float
    sampled: int
    certified: int
    iterations: float
    per_cell: int
    held_out: int
    shared: bool
    native: bool
    id_bytes: float
    workers: int
    threads: int
    flops: float


def stage_seconds(load: Workload) -> dict[str, float]:
    """Predicted wall seconds of each stage, in the run's order, a private Ray's start not included."""
    n, d, w = float(load.faces), float(load.dim), load.workers
    entries, edges = n * load.neighbors, n * load.edges
    flops = load.flops
    threshold = (load.sampled**2 * d / flops + PAIR_COUNTED * load.sampled**2 / 2) / w
    certify = CERTIFY_OVERHEAD * 2 * d * load.certified * n / flops / w
    merge = MERGED * entries / w
    if load.cells:
        cells = float(load.cells)
        train = 2 * d * load.iterations * load.per_cell * cells**2 / (flops * load.threads)
        train += PROBE_SCANNED * load.held_out * cells
        assign = ASSIGN_OVERHEAD * 2 * d * n * cells / flops / w
        pairs = n**2 * max(0.5, load.probes - 0.5) / cells
    else:
        train = assign = 0.0
        pairs = n**2 / 2
    search = (2 * d * pairs * TILE_SCAN / flops + HIT_PUSHED * entries) / w
    link = LINKED * entries / load.threads if load.shared else THRESHOLDED * entries / w
    speed_up = 1 / (DETECT_SERIAL + (1 - DETECT_SERIAL) / load.threads) if load.native else 1.0
    detect = (DETECTED if load.native else PACKAGE_DETECTED) * edges * max(0.1, n / 1e6) ** DETECT_GROWTH / speed_up
    detect += ASSIGN_SINGLE * 2 * d * (n * load.single) * load.people / (flops * load.threads)
    seconds = {
        "ingest": INGEST_VALUE * n * d / w,
        "quantize": threshold + train + assign,
        "search": search + merge + certify,
        "link": link,
        "detect": detect,
        "publish": (PUBLISHED * n + JUDGED * entries) / w,
    }
    return {stage: STAGE_SECONDS + value for stage, value in seconds.items()}


def central_bytes(load: Workload) -> int:
    """Peak resident memory of the tasks that hold the whole graph (link, detect)."""
    return int(BASE_BYTES + load.faces * (FACE_BYTES + GRAPH_BYTES * max(load.neighbors, load.edges)))


def worker_bytes(load: Workload, k: int, workers: plans.Workers) -> int:
    """Peak resident memory of a worker of the search, whose shards are cut for these workers."""
    if not load.cells:
        return int(BASE_BYTES + EXACT_BLOCK_BYTES)
    shards = plans.shard_count(load.faces, load.dim, k, load.cells, load.probes, workers)
    held = load.faces * min(load.probes, 4.0) * (4 * load.dim + 12 * min(k, 2 * load.neighbors) + 64) / shards
    return int(BASE_BYTES + INGEST_PART_BYTES + held)


def disk_bytes(load: Workload) -> int:
    """Largest size of the run directory and the labels."""
    return int(load.faces * (4 * load.dim + 2 * load.id_bytes + ROW_DISK + ENTRY_DISK * load.neighbors))
