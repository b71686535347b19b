"""A Ray cluster of three hosts with addresses of their own and an S3 server on a fourth, one host cut off in mid-search."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from faceflow.storage.object_store import Store
from faceflow.tools.datasets.synthesize import synthesize
from tests.conftest import ROOT, S3, serve_s3
from tests.integration.clusters import clean_environment
from tests.integration.hosts import Hosts, hosts

PORT = 6399
# Ray gives up on a silent machine after a minute or so; a test need not wait that long.
IMPATIENT = {
    "RAY_health_check_initial_delay_ms": "1000", "RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
}  # fmt: skip

PINGS = {"RAY_grpc_client_keepalive_time_ms": "8000", "RAY_grpc_client_keepalive_timeout_ms": "8000"}


@pytest.fixture(scope="module")
def lan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hosts, S3]]:
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(hosts(["storage", "head", "first", "second"]))
        s3 = stack.enter_context(
            serve_s3(tmp_path_factory.mktemp("s3"), made.address("storage"), made.prefix("storage"))
        )  # fmt: skip
        board = "--dashboard-host=127.0.0.1"
        made.ray("head", "--head", f"--port={PORT}", "--num-cpus=1", '--resources={"head_only": 1}', board, **IMPATIENT)
        made.wait_for("head", PORT)
        # One after the other: the hosts share a disk, and two that start at once take one name for their sockets.
        for number, host in enumerate(("first", "second"), 2):
            made.ray(host, f"--address={made.address('head')}:{PORT}", "--num-cpus=1", '--resources={"search_only": 1}')
            wait_for_nodes(made, number)
        yield made, s3


def job(lan: tuple[Hosts, S3], *arguments: str) -> subprocess.Popen[str]:
    made, s3 = lan
    command = [sys.executable, str(ROOT / "jobs" / "cluster.py"), *arguments, "--address", f"{made.address('head')}:{PORT}"]
    return subprocess.Popen(
        [*made.prefix("head"), *command, "--storage-options", json.dumps(s3.options)], env=clean_environment(**PINGS),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_nodes(made: Hosts, wanted: int) -> None:
    script = (
        f"import ray, time; ray.init('{made.address('head')}:{PORT}', logging_level='ERROR')\n"
        f"while len(ray.nodes()) < {wanted}: time.sleep(0.5)\n"
    )
    subprocess.run([*made.prefix("head"), sys.executable, "-c", script], env=clean_environment(), timeout=120, check=True)


def labels(store: Store) -> pa.Table:
    pointer = store.read_json("latest.json")
    assert pointer is not None
    folder = pointer["labels"]
    return pa.concat_tables(
        [pq.read_table(pa.BufferReader(store.read_bytes(f"{folder}/{name}"))) for name in store.names(folder)]
    )


def test_a_host_cut_off_in_mid_search_changes_nothing(lan: tuple[Hosts, S3]) -> None:
    made, s3 = lan
    synthesize("s3://faces/lan", 60_000, dim=128, storage_options=s3.options)
    flags = ["--index", "exact", "--search-resource", "search_only", "--detect-resource", "head_only", "--log-format", "json"]
    whole = job(lan, "s3://faces/lan", "s3://faces/undisturbed", *flags)
    _, printed = whole.communicate(timeout=300)
    assert whole.returncode == 0, printed

    cut = job(lan, "s3://faces/lan", "s3://faces/cut", *flags)
    assert cut.stderr is not None
    lines = []
    for line in cut.stderr:
        lines.append(line)
        if '"event": "stage_begins"' in line and json.loads(line)["stage"] == "search":
            break
    time.sleep(2)
    made.pull("second")
    lines += cut.stderr.readlines()
    assert cut.wait(timeout=300) == 0, "".join(lines)
    story = "".join(lines)
    assert "its machine died" in story or "its worker died" in story, story
    assert labels(Store.at("s3://faces/cut", s3.options)).equals(labels(Store.at("s3://faces/undisturbed", s3.options)))


def test_tasks_go_where_the_named_resources_are(lan: tuple[Hosts, S3], tmp_path: Path) -> None:
    made, _ = lan
    script = (
        "import socket, ray\n"
        "from faceflow.cluster.executor import Executor, Resources\n"
        f"with Executor('{made.address('head')}:{PORT}', progress=False) as executor:\n"
        "    for name in ('head_only', 'search_only'):\n"
        "        where = Resources(custom=name)\n"
        "        place = executor.call(lambda _: ray.util.get_node_ip_address(), None, 'where', resources=where)\n"
        "        print(name, place)\n"
    )
    done = subprocess.run(
        [*made.prefix("head"), sys.executable, "-c", script], env=clean_environment(PYTHONPATH=str(ROOT / "lib")),
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    places = dict(line.split() for line in done.stdout.splitlines() if line.count(" ") == 1)
    assert places["head_only"] == made.address("head")
    assert places["search_only"] in (made.address("first"), made.address("second"))
