"""Agreement of a clustering with known identities, all from one sparse contingency table."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Scores:
    """How well clusters agree with identities; every score is 1.0 for equal partitions.

    pairwise: over pairs of faces, "same cluster" against "same identity" (Amigó et al. 2009 call it pair counting);
    bcubed: per-face precision and recall, averaged (Bagga & Baldwin 1998; Amigó et al., Information Retrieval 12, 2009);
    nmi: mutual information over the arithmetic mean of the entropies; ari: Hubert & Arabie, J. Classification 2 (1985).
    """

    pairwise_precision: float
    pairwise_recall: float
    pairwise_f: float
    bcubed_precision: float
    bcubed_recall: float
    bcubed_f: float
    nmi: float
    ari: float
    faces: int
    clusters: int
    singletons: int
    identities: int


def _harmonic(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b > 0 else 0.0


def _pairs(counts: np.ndarray) -> int:
    # Exact: n(n-1)/2 of an int64 count below 2^31 fits, and the sum is taken in Python integers where it might not.
    products = counts * (counts - 1) // 2
    return int(products.sum()) if counts.sum() < 2**31 else sum(int(p) for p in products)


def _entropy(counts: np.ndarray, n: int) -> float:
    p = counts / n
    return float(-(p * np.log(p)).sum())


def score(clusters: np.ndarray, identities: np.ndarray) -> Scores:
    """Scores of `clusters` against `identities`.

    clusters, identities: int64[N] codes 0..C-1 and 0..I-1, dense (every code occurs).
    With no pair in the same cluster, pairwise precision is 1 (nothing claimed is wrong); likewise recall without a pair
    of one identity. NMI of two partitions into one part each, or into N parts each, is 1, as in scikit-learn.
    """
    n = len(clusters)
    if n == 0:
        return Scores(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0, 0, 0, 0)
    cluster_sizes = np.bincount(clusters).astype(np.int64)
    identity_sizes = np.bincount(identities).astype(np.int64)
    cells, joint = np.unique(clusters.astype(np.int64) * len(identity_sizes) + identities, return_counts=True)
    joint = joint.astype(np.int64)
    row, column = cells // len(identity_sizes), cells % len(identity_sizes)

    both, claimed, real = _pairs(joint), _pairs(cluster_sizes), _pairs(identity_sizes)
    precision = both / claimed if claimed else 1.0
    recall = both / real if real else 1.0
    squares = joint.astype(np.float64) ** 2
    b_precision = float((squares / cluster_sizes[row]).sum() / n)
    b_recall = float((squares / identity_sizes[column]).sum() / n)

    h_clusters, h_identities = _entropy(cluster_sizes, n), _entropy(identity_sizes, n)
    share = joint / n
    mutual = float((share * (np.log(share) - np.log(cluster_sizes[row] / n) - np.log(identity_sizes[column] / n))).sum())
    mean_entropy = (h_clusters + h_identities) / 2
    nmi = max(mutual, 0.0) / mean_entropy if mean_entropy > 0 else 1.0

    # As pair confusion counts: exact integers until the last division.
    false_positive, false_negative = claimed - both, real - both
    true_negative = n * (n - 1) // 2 - both - false_positive - false_negative
    if false_positive == 0 and false_negative == 0:
        ari = 1.0
    else:
        top = 2 * (both * true_negative - false_negative * false_positive)
        bottom = (both + false_negative) * (false_negative + true_negative)
        bottom += (both + false_positive) * (false_positive + true_negative)
        ari = top / bottom
    return Scores(
        precision, recall, _harmonic(precision, recall),
        b_precision, b_recall, _harmonic(b_precision, b_recall),
        min(nmi, 1.0), ari,
        n, len(cluster_sizes), int((cluster_sizes == 1).sum()), len(identity_sizes),
    )  # fmt: skip
