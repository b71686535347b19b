"""Every command fed what it cannot use: exit code 2 and one sentence that says what to do, never a traceback."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse

from faceflow import map_equation
from faceflow.cli.main import main
from faceflow.errors import InputError
from faceflow.storage.s3_options import S3_OPTIONS
from tests.conftest import write_faces

OPTIONS = [
    ('{"endpiont_url": "http://x"}', "unknown option 'endpiont_url'; did you mean 'endpoint_url'?"),
    ('{"endpoint_url": "http://minio:90o0"}', "endpoint_url is 'http://minio:90o0': it must be an address like"),
    ('{"endpoint_url": "minio:9000"}', "endpoint_url is 'minio:9000': it must be an address like"),
    ('{"endpoint_url": "http://"}', "endpoint_url is 'http://': it must be an address like"),
    ('{"endpoint_url": 9000}', "endpoint_url must be a text"),
    ('{"anon": "yes"}', "anon must be true or false"),
    ('{"key": 5}', "key must be a text"),
    ("[1, 2]", "storage_options must be a JSON object"),
    ("{", "storage_options is not valid JSON"),
]
COMMANDS: dict[str, list[str]] = {
    "cluster": ["cluster", "s3://b/in", "s3://b/out"],
    "nightly": ["nightly", "s3://b/in", "s3://b/out"],
    "plan": ["plan", "s3://b/in", "s3://b/out"],
    "compare": ["compare", "s3://b/in", "s3://b/truth"],
    "scaling": ["scaling", "s3://b/in"],
    "evaluate": ["evaluate", "s3://b/out", "s3://b/truth"],
    "synthesize": ["synthesize", "s3://b/out", "--faces", "10"],
    "import": ["import", "FEATURES", "s3://b/out"],
    "runs": ["runs", "s3://b/out"],
    "clean": ["clean", "s3://b/out", "--keep", "1"],
    "status": ["status", "s3://b/out"],
    "report": ["report", "s3://b/out"],
    "diff": ["diff", "s3://b/out", "a", "b"],
}


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command says that ends with exit code 2."""
    assert main([*arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    lines = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_every_command_is_here() -> None:
    from faceflow.cli.commands import COMMANDS as KNOWN

    assert set(COMMANDS) == set(KNOWN)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=[options for options, _ in OPTIONS])
def test_storage_options(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, options: str, message: str) -> None:
    np.save(tmp_path / "f.npy", np.eye(4, 8, dtype=np.float32))
    arguments = [str(tmp_path / "f.npy") if a == "FEATURES" else a for a in COMMANDS[command]]
    assert message in refused(capsys, *arguments, "--storage-options", options)


def test_an_endpoint_from_the_environment(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "minio:9000")
    assert "AWS_ENDPOINT_URL is 'minio:9000': it must be an address like" in refused(capsys, *COMMANDS["cluster"])


def test_the_options_are_those_of_s3fs() -> None:
    import inspect

    import s3fs

    taken = set(inspect.signature(s3fs.S3FileSystem.__init__).parameters) - {"self", "kwargs"}
    assert taken - set(S3_OPTIONS) <= {"asynchronous", "loop", "session", "local_expiry_check"}  # not to be written as JSON


POINTERS = ["[1, 2]", '"x"', "5", "{}", '{"run_id": 7, "labels": "x"}', '{"run_id": "r"}', "not json", "null", "\xff"]


@pytest.mark.parametrize("content", POINTERS)
@pytest.mark.parametrize("command", ["cluster", "nightly", "runs", "clean", "report", "evaluate", "diff"])
def test_a_latest_json_that_is_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, content: str
) -> None:
    out, source = tmp_path / "out", tmp_path / "in.parquet"
    (out / "labels" / "run=r").mkdir(parents=True)
    write_faces(source, np.eye(8, 16, dtype=np.float32))
    (out / "latest.json").write_bytes(content.encode("latin-1"))
    named = {"s3://b/in": str(source), "s3://b/out": str(out), "s3://b/truth": str(source)}
    arguments = [named.get(a, a) for a in COMMANDS[command]]
    if content == "null" and command in ("cluster", "nightly"):
        return  # as good as none: the run replaces it
    printed = refused(capsys, *arguments)
    if content != "null":
        assert "latest.json was not written by faceflow: it has no run_id and labels. Move it away" in printed


LABELS: dict[str, Any] = {
    "lists": pa.array([[1], [2], [3]]),
    "structs": pa.array([{"a": 1}, {"a": 2}, {"a": 3}]),
    "maps": pa.array([[("a", 1)], [("a", 2)], []], pa.map_(pa.string(), pa.int64())),
}


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("place", ["id", "label"])
def test_evaluate_on_nested_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, place: str) -> None:
    plain = {"id": pa.array(["a", "b", "c"]), "label": pa.array([1, 1, 2])}
    pq.write_table(pa.table(plain).rename_columns(["id", "cluster"]), tmp_path / "labels.parquet")
    pq.write_table(pa.table(plain | {place: LABELS[kind]}), tmp_path / "truth.parquet")
    printed = refused(capsys, "evaluate", str(tmp_path / "labels.parquet"), str(tmp_path / "truth.parquet"))
    assert f"truth.parquet: column {place!r} is " in printed
    assert "it must hold a string or a number a face" in printed


def test_evaluate_takes_uuid_labels_and_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uuids = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([bytes([i]) * 16 for i in (1, 1, 2)], pa.binary(16)))
    ids = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([bytes([i]) * 16 for i in (7, 8, 9)], pa.binary(16)))
    pq.write_table(pa.table({"id": ids, "cluster": pa.array([5, 5, 6])}), tmp_path / "labels.parquet")
    pq.write_table(pa.table({"id": ids.storage, "label": uuids}), tmp_path / "truth.parquet")
    assert main(["evaluate", str(tmp_path / "labels.parquet"), str(tmp_path / "truth.parquet"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pairwise_f"] == 1


def test_evaluate_with_truth_for_a_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.table({"id": [1, 2, 3, 4], "cluster": [0, 0, 1, 1]}), tmp_path / "labels.parquet")
    pq.write_table(pa.table({"id": [1, 2, 3], "label": ["x", "x", "y"]}), tmp_path / "truth.parquet")
    command = ["evaluate", str(tmp_path / "labels.parquet"), str(tmp_path / "truth.parquet")]
    assert "use --partial to score only the faces that TRUTH names" in refused(capsys, *command)
    assert main([*command, "--partial", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert (scores["faces"], scores["pairwise_f"]) == (3, 1)
    pq.write_table(pa.table({"id": [1, 2, 9], "label": ["x", "x", "y"]}), tmp_path / "truth.parquet")
    assert "1 id(s) of" in refused(capsys, *command, "--partial")


def test_report_into_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "out" / "_runs" / "r"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"state": "published", "updated": "2026-01-01T00:00:00+00:00", "settings": {}}))
    blocked = tmp_path / "file"
    blocked.write_text("x")
    printed = refused(capsys, "report", str(tmp_path / "out"), "--run-id", "r", "--to", str(blocked / "sub"))
    assert "cannot write to" in printed
    if os.getuid() != 0:
        (tmp_path / "out").chmod(stat.S_IRUSR | stat.S_IXUSR)
        assert "cannot write to" in refused(capsys, "report", str(tmp_path / "out"), "--run-id", "r")


def test_a_memory_limit_without_a_unit(capsys: pytest.CaptureFixture[str]) -> None:
    printed = refused(capsys, "cluster", "in", "out", "--memory-limit", "8")
    assert printed == "error: memory_limit is '8': it must be at least 512MiB; write its unit too, as in 8GiB"


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (np.eye(3), r"a dense array of shape \(3, 3\): it must be a SciPy sparse matrix"),
        (np.zeros((2, 5)), r"a dense array of shape \(2, 5\)"),
        ([[0, 1, 0], [1, 0, 0], [0, 0, 0]], "a list: it must be a SciPy sparse matrix"),
        ("edges.csv", "a str"),
        ((np.array([0.5, 1.5]), np.array([1, 0])), "must be vectors of integers"),
        (scipy.sparse.csr_array(np.ones((2, 3))), "is square"),
    ],
    ids=["dense", "dense pair", "lists", "text", "floats", "oblong"],
)
def test_map_equation_of_what_is_no_graph(graph: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        map_equation(graph)


def test_diff_by_words_without_a_run_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "labels" / "run=a").mkdir(parents=True)
    (tmp_path / "latest.json").write_text(json.dumps({"run_id": "a", "labels": "labels/run=a", "parent_run_id": None}))
    assert "has no previous run: name a run" in refused(capsys, "diff", str(tmp_path), "previous", "latest")


def test_diff_by_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for run_id, clusters in (("a", [0, 0, 1]), ("b", [0, 1, 1])):
        (tmp_path / "labels" / f"run={run_id}").mkdir(parents=True)
        ids = pa.array(["x", "y", "z"], pa.string())
        pq.write_table(pa.table({"id": ids, "cluster": clusters}), tmp_path / "labels" / f"run={run_id}" / "part-0.parquet")
    (tmp_path / "latest.json").write_text(json.dumps({"run_id": "b", "labels": "labels/run=b", "parent_run_id": "a"}))
    assert main(["diff", str(tmp_path), "previous", "latest", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert (results["faces"], results["moved"]) == (3, 1)
    assert "diffs/a..b/" in results["moves_file"]
    moves = pq.read_table(results["moves_file"])
    assert moves.to_pylist() == [{"id": "y", "from": 0, "to": 1}]
    assert moves["id"].type == pa.string()


def test_an_output_that_is_named_like_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.parquet"
    for run_id in ("old", "new"):
        (out / "labels" / f"run={run_id}").mkdir(parents=True)
        table = pa.table({"id": [1, 2], "cluster": [0, int(run_id == "old")]})
        pq.write_table(table, out / "labels" / f"run={run_id}" / "part-0.parquet")
    (out / "latest.json").write_text(json.dumps({"run_id": "new", "labels": "labels/run=new"}))
    pq.write_table(pa.table({"id": [1, 2], "label": ["p", "p"]}), tmp_path / "truth.parquet")
    assert main(["evaluate", str(out), str(tmp_path / "truth.parquet"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["clusters"] == 1


def test_lines_of_a_constraints_file_are_those_of_an_editor(tmp_path: Path) -> None:
    from faceflow.stages.constraints_file import read

    path = tmp_path / "c.csv"
    path.write_text('id_a,id_b,kind\n\n"two\nlines",b,MUST-LINK\n\nc,d,Cannot-Link\ne,f,never\n')
    with pytest.raises(InputError, match="line 7: kind is 'never'; it must be 'must-link' or 'cannot-link'"):
        read(str(path), None)
    path.write_text('id_a,id_b,kind\n\n"two\nlines",b,MUST-LINK\nc,d,Cannot-Link\n')
    results = read(str(path), None)
    assert (len(results.must), len(results.cannot)) == (1, 1)


def test_the_engine_s_own_versions_matter() -> None:
    """A native run goes on whatever infomap is installed; what compiled its kernels is recorded."""
    from faceflow import ClusterConfig
    from faceflow.runs.stages import STAGES
    from faceflow.stages.detect import stage as detect

    packages = {stage.name: stage.packages for stage in STAGES}
    assert all("numba" in packages[name] for name in ("quantize", "search", "link", "detect"))
    assert "infomap" not in packages["detect"]
    assert detect._packages(ClusterConfig("a", "b")) == {}
    assert list(detect._packages(ClusterConfig("a", "b", engine="infomap"))) == ["version of infomap"]


def test_options_are_checked_whatever_the_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["cluster", str(tmp_path / "in"), str(tmp_path / "out"), "--storage-options", '{"endpiont_url": "http://x"}']
    assert "did you mean 'endpoint_url'?" in refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["diffs", "a", "b", "c"])
    assert caught.value.code == 2
    assert "did you mean 'diff'?" in capsys.readouterr().err
