"""The job against an S3 that fails: what passes is waited out, with the same labels; what does not is said at once."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from faceflow import ClusterConfig, run_clustering
from faceflow.cli.main import main
from faceflow.storage.object_store import Store
from tests.conftest import S3, free_port, write_faces
from tests.s3_faults import KINDS, FaultyS3


def labels(s3: S3, prefix: str) -> pa.Table:
    fs = s3fs.S3FileSystem(**s3.options, use_listings_cache=False)
    pointer = json.loads(fs.cat_file(f"faces/{prefix}/latest.json"))
    files = sorted(fs.ls(f"faces/{prefix}/{pointer['labels']}", detail=False))
    return pa.concat_tables([pq.read_table(fs.open(f)) for f in files])


SETTINGS: dict[str, Any] = {"min_similarity": 0.5, "neighbors": 20, "index": "cells", "cells": 24}


@pytest.fixture(scope="module")
def calm(s3: S3, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """Faces at s3://faces/in, and their labels by a run that nothing disturbed."""
    rng = np.random.default_rng(0)
    x = np.repeat(rng.standard_normal((60, 48)), 40, axis=0) + 0.3 * rng.standard_normal((2400, 48))
    fs = s3fs.S3FileSystem(**s3.options)
    for i in range(4):
        path = tmp_path_factory.mktemp("faces") / f"{i}.parquet"
        write_faces(path, x[i::4].astype(np.float32), pa.array([f"{j}" for j in range(i, len(x), 4)]))
        fs.put_file(str(path), f"faces/in/{i}.parquet")
    run_clustering(
        ClusterConfig("s3://faces/in", "s3://faces/calm", storage_options=s3.options, **SETTINGS), progress=False, report=False
    )
    return labels(s3, "calm")


@pytest.mark.timeout(400)
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("kind", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS), "all"])
def test_labels_survive_an_s3_that_fails(s3: S3, calm: pa.Table, kind: str) -> None:
    kinds, stalls = (KINDS, 1) if kind == "all" else ((kind,), 5)
    with FaultyS3(s3.endpoint, rate=0.08, seed=3, kinds=kinds, stalls=stalls) as proxy:
        faulty = s3.options | {"endpoint_url": proxy.endpoint}
        config = ClusterConfig("s3://faces/in", f"s3://faces/out-{kind}", storage_options=faulty, **SETTINGS)
        run_clustering(config, progress=False, report=False)
    assert labels(s3, f"out-{kind}").equals(calm)
    assert proxy.counts[kind] > 0 if kind != "all" else len(proxy.counts) >= 5, proxy.counts
    assert proxy.requests > 100


def test_an_answer_that_is_lost_does_not_lose_the_race(s3: S3) -> None:
    """The conditional put of the pointer arrives, its answer does not; the repeated put must not take itself for a rival."""
    with FaultyS3(s3.endpoint, rate=0.5, seed=1, kinds=("lost_answer",)) as proxy:
        store = Store.at("s3://faces/pointer", s3.options | {"endpoint_url": proxy.endpoint})
        for i in range(8):
            store.replace_json("latest.json", {"run_id": i}, store.version("latest.json"))
            assert store.read_json("latest.json") == {"run_id": i}
    assert proxy.counts["lost_answer"] > 4


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        ("ExpiredToken", 400, "The provided token has expired."),
        ("AccessDenied", 403, "Access Denied"),
        ("InvalidAccessKeyId", 403, "Please try again."),
    ],
)
def test_permanent_denial_is_said_within_seconds(
    s3: S3, capsys: pytest.CaptureFixture[str], code: str, status: int, message: str
) -> None:
    with FaultyS3(s3.endpoint) as proxy:
        proxy.deny = (code, status)
        options = json.dumps(s3.options | {"endpoint_url": proxy.endpoint})
        begun = time.monotonic()
        assert main(["cluster", "s3://faces/in", "s3://faces/out", "--storage-options", options, "--quiet"]) == 2
        assert time.monotonic() - begun < 10
    said = capsys.readouterr().err
    advice = "check the credentials (AWS_* environment, profile, instance role or --storage-options) and what they allow"
    assert said == f"error: cannot read input s3://faces/in: {message}; {advice}\n"
    assert s3.options["secret"] not in said


def test_an_endpoint_that_is_not_there_is_said_within_seconds(s3: S3, capsys: pytest.CaptureFixture[str]) -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    begun = time.monotonic()
    options = json.dumps(s3.options | {"endpoint_url": endpoint})
    assert main(["cluster", "s3://faces/in", "s3://faces/out", "--storage-options", options, "--quiet"]) == 2
    assert time.monotonic() - begun < 10
    reason = f"the S3 endpoint {endpoint} does not answer (Connection refused); check endpoint_url"
    assert capsys.readouterr().err == f"error: cannot read s3://faces/in: {reason}\n"


@pytest.mark.usefixtures("ray_session")
def test_credentials_that_expire_on_the_way_end_the_run_which_then_continues(
    s3: S3, calm: pa.Table, capsys: pytest.CaptureFixture[str]
) -> None:
    with FaultyS3(s3.endpoint) as proxy:
        options = json.dumps(s3.options | {"endpoint_url": proxy.endpoint})
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in SETTINGS.items()]
        command = ["cluster", "s3://faces/in", "s3://faces/expired", "--storage-options", options, *flags]
        proxy.deny, proxy.deny_from = ("ExpiredToken", 400), "/neighbors/part-00000.arrow"
        begun = time.monotonic()
        assert main([*command, "--quiet"]) == 3
        assert time.monotonic() - begun < 30
        said = capsys.readouterr().err
        assert "expired" in said
        assert "what is finished is kept, and the same command continues" in said
        proxy.deny = None
        assert main([*command, "--quiet"]) == 0
    assert labels(s3, "expired").equals(calm)
