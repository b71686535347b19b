"""A night against a full run: seconds of search and detection, and of the whole job, as faces are added.

    python -m tests.benchmarks.nightly --faces 500000 --added 0.001,0.01,0.1
    python -m tests.benchmarks.nightly --faces 50000 --nights 30

The first form publishes the faces, then adds the given shares of new ones (a tenth of them of identities that were not there
before), each to the same first night, and compares with a full run on the same files; every job is a process of its own. The
second lets so many nights of +1 %, -0.2 % pass. Before a time is printed, the night's recall must hold, its clusters must
score as the full run's do, and events and moves must replay to its labels.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from faceflow.tools.datasets.synthesize import synthesize
from faceflow.tools.evaluate import evaluate

ROOT = Path(__file__).resolve().parents[2]
PLAIN = ("--min-similarity", "0.58", "--edges", "threshold", "--neighbors", "50")
"""Of every job, but with --defaults: what most figures of the README were taken with."""


def job(name: str, source: Path, output: Path, *flags: str) -> dict[str, object]:
    command = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), str(source), str(output), "--json", "--quiet", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} ended with {done.returncode}:\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def labels_of(output: Path, run_id: str) -> dict[str, int]:
    table = pa.concat_tables(
        pq.read_table(f, partitioning=None) for f in sorted((output / "labels" / f"run={run_id}").glob("*.parquet"))
    )
    return dict(zip(table["id"].to_pylist(), table["cluster"].to_pylist(), strict=True))


def replay(output: Path, labels: dict[str, int], run_id: str) -> dict[str, int]:
    """The labels of a night from those of the night before and its moves; the events must agree with both."""
    after = dict(labels)
    moves = pa.concat_tables(
        pq.read_table(f, partitioning=None) for f in sorted((output / "moves" / f"run={run_id}").glob("*"))
    )
    for face, before, now in zip(*(moves[c].to_pylist() for c in ("id", "from", "to")), strict=True):
        assert labels.get(face) == before, (face, before)
        if now is None:
            del after[face]
        else:
            after[face] = now
    first = dict(zip(*np.unique(list(labels.values()), return_counts=True), strict=True))
    sizes = dict(first)
    for event in pq.read_table(next((output / "events" / f"run={run_id}").glob("*")), partitioning=None).to_pylist():
        assert first.get(event["cluster"], 0) == event["faces_before"], event
        if event["event"] not in ("merged", "split"):
            sizes[event["cluster"]] = event["faces_after"]
    results = dict(zip(*np.unique(list(after.values()), return_counts=True), strict=True))
    assert {c: n for c, n in sizes.items() if n} == results
    return after


def split(faces: Path, into: Path, first: int, new: int, rng: np.random.Generator) -> pa.Table:
    """Move the faces of the first night, file by file, into another folder; returns those that are added, in random order: a
    tenth of them of identities that come with them."""
    files = sorted(faces.glob("*.parquet"))
    parts = [pq.read_table(f, columns=["label"])["label"].to_numpy() for f in files]
    labels = np.concatenate(parts)
    identities, sizes = np.unique(labels, return_counts=True)
    late = np.zeros(len(identities), bool)
    count, chosen = 0, rng.permutation(len(identities))
    for i in chosen:
        if count >= new // 10:
            break
        late[i], count = True, count + sizes[i]
    of_late = late[np.searchsorted(identities, labels)]
    order = rng.permutation(len(labels))
    others = order[~of_late[order]]
    night = np.full(len(labels), -1)
    night[others[:first]] = 0
    night[np.concatenate([np.flatnonzero(of_late)[:new], others[first : first + new - min(new, count)]])] = 1
    into.mkdir()
    added = []
    for file, selected in zip(files, np.split(night, np.cumsum([len(p) for p in parts])[:-1]), strict=True):
        table = pq.read_table(file)
        pq.write_table(table.filter(pa.array(selected == 0)), into / f"night-000-{file.name}")
        added.append(table.filter(pa.array(selected == 1)))
        file.unlink()
    later = pa.concat_tables(added)
    return later.take(rng.permutation(len(later)))


def compare(folder: Path, faces: int, shares: list[float], flags: tuple[str, ...]) -> None:
    rng = np.random.default_rng(1)
    most = int(faces * max(shares))
    synthesize(str(folder / "made"), faces + 2 * most, seed=1)
    source, output = folder / "in", folder / "out"
    added = split(folder / "made", source, faces, most, rng)
    begin = job("nightly", source, output, *flags)
    pointer = (output / "latest.json").read_bytes()
    before = labels_of(output, str(begin["run_id"]))
    report = {"faces": faces, "first_night": begin["seconds"]}
    for share in shares:
        pq.write_table(added.slice(0, int(faces * share)), source / "night-001.parquet")
        (output / "latest.json").write_bytes(pointer)  # each share is added to the same first night
        night = job("nightly", source, output, *flags)
        replayed = replay(output, before, str(night["run_id"]))
        assert replayed == labels_of(output, str(night["run_id"]))
        scores = evaluate(str(output), str(source))
        full = job("cluster", source, folder / "full", *flags)
        full_scores = evaluate(str(folder / "full"), str(source))
        gap = night["codelength"] / full["codelength"] - 1  # type: ignore[operator]
        assert abs(scores.pairwise_f - full_scores.pairwise_f) < 0.005, (scores, full_scores)
        shutil.rmtree(folder / "full")
        ours, theirs = dict(night["seconds"]), dict(full["seconds"])  # type: ignore[call-overload]
        search = [sum(s[stage] for stage in ("quantize", "search", "detect")) for s in (ours, theirs)]
        report[f"+{share:.1%}"] = {
            "search_detect_share": round(search[0] / search[1], 3), "job_share": round(ours["total"] / theirs["total"], 3),
            "night": ours, "full": theirs, "recall": night["recall"]["estimate"], "full_recall": full["recall"]["estimate"],  # type: ignore[index]
            "codelength_gap": round(gap, 7), "kept_ids": round(kept(before, replayed), 5),
            "pairwise_f": [round(s.pairwise_f, 4) for s in (scores, full_scores)],
            "bcubed_f": [round(s.bcubed_f, 4) for s in (scores, full_scores)],
        }  # fmt: skip
    print(json.dumps(report))


def kept(before: dict[str, int], after: dict[str, int]) -> float:
    """Share of the faces in both that have the same cluster."""
    both = before.keys() & after.keys()
    return sum(before[face] == after[face] for face in both) / len(both)


def simulate(folder: Path, faces: int, nights: int, settings: tuple[str, ...], every: str) -> None:
    rng = np.random.default_rng(2)
    new, gone = faces // 100, faces // 500
    synthesize(str(folder / "made"), faces + 2 * new * nights, seed=2)
    source, output = folder / "in", folder / "out"
    added = split(folder / "made", folder / "first", faces, new * nights, rng)
    first = pa.concat_tables(pq.read_table(f) for f in sorted((folder / "first").glob("*.parquet")))
    source.mkdir()
    for i in range(10):
        pq.write_table(first.slice(faces * i // 10, faces // 10), source / f"day-000-{i}.parquet")
    flags = (*settings, "--full-every", every)
    labels = first_labels = labels_of(output, str(job("nightly", source, output, *flags)["run_id"]))
    seconds = []
    for night in range(1, nights + 1):
        pq.write_table(added.slice(new * (night - 1), new), source / f"day-{night:03d}.parquet")
        victim = source / f"day-000-{night % 10}.parquet"
        table = pq.read_table(victim)
        leaving = pa.array(rng.choice(table["id"].to_pylist(), gone, replace=False))
        pq.write_table(table.filter(pc.invert(pc.is_in(table["id"], value_set=leaving))), victim)
        result = job("nightly", source, output, *flags)
        labels = replay(output, labels, str(result["run_id"]))
        assert labels == labels_of(output, str(result["run_id"]))
        seconds.append(dict(result["seconds"])["total"])  # type: ignore[call-overload]
        print(f"night {night}: {result['faces']} faces, {result['clusters']} clusters, {seconds[-1]:.1f} s", file=sys.stderr)
    scores = evaluate(str(output), str(source))
    full = job("cluster", source, folder / "full", *settings)
    full_scores = evaluate(str(folder / "full"), str(source))
    print(
        json.dumps(
            {
                "faces": faces, "nights": nights, "full_every": int(every), "kept_ids": round(kept(first_labels, labels), 5),
                "pairwise_f": [round(s.pairwise_f, 5) for s in (scores, full_scores)],
                "bcubed_f": [round(s.bcubed_f, 5) for s in (scores, full_scores)],
                "codelength_gap": round(result["codelength"] / full["codelength"] - 1, 7),  # type: ignore[operator]
                "median_night_seconds": float(np.median(seconds)), "full_seconds": full["seconds"],
            }
        )
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", type=int, default=500_000)
    parser.add_argument("--added", default="0.001,0.01,0.1")
    parser.add_argument("--nights", type=int, default=0)
    parser.add_argument("--defaults", action="store_true", help="the default settings, not those of PLAIN")
    parser.add_argument("--full-every", default="1000")
    a = parser.parse_args()
    flags = () if a.defaults else PLAIN
    with tempfile.TemporaryDirectory() as folder:
        if a.nights:
            simulate(Path(folder), a.faces, a.nights, flags, a.full_every)
        else:
            compare(Path(folder), a.faces, [float(s) for s in a.added.split(",")], flags)


if __name__ == "__main__":
    main()
