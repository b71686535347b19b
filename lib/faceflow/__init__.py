"""faceflow: clusters millions of face embeddings. `ClusterConfig` holds the settings, `run_clustering` does the work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from faceflow.api import run_clustering as run_clustering
    from faceflow.api import run_nightly as run_nightly
    from faceflow.config import ClusterConfig as ClusterConfig
    from faceflow.kernels.mapequation.two_level import map_equation as map_equation
    from faceflow.runs.result import RunResult as RunResult

__version__ = "0.4.0"
__all__ = ["ClusterConfig", "RunResult", "map_equation", "run_clustering", "run_nightly"]

_HOMES = {
    "ClusterConfig": "faceflow.config",
    "RunResult": "faceflow.runs.result",
    "map_equation": "faceflow.kernels.mapequation.two_level",
    "run_clustering": "faceflow.api",
    "run_nightly": "faceflow.api",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that a worker that needs one kernel does not import the whole pipeline.
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'faceflow' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
