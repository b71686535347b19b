"""Constraints between faces, imposed on modules: must-linked faces share one, cannot-linked faces never do."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

from faceflow.errors import InputError

ROUNDS = 50
"""Most rounds in which the faces of a module that must be split choose a side; each takes in the neighbors of the last."""

Edges = tuple[np.ndarray, np.ndarray, np.ndarray]
"""(sources int64[m], targets int64[m], weights float[m])."""


def must_groups(faces: int, must: np.ndarray) -> np.ndarray:
    """int64[faces]: the group of each face, faces that `must` (int64[m, 2]) links directly or by a chain in one; a group is
    named by its first face."""
    group = np.arange(faces)
    for a, b in must.tolist():
        while group[a] != a:
            group[a] = a = int(group[group[a]])
        while group[b] != b:
            group[b] = b = int(group[group[b]])
        group[max(a, b)] = min(a, b)
    while True:
        up = group[group]
        if np.array_equal(up, group):
            return group
        group = up


def chain(must: np.ndarray, a: int, b: int) -> list[int]:
    """The shortest chain of must-links from face a to face b, both included."""
    links: dict[int, list[int]] = {}
    for x, y in must.tolist():
        links.setdefault(x, []).append(y)
        links.setdefault(y, []).append(x)
    came, front = {a: a}, [a]
    while front and b not in came:
        reached = [(x, y) for x in front for y in sorted(links.get(x, [])) if y not in came]
        front = []
        for x, y in reached:
            if y not in came:
                came[y] = x
                front.append(y)
    path = [b]
    while path[-1] != a:
        path.append(came[path[-1]])
    return path[::-1]


def check(must: np.ndarray, cannot: np.ndarray, faces: int, name: Callable[[int], str]) -> np.ndarray:
    """The groups of `must_groups`. Raises InputError, with the chain of links, where two faces must and cannot be together.

    must, cannot: int64[m, 2], pairs of faces 0..faces-1; name: what to call a face in a message.
    """
    group = must_groups(faces, must)
    for a, b in cannot.tolist():
        if group[a] == group[b]:
            path = [name(face) for face in chain(must, a, b)]
            links = "; ".join(f"{x} must be with {y}" for x, y in zip(path[:-1], path[1:], strict=True))
            said = f"{links}; but {path[0]} cannot be with {path[-1]}" if links else f"{path[0]} cannot be with itself"
            raise InputError(f"constraints contradict each other: {said}")
    return group


def impose(
    modules: np.ndarray, rows: np.ndarray, must: np.ndarray, cannot: np.ndarray, edges: Callable[[np.ndarray], Edges]
) -> np.ndarray:
    """Modules, int64[N], in which every must-linked pair shares one and no cannot-linked pair does.

    modules: int64[N], any numbers below 2**31; rows: int64[f], the rows of the faces that constraints name; must, cannot:
    int64[m, 2], pairs of indices into rows, without contradiction (`check`); edges: gives all edges between rows of which
    the mask bool[N] holds. Modules that a must-link connects become one. One that holds a cannot-linked pair is then split:
    the linked faces, with their groups, take sides, and each other face follows the side to which its edges weigh most; a face
    that no edge connects to a side stays with the first. All other modules stay as they are.
    """
    modules = modules.copy()
    merged = must_groups(int(modules.max(initial=-1)) + 1, modules[rows[must]]) if len(must) else None
    if merged is not None:
        modules = merged[modules]
    group = must_groups(len(rows), must)
    torn = modules[rows[cannot[:, 0]]] == modules[rows[cannot[:, 1]]] if len(cannot) else np.empty(0, bool)
    if not torn.any():
        return modules
    broken = np.unique(modules[rows[cannot[torn, 0]]])
    mask = np.isin(modules, broken)
    sides = _sides(modules[rows], group, group[cannot[torn]], broken)
    side = np.full(len(modules), -1, np.int64)
    side[rows] = np.where(np.isin(modules[rows], broken), sides, -1)
    # The faces of a group go together: one of them stands for all.
    unit = np.arange(len(modules))
    unit[rows] = rows[group]
    sources, targets, weights = edges(mask)
    side = _follow(side, modules, unit[sources], unit[targets], weights)[unit]
    side[mask & (side < 0)] = 0
    fresh = int(modules.max()) + 1
    moved = np.flatnonzero(mask & (side > 0))
    pairs = modules[moved] * (int(side.max()) + 1) + side[moved]
    modules[moved] = fresh + np.unique(pairs, return_inverse=True)[1]
    return modules


def _sides(module: np.ndarray, group: np.ndarray, apart: np.ndarray, broken: np.ndarray) -> np.ndarray:
    """int64[f]: the side of each constrained face within its module, -1 for one without a cannot-link there. Groups are taken
    by falling size, ties by first face, and each takes the first side without a face that it cannot be with."""
    enemies: dict[int, set[int]] = {}
    for a, b in apart.tolist():
        enemies.setdefault(a, set()).add(b)
        enemies.setdefault(b, set()).add(a)
    sizes = np.bincount(group, minlength=len(group))
    chosen: dict[int, int] = {}
    for g in sorted(enemies, key=lambda g: (-int(sizes[g]), g)):
        taken = {chosen[e] for e in enemies[g] if e in chosen}
        chosen[g] = next(s for s in range(len(taken) + 1) if s not in taken)
    return np.array([chosen.get(int(g), -1) for g in group], np.int64)


def _follow(side: np.ndarray, modules: np.ndarray, sources: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    inside = modules[sources] == modules[targets]
    a = np.concatenate([sources[inside], targets[inside]])
    b = np.concatenate([targets[inside], sources[inside]])
    w = np.concatenate([weights[inside], weights[inside]]).astype(np.float64)
    for _ in range(ROUNDS):
        open_ = (side[a] < 0) & (side[b] >= 0)
        if not open_.any():
            break
        width = int(side.max()) + 1
        keys, at = np.unique(a[open_] * width + side[b[open_]], return_inverse=True)
        total = np.bincount(at, w[open_])
        face, choice = keys // width, keys % width
        best = np.lexsort((choice, -total, face))
        first = best[np.unique(face[best], return_index=True)[1]]
        side = side.copy()
        side[face[first]] = choice[first]
    return side


def separate(
    modules: np.ndarray, photos: np.ndarray, fixed: np.ndarray, edges: Callable[[np.ndarray], Edges]
) -> tuple[np.ndarray, int, int]:
    """Modules in which two faces of one photo share a module only where a constraint holds them there.

    modules: int64[N]; photos: uint64[N], equal for faces of one photo, 0 for none; fixed: bool[N], faces that may not be
    moved; edges: gives all edges with an end at a row of which the mask bool[N] holds. Of the faces of one photo in one
    module, the one stays to which its edges there weigh most, ties to the first row, and each other one moves to the module
    to which its edges weigh most among those that hold no face of the photo, else to one of its own.
    Returns (modules, faces moved, faces that had to stay).
    """
    order = np.lexsort((np.arange(len(modules)), modules, photos))
    same = (photos[order][1:] == photos[order][:-1]) & (modules[order][1:] == modules[order][:-1]) & (photos[order][1:] != 0)
    crowded = np.zeros(len(modules), bool)
    crowded[order[1:][same]] = crowded[order[:-1][same]] = True
    if not crowded.any():
        return modules, 0, 0
    modules = modules.copy()
    pulls = _Pulls(crowded, modules, *edges(crowded))
    held = _Held(modules, photos, np.unique(photos[crowded]))
    rows = np.flatnonzero(crowded)
    rows = rows[np.lexsort((rows, photos[rows], modules[rows]))]
    new = (modules[rows][1:] != modules[rows][:-1]) | (photos[rows][1:] != photos[rows][:-1])
    cuts = [0, *(np.flatnonzero(new) + 1).tolist(), len(rows)]
    fresh, moved, stayed = int(modules.max()) + 1, 0, 0
    for begin, end in itertools.pairwise(cuts):
        group = rows[begin:end].tolist()
        module, photo = int(modules[group[0]]), int(photos[group[0]])
        ranked = sorted(group, key=lambda row: (not fixed[row], -pulls.of(row).get(module, 0.0), row))
        for row in ranked[1:]:
            if fixed[row]:
                stayed += 1
                continue
            others = sorted((-weight, m) for m, weight in pulls.of(row).items() if m != module and not held.has(m, photo))
            target, fresh = (others[0][1], fresh) if others else (fresh, fresh + 1)
            modules[row] = target
            held.add(target, photo)
            moved += 1
    return modules, moved, stayed


class _Held:
    """Which modules hold a face of which photo: arrays for what was there, of these photos only, and a set of what came
    since."""

    def __init__(self, modules: np.ndarray, photos: np.ndarray, chosen: np.ndarray) -> None:
        self._chosen, self._width = chosen, int(modules.max(initial=-1)) + 1
        at = np.searchsorted(chosen, photos).clip(max=len(chosen) - 1)
        selected = chosen[at] == photos
        self._keys = np.unique(at[selected] * self._width + modules[selected])
        self._added: set[tuple[int, int]] = set()

    def has(self, module: int, photo: int) -> bool:
        if (module, photo) in self._added:
            return True
        if module >= self._width:
            return False
        key = int(np.searchsorted(self._chosen, np.uint64(photo))) * self._width + module
        at = int(np.searchsorted(self._keys, key))
        return at < len(self._keys) and int(self._keys[at]) == key

    def add(self, module: int, photo: int) -> None:
        self._added.add((module, photo))


class _Pulls:
    """For each row that the mask holds, the weight of its edges, either way, to each module."""

    def __init__(
        self, mask: np.ndarray, modules: np.ndarray, sources: np.ndarray, targets: np.ndarray, weights: np.ndarray
    ) -> None:
        self._rows, width = np.flatnonzero(mask), int(modules.max(initial=-1)) + 1
        keys, weight = [], []
        for ends, others in ((sources, targets), (targets, sources)):
            selected = mask[ends]
            keys.append(np.searchsorted(self._rows, ends[selected]) * width + modules[others[selected]])
            weight.append(weights[selected].astype(np.float64))
        pairs, at = np.unique(np.concatenate(keys), return_inverse=True)
        self._modules, self._weights = pairs % width, np.bincount(at, np.concatenate(weight), minlength=len(pairs))
        self._starts = np.searchsorted(pairs, np.arange(len(self._rows) + 1) * width)

    def of(self, row: int) -> dict[int, float]:
        at = int(np.searchsorted(self._rows, row))
        selected = slice(self._starts[at], self._starts[at + 1])
        return dict(zip(self._modules[selected].tolist(), self._weights[selected].tolist(), strict=True))
