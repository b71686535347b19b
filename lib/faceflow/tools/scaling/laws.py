"""Laws of scaling, fitted to measured times: Amdahl's, Gunther's, and powers of the number of faces."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Amdahl:
    """T(W) = serial + parallel / W, in seconds.

    Reference: Amdahl, Validity of the single processor approach to achieving large scale computing capabilities, 1967.
    """

    serial: float
    parallel: float

    def seconds(self, workers: float) -> float:
        return self.serial + self.parallel / workers

    @property
    def serial_share(self) -> float:
        """Of one worker's time."""
        return self.serial / max(self.serial + self.parallel, 1e-12)


def fit_amdahl(workers: np.ndarray, seconds: np.ndarray) -> Amdahl:
    """Least squares over workers float64[n] and seconds float64[n], neither share below zero.

    With one number of workers nothing can be separated: all is then taken as serial, which promises least.
    """
    if len(np.unique(workers)) < 2:
        return Amdahl(float(np.mean(seconds)), 0.0)
    inverse = 1.0 / workers
    slope, level = np.polyfit(inverse, seconds, 1)
    if slope <= 0:
        return Amdahl(float(np.mean(seconds)), 0.0)
    if level < 0:
        return Amdahl(0.0, float((inverse * seconds).sum() / (inverse**2).sum()))
    return Amdahl(float(level), float(slope))


@dataclass(frozen=True)
class Usl:
    """T(W) = T(1) * (1 + contention * (W - 1) + coherence * W * (W - 1)) / W: the universal scalability law.

    Reference: Gunther, Guerrilla Capacity Planning, 2007, ch. 4.
    """

    first: float
    contention: float
    coherence: float

    def seconds(self, workers: float) -> float:
        delay = self.contention * (workers - 1) + self.coherence * workers * (workers - 1)
        return self.first * (1 + delay) / workers

    @property
    def best_workers(self) -> float:
        """Workers from which on more make it slower; infinite without coherence."""
        return math.sqrt((1 - self.contention) / self.coherence) if self.coherence > 0 else math.inf


def fit_usl(workers: np.ndarray, seconds: np.ndarray) -> Usl | None:
    """Least squares on W * T / T(1) - 1 (Gunther's transform), neither coefficient below zero; None for fewer than three
    numbers of workers, or without a time at one worker."""
    if len(np.unique(workers)) < 3 or workers.min() != 1:
        return None
    first = float(np.mean(seconds[workers == 1]))
    beyond = workers > 1
    w, excess = workers[beyond], workers[beyond] * seconds[beyond] / first - 1
    terms = np.stack([w - 1, w * (w - 1)], axis=1)
    best = np.linalg.lstsq(terms, excess, rcond=None)[0]
    if best.min() < 0:
        alone = [max(0.0, float(term @ excess / (term @ term))) for term in terms.T]
        errors = [float(((term * share - excess) ** 2).sum()) for term, share in zip(terms.T, alone, strict=True)]
        best = np.array([alone[0], 0.0]) if errors[0] <= errors[1] else np.array([0.0, alone[1]])
    return Usl(first, float(best[0]), float(best[1]))


def exponent(faces: np.ndarray, seconds: np.ndarray) -> float | None:
    """b of seconds ~ faces^b, by least squares of the logarithms; None for fewer than two sizes."""
    if len(np.unique(faces)) < 2:
        return None
    return float(np.polyfit(np.log(faces), np.log(np.maximum(seconds, 1e-3)), 1)[0])


def makespan(tasks: int, busy: float, longest: float, workers: int) -> float:
    """Seconds that `tasks` like tasks of `busy` seconds in all, the longest of `longest`, take on so many workers: rounds of
    mean tasks, and never less than the longest."""
    if tasks == 0:
        return 0.0
    return max(longest, busy / tasks * math.ceil(tasks / workers))
