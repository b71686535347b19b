"""Every way to cluster one neighbor table: the registry behind `--method` and `compare`.

`infomap`, the default, is `mapequation`; the others are what the literature compares, for the sake of comparison. Where a
well-kept library has a method, it is used (the `methods` extra: SciPy, scikit-learn, igraph, leidenalg).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from faceflow.errors import InputError, SettingsError
from faceflow.kernels.graph.shared_neighbors import Block

LARGEST_DENSE = 20_000
"""Faces of one component of which all pairs are held, 4 bytes a pair and some copies, by methods that need them."""

DBSCAN_LEAST = 4
"""Faces within reach, itself included, that make a face a core of DBSCAN."""

HDBSCAN_LEAST = 2
SPECTRAL_MOST, SPECTRAL_DENSE = 50, 1_000
"""Eigenvalues of one component that are looked at, and rows up to which all are computed."""

KMEANS_BATCH = 16_384


@dataclass(frozen=True)
class Given:
    """What a method may use.

    table: each row's neighbors at the threshold or above, by falling cosine; edges: the pruned graph, as weighted by the
    recipe; vectors: (rows int64[r]) -> float32[r, d], their unit embeddings; threshold: the cosine from which faces are
    neighbors; clusters: how many to make, for methods that need the number; seed: of everything random; threads: of the CPU.
    """

    table: Block
    edges: Block
    vectors: Callable[[np.ndarray], np.ndarray]
    threshold: float
    clusters: int | None = None
    seed: int = 0
    threads: int = 1

    def __len__(self) -> int:
        return len(self.table[0]) - 1


@dataclass(frozen=True)
class Method:
    """run: Given -> labels int64[n], any numbers; text: what it is; most_faces: above which `compare` skips it; package: what
    must be installed; needs_clusters: whether it needs the number of clusters."""

    run: Callable[[Given], np.ndarray]
    text: str
    most_faces: int
    package: str = "scipy"
    needs_clusters: bool = False


def cluster(name: str, given: Given) -> np.ndarray:
    """int64[n]: labels 0, 1, … by first row, of one method. Raises SettingsError for a package that is missing or a number of
    clusters that was not said, InputError for a component that is too large for the method."""
    method = METHODS[name]
    if method.needs_clusters and given.clusters is None:
        raise SettingsError(f"method {name} needs the number of clusters: set --clusters")
    if method.needs_clusters and not 1 <= (given.clusters or 0) <= max(1, len(given)):
        raise SettingsError(f"clusters is {given.clusters}: there are {len(given)} faces")
    if len(given) == 0:
        return np.empty(0, np.int64)
    try:
        labels = method.run(given)
    except ImportError as error:
        raise SettingsError(f"method {name} needs {method.package}: pip install 'faceflow[methods]' ({error})") from None
    _, first, dense = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[dense]


def _infomap(given: Given) -> np.ndarray:
    from faceflow.kernels.mapequation import two_level as mapequation

    return mapequation.detect([given.edges], given.seed, threads=given.threads).modules


def _components(given: Given) -> np.ndarray:
    from faceflow.kernels.methods import algorithms

    return algorithms.components(len(given), algorithms.sources_of(given.table), given.table[1])


def _linked(find: str) -> Callable[[Given], np.ndarray]:
    def run(given: Given) -> np.ndarray:
        from faceflow.kernels.methods import algorithms

        return algorithms.components(len(given), *getattr(algorithms, find)(given.table))

    return run


def _cdp(given: Given) -> np.ndarray:
    from faceflow.kernels.methods import algorithms

    return algorithms.split_components(given.table, given.threshold)


def _chinese_whispers(given: Given) -> np.ndarray:
    from faceflow.kernels.methods import algorithms

    return algorithms.chinese_whispers(algorithms.symmetric(given.table), given.seed)


def _dbscan(given: Given) -> np.ndarray:
    from sklearn.cluster import DBSCAN

    from faceflow.kernels.methods import algorithms

    distance = algorithms.symmetric(given.table)
    distance.data = np.maximum(1 - distance.data, 1e-7)
    # scikit-learn takes a sparse matrix without its diagonal as "not a neighbor of itself", and counts it all the same.
    reach = float(np.float32(1 - given.threshold)) + 1e-6
    labels = DBSCAN(eps=reach, min_samples=DBSCAN_LEAST, metric="precomputed").fit(distance).labels_
    return _alone(labels)


def _alone(labels: np.ndarray) -> np.ndarray:
    """Labels in which every row of label -1 (noise) has one of its own."""
    return np.where(labels < 0, labels.max(initial=-1) + 1 + np.arange(len(labels)), labels)


def _within_components(split: Callable[[np.ndarray, Given], np.ndarray], least: int) -> Callable[[Given], np.ndarray]:
    """A method that divides each component of `least` rows or more by itself: split(rows, given) -> labels."""

    def run(given: Given) -> np.ndarray:
        results = _components(given)
        order = np.argsort(results, kind="stable")
        ends = np.concatenate([[0], np.cumsum(np.bincount(results))])
        labels, used = np.empty(len(given), np.int64), 0
        for begin, end in zip(ends[:-1], ends[1:], strict=True):
            rows = order[begin:end]
            inside = split(rows, given) if len(rows) >= least else np.zeros(len(rows), np.int64)
            labels[rows] = used + inside
            used += int(inside.max()) + 1
        return labels

    return run


def _distances(rows: np.ndarray, given: Given) -> np.ndarray:
    """float32[r, r]: 1 - cosine of all pairs of a component's rows."""
    if len(rows) > LARGEST_DENSE:
        raise InputError(
            f"{len(rows)} faces are connected above the threshold of {given.threshold:.3f}, and this method holds all pairs of "
            f"a component, of {LARGEST_DENSE} faces at most: raise --min-similarity"
        )
    vectors = given.vectors(rows)
    distance = np.clip(1 - vectors @ vectors.T, 0, 2)
    np.fill_diagonal(distance, 0)
    return (distance + distance.T) / 2


def _average(rows: np.ndarray, given: Given) -> np.ndarray:
    # Clusters in two components have no pair above the threshold, so their average is below it: each component stands by
    # itself.
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    tree = linkage(squareform(_distances(rows, given), checks=False), "average")
    return fcluster(tree, 1 - given.threshold, "distance").astype(np.int64) - 1


def _hdbscan(rows: np.ndarray, given: Given) -> np.ndarray:
    from sklearn.cluster import HDBSCAN

    model = HDBSCAN(
        min_cluster_size=HDBSCAN_LEAST, min_samples=1, metric="precomputed", allow_single_cluster=True, copy=True,
        cluster_selection_epsilon=0.0,
    )  # fmt: skip
    return _alone(model.fit(_distances(rows, given).astype(np.float64)).labels_)


def _spectral(rows: np.ndarray, given: Given) -> np.ndarray:
    """Normalised spectral clustering (Ng, Jordan & Weiss 2001) of one component into as many as its largest eigengap says."""
    from scipy.linalg import eigh
    from scipy.sparse.linalg import eigsh
    from sklearn.cluster import KMeans

    from faceflow.kernels.methods import algorithms

    number = np.full(len(given), -1)
    number[rows] = np.arange(len(rows))
    picked = _rows_of(given.table, rows)
    near = algorithms.symmetric((picked[0], number[picked[1]].astype(np.int32), picked[2])).astype(np.float64)
    scale = 1 / np.sqrt(np.asarray(near.sum(axis=1)).ravel())
    near = near.multiply(scale[:, None]).multiply(scale[None, :]).tocsr()
    most = min(SPECTRAL_MOST, len(rows) - 1)
    if len(rows) <= SPECTRAL_DENSE:
        values, basis = eigh(near.toarray(), subset_by_index=(len(rows) - most - 1, len(rows) - 1))
    else:
        values, basis = eigsh(near, k=most + 1, which="LA", v0=np.ones(len(rows)))
    values, basis = values[::-1], basis[:, ::-1]
    count = int(np.argmax(values[:-1] - values[1:])) + 1
    if count == 1:
        return np.zeros(len(rows), np.int64)
    points = basis[:, :count] / np.maximum(np.linalg.norm(basis[:, :count], axis=1, keepdims=True), 1e-12)
    return KMeans(count, n_init=4, random_state=given.seed).fit(points).labels_.astype(np.int64)


def _rows_of(block: Block, rows: np.ndarray) -> Block:
    """Some rows of a block."""
    offsets = np.concatenate([[0], np.cumsum(np.diff(block[0])[rows])])
    at = np.repeat(block[0][:-1][rows] - offsets[:-1], np.diff(offsets)) + np.arange(offsets[-1])
    return offsets, block[1][at], block[2][at]


def _graph(given: Given) -> tuple[Any, np.ndarray]:
    """The symmetric table as an igraph Graph, and its weights."""
    import igraph
    from scipy.sparse import triu

    from faceflow.kernels.methods import algorithms

    upper = triu(algorithms.symmetric(given.table), 1).tocoo()
    return igraph.Graph(n=len(given), edges=np.column_stack(upper.coords)), upper.data


def _label_propagation(given: Given) -> np.ndarray:
    import random

    import igraph

    graph, weights = _graph(given)
    igraph.set_random_number_generator(random.Random(given.seed))
    try:
        return np.array(graph.community_label_propagation(weights=weights.tolist()).membership)
    finally:
        igraph.set_random_number_generator(random)


def _leiden(given: Given) -> np.ndarray:
    import leidenalg

    graph, weights = _graph(given)
    results = leidenalg.find_partition(graph, leidenalg.ModularityVertexPartition, weights=weights.tolist(), seed=given.seed)
    return np.array(results.membership)


def _minibatch_kmeans(given: Given) -> np.ndarray:
    from sklearn.cluster import MiniBatchKMeans

    count = int(given.clusters or 1)
    model = MiniBatchKMeans(count, random_state=given.seed, batch_size=max(KMEANS_BATCH, count), n_init=1, reassignment_ratio=0)
    return model.fit(given.vectors(np.arange(len(given)))).labels_.astype(np.int64)


ANY = 2**31
"""As many faces as a graph may have."""

METHODS = {
    "infomap": Method(_infomap, "two-level map equation of the weighted graph", ANY, "numba"),
    "components": Method(_components, "connected components of all pairs above the threshold", ANY),
    "hac-single": Method(_components, "single linkage cut at the threshold, which is the components by another name", ANY),
    "hac-average": Method(_within_components(_average, 3), "average linkage over all pairs, cut at the threshold", 300_000),
    "chinese-whispers": Method(_chinese_whispers, "every face takes the label heard most among its neighbors", ANY),
    "label-propagation": Method(_label_propagation, "igraph's label propagation", 2_000_000, "igraph"),
    "leiden": Method(_leiden, "modularity, by leidenalg", 2_000_000, "leidenalg"),
    "knn-dbscan": Method(_dbscan, "DBSCAN on the table: reach 1 - threshold, a core has 4 faces", 5_000_000, "scikit-learn"),
    "hdbscan": Method(_within_components(_hdbscan, 3), "HDBSCAN within components", 300_000, "scikit-learn"),
    "rank-order": Method(_linked("rank_order"), "approximate rank-order distance below 1", ANY),
    "cdp": Method(_cdp, "components, those of more than 300 faces split at rising thresholds", ANY),
    "dpc": Method(_linked("density_peaks"), "density peaks: diffusion density, TPDi distance", ANY),
    "lce": Method(_linked("local_connectivity"), "local-connectivity edges, without training", ANY),
    "spectral": Method(_within_components(_spectral, 4), "within components, by the eigengap", 100_000, "scikit-learn"),
    "minibatch-kmeans": Method(
        _minibatch_kmeans, "k-means of the embeddings, given the number of clusters", 300_000, "scikit-learn", True
    ),
}
