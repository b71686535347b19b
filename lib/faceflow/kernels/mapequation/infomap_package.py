"""Community detection by the `infomap` package (GPL-3.0-or-later): the only module that imports it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from faceflow.errors import RunError
from faceflow.tables import EdgeList, Partition


def _network(edges: Iterable[EdgeList]) -> tuple[Any, int]:
    import infomap

    network, count = infomap.Network(), 0
    for part in edges:
        if len(part.rows):
            links = np.empty((len(part.rows), 3))
            links[:, 0], links[:, 1], links[:, 2] = part.sources(), part.rows, part.values
            network.add_links(links)
            count += len(links)
    return network, count


def score(edges: Iterable[EdgeList], modules: np.ndarray, directed: bool = True) -> float:
    """The package's own codelength of a given partition of the rows, in bits: no search, its flow, its sums."""
    import infomap

    network, count = _network(edges)
    if count == 0:
        return 0.0
    given = dict(enumerate(modules.tolist()))
    result = infomap.run(network, two_level=True, directed=directed, initial_partition=given, no_infomap=True)
    return float(result.codelength)


def detect(edges: Iterable[EdgeList], faces: int, seed: int, trials: int = 1, directed: bool = True) -> Partition:
    """Two-level map equation, by `infomap.run`.

    edges: parts of the edge list, fed as arrays one at a time; faces: N; seed >= 0; trials: the package keeps the best.
    Returns a Partition over all N rows; rows without any edge are modules of their own. Module numbers are arbitrary.
    Source: Rosvall, Axelsson, Bergstrom, "The map equation", Eur. Phys. J. Special Topics 178 (2009).
    """
    import infomap

    network, count = _network(edges)
    modules = np.full(faces, -1, np.int64)
    codelength = 0.0
    if count:
        result = infomap.run(network, two_level=True, directed=directed, num_trials=trials, seed=seed + 1)
        results = result.modules()
        modules[np.fromiter(results.keys(), np.int64, len(results))] = np.fromiter(results.values(), np.int64, len(results))
        codelength = float(result.codelength)
        if not np.isfinite(codelength):
            raise RunError(f"infomap returned a codelength of {codelength}: the edge weights are out of range")
    alone = modules < 0
    modules[alone] = modules.max(initial=-1) + 1 + np.arange(int(alone.sum()))
    return Partition(modules, codelength)
