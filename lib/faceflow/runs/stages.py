"""The stages of a run, in their order."""

from __future__ import annotations

from typing import Any

from faceflow.stages.base import Stage
from faceflow.stages.detect import stage as detect
from faceflow.stages.ingest import stage as ingest
from faceflow.stages.link import stage as link
from faceflow.stages.publish import stage as publish
from faceflow.stages.quantize import stage as quantize
from faceflow.stages.search import stage as search
from faceflow.storage import layout

STAGES: tuple[Stage[Any], ...] = (ingest.STAGE, quantize.STAGE, search.STAGE, link.STAGE, detect.STAGE, publish.STAGE)
assert tuple(stage.name for stage in STAGES) == layout.STAGES
