"""faceflow: clusters millions of face embeddings. `ClusterConfig` holds the settings, `run_clustering` does the work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from faceflow.config import ClusterConfig as ClusterConfig
    from faceflow.kernels.mapequation import map_equation as map_equation
    from faceflow.pipeline import RunResult as RunResult
    from faceflow.pipeline import run_clustering as run_clustering
    from faceflow.pipeline import run_nightly as run_nightly

__version__ = "0.3.0"
__all__ = ["ClusterConfig", "RunResult", "map_equation", "run_clustering", "run_nightly"]

_HOMES = {
    "ClusterConfig": "faceflow.config",
    "RunResult": "faceflow.pipeline",
    "map_equation": "faceflow.kernels.mapequation",
    "run_clustering": "faceflow.pipeline",
    "run_nightly": "faceflow.pipeline",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that a worker that needs one kernel does not import the whole pipeline.
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'faceflow' has no attribute {name!r}")
