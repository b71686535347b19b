"""Synthetic faces: unit vectors that cluster the way embeddings of photographed people do."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Faces an identity in MS-Celeb-1M part 1, the field's benchmark: mean 68.5, standard deviation 40.6. A gamma law of that
# ratio has shape (mean / deviation)^2.
SIZE_SHAPE = (68.5 / 40.6) ** 2

FAMILY_SHARE, FAMILY_SIZE = 0.3, 4
"""Share of identities that have look-alikes, and identities in such a family."""

QUALITY_MEAN, QUALITY_SPREAD = 0.85, 0.06
"""A face's cosine to its identity's centre: most photos are good, some are bad (a beta law)."""


@dataclass(frozen=True)
class World:
    """The identities of one synthetic set: labels int32[N] in face order, centres float32[I, d], unit rows."""

    labels: np.ndarray
    centers: np.ndarray
    seed: int


def _unit(x: np.ndarray) -> np.ndarray:
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    return x


def draw_sizes(faces: int, mean_size: float, rng: np.random.Generator) -> np.ndarray:
    """Sizes int64[I] of identities, gamma-distributed with the given mean, at least 1, that add up to `faces`."""
    sizes: list[np.ndarray] = []
    total = 0
    while total < faces:
        draw = rng.gamma(SIZE_SHAPE, mean_size / SIZE_SHAPE, 65_536)
        sizes.append(np.maximum(1, np.rint(draw)).astype(np.int64))
        total += int(sizes[-1].sum())
    return _cut(np.concatenate(sizes), faces)


def sizes_like(cluster_size: np.ndarray, clusters: np.ndarray, faces: int, rng: np.random.Generator) -> np.ndarray:
    """Sizes int64[I] drawn from a given distribution: `clusters[i]` identities have `cluster_size[i]` faces."""
    share = clusters / clusters.sum()
    mean = float((share * cluster_size).sum())
    sizes = np.empty(0, np.int64)
    while sizes.sum() < faces:
        draw = rng.choice(cluster_size, int(faces / mean) + 1024, p=share).astype(np.int64)
        sizes = np.concatenate([sizes, draw])
    return _cut(sizes, faces)


def _cut(sizes: np.ndarray, faces: int) -> np.ndarray:
    ends = np.cumsum(sizes)
    last = int(np.searchsorted(ends, faces))
    sizes = sizes[: last + 1].copy()
    sizes[-1] -= ends[last] - faces
    return sizes


def make_world(sizes: np.ndarray, dim: int, seed: int) -> World:
    """Centres and labels for identities of the given sizes; faces come in random order."""
    rng = np.random.default_rng([seed, 1])
    identities = len(sizes)
    centers = _unit(rng.standard_normal((identities, dim), dtype=np.float32))
    # The first identities form families: each mixes its own direction with the family's.
    related = int(identities * FAMILY_SHARE) // FAMILY_SIZE * FAMILY_SIZE
    base = _unit(rng.standard_normal((related // FAMILY_SIZE, dim), dtype=np.float32))
    likeness = rng.uniform(0.4, 0.95, related).astype(np.float32)[:, None]
    own = centers[:related] * np.sqrt(1 - likeness**2)
    centers[:related] = _unit(np.repeat(base, FAMILY_SIZE, axis=0) * likeness + own)
    labels = np.repeat(np.arange(identities, dtype=np.int32), sizes)
    rng.shuffle(labels)
    return World(labels, centers, seed)


def make_faces(world: World, begin: int, end: int) -> np.ndarray:
    """Embeddings float32[end - begin, d] of faces begin..end-1, unit rows; depends on the seed and `begin` alone."""
    rng = np.random.default_rng([world.seed, 2, begin])
    n, dim = end - begin, world.centers.shape[1]
    spread = QUALITY_MEAN * (1 - QUALITY_MEAN) / QUALITY_SPREAD**2 - 1
    quality = rng.beta(QUALITY_MEAN * spread, (1 - QUALITY_MEAN) * spread, n).astype(np.float32)[:, None]
    noise = _unit(rng.standard_normal((n, dim), dtype=np.float32))
    noise *= np.sqrt(1 - quality**2)
    noise += world.centers[world.labels[begin:end]] * quality
    return _unit(noise)
