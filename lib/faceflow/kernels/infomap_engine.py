"""Community detection by the `infomap` package (GPL-3.0-or-later): the only module that imports it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from faceflow.errors import RunError
from faceflow.tables import EdgeList, Partition


def detect(edges: Iterable[EdgeList], faces: int, seed: int) -> Partition:
    """Two-level map equation on directed flow, by `infomap.run` (one trial).

    edges: parts of the edge list, fed as arrays one at a time; faces: N; seed >= 0.
    Returns a Partition over all N rows; rows without any edge are modules of their own. Module numbers are arbitrary.
    Source: Rosvall, Axelsson, Bergstrom, "The map equation", Eur. Phys. J. Special Topics 178 (2009).
    """
    import infomap

    network = infomap.Network()
    count = 0
    for part in edges:
        if len(part.rows):
            links = np.empty((len(part.rows), 3))
            links[:, 0], links[:, 1], links[:, 2] = part.sources(), part.rows, part.values
            network.add_links(links)
            count += len(links)
    modules = np.full(faces, -1, np.int64)
    codelength = 0.0
    if count:
        result = infomap.run(network, two_level=True, directed=True, num_trials=1, seed=seed + 1)
        found = result.modules()
        modules[np.fromiter(found.keys(), np.int64, len(found))] = np.fromiter(found.values(), np.int64, len(found))
        codelength = float(result.codelength)
        if not np.isfinite(codelength):
            raise RunError(f"infomap returned a codelength of {codelength}: the edge weights are out of range")
    alone = modules < 0
    modules[alone] = modules.max(initial=-1) + 1 + np.arange(int(alone.sum()))
    return Partition(modules, codelength)
