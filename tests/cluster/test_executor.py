"""Tasks that fail on a real Ray: I/O errors, killed workers, memory; each in the way it fails in the field."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from faceflow.cluster.executor import Executor, Resources
from faceflow.cluster.retries import FIRST_DELAY, MACHINE_RETRIES, MEMORY_RETRIES, RETRIES, Attempts, Cause
from faceflow.errors import InputError, RunError
from faceflow.stages.base import open_executor
from tests.conftest import ROOT


@dataclass(frozen=True)
class Failing:
    """Request: fail in this way the first `times` times."""

    flag: str
    times: int
    kind: str
    value: int
    steps: int = 1


def fails_until(request: Failing) -> tuple[int, int]:
    """In the worker: fail, or return the value."""
    flag, times, kind = request.flag, request.times, request.kind
    tries = len(list(Path(flag).parent.glob(f"{Path(flag).name}-*")))
    if tries < times:
        Path(f"{flag}-{tries}").touch()
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "memory":
            np.empty((2**45,), np.float64)
        raise {"io": OSError("connection reset"), "denied": PermissionError("access denied"), "bug": KeyError("x"),
               "input": InputError("bad row")}[kind]  # fmt: skip
    return request.value, request.steps


def twice(request: Failing) -> Failing:
    return replace(request, steps=2 * request.steps)


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(("kind", "steps"), [("io", 1), ("kill", 2), ("memory", 4)])
def test_a_task_that_fails_is_tried_again(tmp_path: Path, kind: str, steps: int) -> None:
    requests = [Failing(str(tmp_path / f"{i}"), 2 if i == 1 else 0, kind, i) for i in range(6)]
    with Executor() as executor:
        results = executor.map(fails_until, requests, "try", smaller=twice)
    assert results == [(i, steps if i == 1 else 1) for i in range(6)]


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("denied", RunError, "try: access denied; what is finished is kept, and the same command continues"),
        ("input", InputError, "bad row"),
        ("bug", RunError, "try: a worker failed with KeyError: 'x'"),
    ],
)
def test_what_cannot_pass_is_not_tried_again(tmp_path: Path, kind: str, error: type[Exception], message: str) -> None:
    with Executor() as executor, pytest.raises(error) as caught:
        executor.map(fails_until, [Failing(str(tmp_path / "f"), 1, kind, 0)], "try")
    assert str(caught.value) == message
    assert len(list(tmp_path.iterdir())) == 1


def test_waits_longer_each_time_and_gives_up() -> None:
    attempt, waits = Attempts((1,), "search"), []
    for _ in range(RETRIES):
        attempt.failed(Cause.IO, "503 SlowDown", 100.0)
        waits.append(attempt.not_before - 100.0)
    assert all(0.75 * FIRST_DELAY * 2**i <= wait <= 1.25 * FIRST_DELAY * 2**i for i, wait in enumerate(waits))
    with pytest.raises(RunError, match="search: gave up after 5 retries: 503 SlowDown"):
        attempt.failed(Cause.IO, "503 SlowDown", 100.0)


def test_a_dead_machine_is_not_the_task_s_fault() -> None:
    attempt = Attempts((1, 1), "search", lambda request: (request[0], 2 * request[1]))
    for _ in range(MACHINE_RETRIES):
        attempt.failed(Cause.MACHINE, "the raylet died", 0.0)
    assert attempt.request == (1, 1)
    assert not attempt.alone
    assert attempt.not_before > 10


def test_memory_halves_the_steps_and_then_says_so() -> None:
    attempt = Attempts((7, 1), "search", lambda task: (task[0], 2 * task[1]))
    for i in range(1, MEMORY_RETRIES + 1):
        attempt.failed(Cause.MEMORY, "killed", 0.0)
        assert attempt.request == (7, 2**i)
        assert attempt.alone
    with pytest.raises(RunError, match="even in small steps it needs more memory than there is"):
        attempt.failed(Cause.MEMORY, "killed", 0.0)
    single = Attempts((7,), "detect")
    assert single.failed(Cause.MEMORY, "killed", 0.0) == (
        "detect: it ran out of memory: killed; trying again alone on its machine"
    )
    with pytest.raises(RunError, match="alone on its machine it needs more memory than there is"):
        single.failed(Cause.MEMORY, "killed", 0.0)


def fill(request: tuple[float, int]) -> int:
    """In the worker: hold so much memory, in the given number of steps."""
    import time

    gigabytes, steps = request
    data = np.ones(int(gigabytes * 2**30 / 8 / steps))
    time.sleep(2)
    return int(data[0]) * steps


@pytest.mark.timeout(180)
def test_a_worker_that_ray_ends_for_its_memory_is_tried_in_smaller_steps() -> None:
    """A private Ray whose memory monitor has its limit 1.5 GB above what the machine uses now, and a task of 4 GB."""
    script = textwrap.dedent("""
        from faceflow.cluster.executor import Executor
        from tests.cluster.test_executor import fill
        with Executor(workers=2) as executor:
            executor.map(fill, [(0.01, 1)] * 2, "warm")
            print(executor.map(fill, [(0.1, 1), (4.0, 1)], "search", smaller=lambda request: (request[0], 2 * request[1])))
    """)
    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + 2.0 * 2**30) / memory.total
    if threshold > 0.9:
        pytest.skip("the machine has too little free memory")
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {
        "RAY_memory_usage_threshold": f"{threshold:.4f}", "RAY_memory_monitor_refresh_ms": "100",
        "PYTHONPATH": f"{ROOT / 'lib'}{os.pathsep}{ROOT}",
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr
    small, large = eval(done.stdout)
    assert small in (1, 2, 4)  # the monitor may end either worker
    assert large in (4, 8, 16), done.stderr
    assert "search: it ran out of memory: Ray ended its worker" in done.stderr


def threads_there(request: None) -> int:
    """In the worker: threads that compiled loops may use."""
    import numba

    return int(numba.get_num_threads())


@pytest.mark.usefixtures("ray_session")
def test_compiled_loops_have_the_threads_that_were_asked_for() -> None:
    """Else each of as many tasks as there are CPUs would start as many threads."""
    with open_executor(None, None, progress=False) as executor:
        asked = executor.call(threads_there, None, "all", resources=Resources(cpus=2))
        assert executor.map(threads_there, [None] * 6, "one") == [1] * 6
        assert executor.call(threads_there, None, "all", resources=Resources(cpus=2)) == asked == 2


@pytest.mark.usefixtures("ray_session")
def test_ray_gets_one_function_for_all_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each function that Ray is given is sent to every worker."""
    import ray

    made = []
    remote = ray.remote
    monkeypatch.setattr(ray, "remote", lambda *a, **k: made.append(a) or remote(*a, **k))
    with Executor() as executor:
        executor.map(threads_there, [None] * 8, "one")
        executor.map(threads_there, [None] * 8, "again")
    assert len(made) == 1


@pytest.mark.parametrize("token", [None, "0123456789abcdef" * 4])
def test_one_process_starts_private_rays_one_after_the_other(tmp_path: Path, token: str | None) -> None:
    """With and without a token of Ray's in the home, and where the home holds nothing before it holds nothing afterwards."""
    if token:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text(token)
    script = (
        "from faceflow.cluster.executor import Executor\n"
        "for i in range(2):\n"
        "    with Executor('local', progress=False, workers=1) as executor:\n"
        "        print(executor.call(abs, -i, 'task'))\n"
    )
    names = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    env = {key: value for key, value in os.environ.items() if key not in names}
    env |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT / "lib")}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.split() == ["0", "1"], done.stderr
    assert (tmp_path / ".ray").exists() == bool(token)
