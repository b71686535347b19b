"""Imposes constraints on modules: must-link and cannot-link pairs of the user's file, and faces of one photo."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from faceflow.kernels.clusters import constraints
from faceflow.setting_types import StorageOptions
from faceflow.stages import constraints_file
from faceflow.stages.artifacts.faces import RunData, good_entries, read_ids, read_quarantined
from faceflow.storage import layout


def keep_apart(
    data: RunData, modules: np.ndarray, fixed: np.ndarray, edges: Callable[[np.ndarray], constraints.Edges]
) -> tuple[np.ndarray, int, int]:
    """The modules with faces of one photo set apart (`kernels.clusters.constraints.separate`), and how many were, and could not
    be."""
    run, parts = data.store, data.parts
    photos = []
    for part in range(len(parts)):
        results = run.read_batch(layout.part("origins", part)).column("photo").to_numpy()
        photos.append(results[good_entries(read_quarantined(run, part), len(results))])
    modules, moved, stayed = constraints.separate(modules, np.concatenate(photos), fixed, edges)
    return modules, moved, stayed


def impose(
    data: RunData,
    address: str,
    options: StorageOptions | None,
    modules: np.ndarray,
    edges: Callable[[np.ndarray], constraints.Edges],
) -> tuple[np.ndarray, np.ndarray, int, int]:
    """The modules with the constraints imposed, the faces that they name (bool[N]), how many there were, and how many more name
    an id that is absent: those bind nothing.

    edges: as `kernels.clusters.constraints.impose`.
    """
    run, parts = data.store, data.parts
    pairs = constraints_file.read(address, options, read_ids(run, 0).type)
    rows = np.full(len(pairs.ids), -1, np.int64)
    for part in range(len(parts)):
        ids = read_ids(run, part)
        good = good_entries(read_quarantined(run, part), len(ids))
        at = pc.index_in(ids.filter(pa.array(good)), value_set=pairs.ids)
        selected = np.flatnonzero(at.is_valid().to_numpy(zero_copy_only=False))
        rows[at.drop_null().to_numpy()] = parts.starts[part] + selected
    target = np.flatnonzero(rows >= 0)
    number = np.full(len(rows), -1, np.int64)
    number[target] = np.arange(len(target))
    # A chain holds although a face in its middle is gone.
    group = constraints.must_groups(len(rows), pairs.must)
    first: dict[int, int] = {}
    must = np.array([[first.setdefault(int(group[i]), int(number[i])), number[i]] for i in target], np.int64).reshape(-1, 2)
    must = must[must[:, 0] != must[:, 1]]
    cannot = number[pairs.cannot]
    cannot = cannot[(cannot >= 0).all(axis=1)]
    bound = int((rows[pairs.must] >= 0).all(axis=1).sum()) + len(cannot)
    results = constraints.impose(modules, rows[target], must, cannot, edges)
    named = np.zeros(len(modules), bool)
    named[rows[target]] = True
    return results, named, bound, len(pairs.must) + len(pairs.cannot) - bound
