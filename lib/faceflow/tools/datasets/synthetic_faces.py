"""Synthetic faces: unit vectors that cluster the way embeddings of photographed people do."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Faces an identity in MS-Celeb-1M part 1, the field's benchmark: mean 68.5, standard deviation 40.6. A gamma law of that
# ratio has shape (mean / deviation)^2.
SIZE_SHAPE = (68.5 / 40.6) ** 2

FAMILY_SIZE = 4
"""Identities in a family of look-alikes."""


@dataclass(frozen=True)
class Look:
    """How alike faces are.

    dimensions: participation ratio of the centres' spectrum, which falls as a power (None: as many as there are): the
    lower, the nearer the nearest stranger, and the more so the more people there are; family_share: share of identities in
    families;
    likeness: range of cosines between a centre and its family's; quality, spread: mean and deviation of a face's cosine to its
    centre (a beta law); identity_spread: deviation of the mean between identities; poor_share, poor: share of faces that are
    poor, and the range of their cosine; wrong_labels: share of faces whose label is another's.
    """

    dimensions: float | None = None
    family_share: float = 0.3
    likeness: tuple[float, float] = (0.4, 0.95)
    quality: float = 0.85
    spread: float = 0.06
    identity_spread: float = 0.0
    poor_share: float = 0.0
    poor: tuple[float, float] = (0.3, 0.8)
    wrong_labels: float = 0.0


LOOKS = {
    "plain": Look(),
    # Calibrated at 584,000 faces on what is published for MS-Celeb-1M part 1: see the README.
    "ms1m": Look(
        dimensions=30, family_share=0.15, likeness=(0.5, 0.95), quality=0.91, spread=0.05, identity_spread=0.03,
        poor_share=0.05, wrong_labels=0.01,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class World:
    """The identities of one synthetic set: labels int32[N] in face order as given, true int32[N] as they are, centres
    float32[I, d], unit rows, quality float32[I], the mean cosine of an identity's faces to its centre."""

    labels: np.ndarray
    true: np.ndarray
    centers: np.ndarray
    quality: np.ndarray
    look: Look
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


def spectrum(dim: int, dimensions: float | None) -> np.ndarray:
    """Standard deviations float32[dim], mean square 1, of a power law whose variances have that participation ratio (the
    square of their sum over the sum of their squares)."""
    if dimensions is None or dimensions >= dim:
        return np.ones(dim, np.float32)
    low, high = 0.0, 4.0
    variances = np.ones(dim)
    for _ in range(60):
        power = (low + high) / 2
        variances = np.arange(1.0, dim + 1) ** -power
        ratio = variances.sum() ** 2 / (variances**2).sum()
        low, high = (power, high) if ratio > dimensions else (low, power)
    return np.sqrt(variances / variances.mean()).astype(np.float32)


def make_world(sizes: np.ndarray, dim: int, seed: int, look: Look = LOOKS["plain"]) -> World:
    """Centres and labels for identities of the given sizes; faces come in random order."""
    rng = np.random.default_rng([seed, 1])
    identities, shape = len(sizes), spectrum(dim, look.dimensions)
    centers = _unit(rng.standard_normal((identities, dim), dtype=np.float32) * shape)
    # The first identities form families: each mixes its own direction with the family's.
    related = int(identities * look.family_share) // FAMILY_SIZE * FAMILY_SIZE
    base = _unit(rng.standard_normal((related // FAMILY_SIZE, dim), dtype=np.float32) * shape)
    likeness = rng.uniform(*look.likeness, related).astype(np.float32)[:, None]
    own = centers[:related] * np.sqrt(1 - likeness**2)
    centers[:related] = _unit(np.repeat(base, FAMILY_SIZE, axis=0) * likeness + own)
    labels = np.repeat(np.arange(identities, dtype=np.int32), sizes)
    rng.shuffle(labels)
    quality = np.full(identities, look.quality)
    if look.identity_spread:
        quality = np.clip(rng.normal(look.quality, look.identity_spread, identities), 0.5, 0.97)
    noisy = labels.copy()
    if look.wrong_labels:
        wrong = rng.random(len(labels)) < look.wrong_labels
        noisy[wrong] = rng.integers(0, identities, int(wrong.sum()))
    return World(noisy, labels, centers, quality, look, seed)


def make_faces(world: World, begin: int, end: int) -> np.ndarray:
    """Embeddings float32[end - begin, d] of faces begin..end-1, unit rows; depends on the seed and `begin` alone."""
    rng = np.random.default_rng([world.seed, 2, begin])
    n, dim = end - begin, world.centers.shape[1]
    identity, look = world.true[begin:end], world.look
    mean = world.quality[identity]
    spread = mean * (1 - mean) / look.spread**2 - 1
    quality = rng.beta(mean * spread, (1 - mean) * spread).astype(np.float32)[:, None]
    noise = _unit(rng.standard_normal((n, dim), dtype=np.float32))
    if look.poor_share:
        poor = rng.random(n) < look.poor_share
        quality[poor, 0] = rng.uniform(*look.poor, int(poor.sum()))
    noise *= np.sqrt(1 - quality**2)
    noise += world.centers[identity] * quality
    return _unit(noise)
