"""Cluster a Parquet data set: `ray job submit -- python jobs/cluster.py INPUT OUTPUT`. Everything is in faceflow.cli."""

import sys
from pathlib import Path

# Found beside this file, so that a job submitted with this repository as its working directory needs no installation.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))

from faceflow.cli.main import main

sys.exit(main(["cluster", *sys.argv[1:]]))
