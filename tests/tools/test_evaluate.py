from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from faceflow.errors import InputError
from faceflow.tools.evaluate import evaluate


def write(path: Path, **columns: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return str(path)


def test_joins_on_the_id_and_counts_a_null_cluster_alone(tmp_path: Path) -> None:
    labels = write(tmp_path / "l.parquet", id=pa.array([3, 1, 2, 4], pa.int32()), cluster=pa.array([0, 0, 1, None], pa.int64()))
    truth = write(tmp_path / "t.parquet", face=[1, 2, 3, 4], who=["a", "b", "a", "b"])
    scores = evaluate(labels, truth, label_column="who", id_column="face")
    assert (scores.faces, scores.clusters, scores.singletons, scores.identities) == (4, 3, 2, 2)
    assert scores.pairwise_precision == 1
    assert scores.pairwise_recall == 0.5


@pytest.mark.parametrize(
    ("ours", "real", "message"),
    [
        (["a", "b"], ["a", "b", "c", "d"], "2 id(s) of .*t.parquet are not in .*l.parquet, for example 'c', 'd'"),
        (["a", "b", "z"], ["a", "b"], "1 id(s) of .*l.parquet are not in .*t.parquet, for example 'z'"),
        (["a", "a"], ["a", "b"], "l.parquet: 1 row(s) repeat an id, for example 'a'"),
        ([1, 2], ["a", "b"], "they cannot be matched"),
    ],
)
def test_ids_that_do_not_match(tmp_path: Path, ours: list[Any], real: list[Any], message: str) -> None:
    labels = write(tmp_path / "l.parquet", id=ours, cluster=[0] * len(ours))
    truth = write(tmp_path / "t.parquet", id=real, label=[0] * len(real))
    with pytest.raises(InputError, match=message.replace("(", r"\(").replace(")", r"\)")):
        evaluate(labels, truth)


def test_missing_column_and_null_label(tmp_path: Path) -> None:
    labels = write(tmp_path / "l.parquet", id=[1], cluster=[0])
    truth = write(tmp_path / "t.parquet", id=[1], lable=[0])
    with pytest.raises(InputError, match="did you mean 'lable'"):
        evaluate(labels, truth)
    with pytest.raises(InputError, match="null"):
        evaluate(labels, write(tmp_path / "n.parquet", id=[1], label=pa.array([None], pa.int32())))
