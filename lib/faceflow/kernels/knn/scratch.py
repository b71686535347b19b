"""Large arrays that the tasks of one step use one after the other.

The system takes freed memory back and gives it out as zeros: touching it again costs from 0.1 to 3 s a gigabyte (the latter in
virtual machines that return free memory to their host), which was a fifth of a search of 5M faces.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import DTypeLike

_held: dict[str, np.ndarray] = {}


def array(name: str, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """An array of undefined contents, C-contiguous: the same memory each time, so only one of a name may be in use at once."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if name not in _held or _held[name].nbytes < size:
        _held.pop(name, None)  # before there is another
        _held[name] = np.empty(size, np.uint8)
    return _held[name][:size].view(dtype).reshape(shape)


def forget() -> None:
    """Let the memory go, once no array of it is in use."""
    _held.clear()
