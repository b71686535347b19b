"""The report of a run: true, self-contained, safe to open, and fit for a real browser; `status` and JSON logs beside it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from faceflow.cli.main import main
from faceflow.storage import layout
from tests.conftest import write_faces

pytestmark = pytest.mark.usefixtures("ray_session")

EVIL = '<script>alert("x")</script>&\'{{ 7 * 7 }}'


def faces(folder: Path, seed: int = 0) -> Path:
    """Sixty people, some of them alike; every id would be markup if it could."""
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((60, 48))
    centers[1::2] = centers[::2] + 0.75 * centers[1::2]
    labels = np.repeat(np.arange(60), 12)
    x = centers[labels] + 0.75 * rng.standard_normal((len(labels), 48))
    return write_faces(folder / "f.parquet", x.astype(np.float32), pa.array([f"{i}{EVIL}" for i in range(len(labels))]))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    source = faces(folder / "in")
    assert main(["cluster", str(source), str(folder / "out"), "--run-id", "r", "--quiet", "--min-recall", "0"]) == 0
    return folder


def page(made: Path) -> str:
    return (made / "out" / layout.report_folder("r") / "report.html").read_text()


class Tags(HTMLParser):
    """Every start tag with its attributes, and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_it_shows_what_the_run_published(made: Path) -> None:
    latest = json.loads((made / "out" / "latest.json").read_text())
    seen = " ".join(" ".join(Tags(page(made)).text).split())
    for figure in (f"{latest['faces']:,}", f"{latest['clusters']:,}", f"{latest['edges']:,}", f"{latest['recall']:.4f}"):
        assert figure in seen
    table = pq.read_table(made / "out" / layout.quality_table("r")).to_pylist()
    doubtful = [row for row in table[:12] if row["doubtful_share"] > 0]
    assert doubtful
    for row in [*doubtful, *sorted(table, key=lambda row: (-row["faces"], row["cluster"]))[:12]]:
        assert f"Cluster {row['cluster']}" in seen
    # The ids that a card shows are of that cluster, and those of its pair of two clusters.
    labels = pq.read_table(made / "out" / latest["labels"], partitioning=None)
    cluster_of = dict(zip(labels["id"].to_pylist(), labels["cluster"].to_pylist(), strict=True))
    manifest = json.loads((made / "out" / "_runs" / "r" / "manifests" / "publish.json").read_text())
    for example in manifest["result"]["examples"]:
        assert {cluster_of[item] for item in example["ids"]} == {example["cluster"]}
        if example["pair"]:
            assert [cluster_of[item] for item in example["pair"]] == [example["cluster"], example["nearest_cluster"]]
    for name in ("timeline", "sizes", "similarities", "recall"):
        with Image.open(made / "out" / layout.report_folder("r") / f"{name}.png") as image:
            assert image.width > 800


def test_it_is_self_contained_and_escapes_what_comes_from_outside(made: Path) -> None:
    text = page(made)
    results = Tags(text)
    assert html.escape(EVIL).split("&#")[0].split("&quot;")[0] in text
    assert "<script" not in text
    assert "{{ 7" in text  # nothing that came with an id was evaluated
    assert {tag for tag, _ in results.tags}.isdisjoint({"script", "link", "iframe", "object", "embed", "base", "form"})
    for tag, attributes in results.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href"):
                assert (value or "").startswith(("#", "data:image/")), (tag, value)
    policy = next(a["content"] for tag, a in results.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in (policy or "")
    assert not re.search(r"url\((?!#)", text)


def test_thumbnails(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = made / "pictures"
    pictures.mkdir()
    for i in range(720):
        if i % 2:
            Image.new("RGB", (300, 200), (i % 256, 90, 120)).save(pictures / f"{i}.png")
    plain = write_faces(
        made / "plain" / "f.parquet", pq.read_table(made / "in" / "f.parquet")["embedding"].combine_chunks(),
        pa.array([f"{i}" for i in range(719)] + ["../secret"]),
    )  # fmt: skip
    Image.new("RGB", (30, 20)).save(made / "secret.png")
    template = str(pictures / "{id}.png")
    out = str(made / "shown")
    assert main(["cluster", str(plain), out, "--quiet", "--min-recall", "0", "--run-id", "r", "--thumbnails", template]) == 0
    images = [a for tag, a in Tags((made / "shown/reports/run=r/report.html").read_text()).tags if tag == "img"]
    assert len(images) > 20
    assert all(int(a["alt"] or "") % 2 and (a["src"] or "").startswith("data:image/jpeg") for a in images)
    # By address: one line of text each, from that origin alone.
    web = "https://photos.example/{id}.jpg"
    assert main(["report", out, "--thumbnails", web, "--to", str(made / "web")]) == 0
    assert "pictures found" not in capsys.readouterr().err
    assert main(["report", out, "--thumbnails", str(made / "nowhere" / "{id}.jpg"), "--to", str(made / "none")]) == 0
    assert re.search(r"0 of \d+ pictures found", capsys.readouterr().err)
    text = (made / "web" / "report.html").read_text()
    assert "img-src data: https://photos.example" in text
    assert re.search(r'src="https://photos\.example/\d+\.jpg"', text)
    capsys.readouterr()
    for bad in ("no-id.jpg", "javascript:{id}"):
        assert main(["report", out, "--thumbnails", bad]) == 2
        assert "thumbnails" in capsys.readouterr().err


def test_an_incremental_run_lists_what_changed(made: Path) -> None:
    out = made / "nights"
    folder = made / "growing"
    shutil.copytree(made / "in", folder)
    assert main(["nightly", str(folder), str(out), "--quiet", "--min-recall", "0", "--run-id", "first"]) == 0
    rng = np.random.default_rng(5)
    new = np.repeat(rng.standard_normal((2, 48)), 6, axis=0) + 0.3 * rng.standard_normal((12, 48))
    write_faces(folder / "g.parquet", new.astype(np.float32), pa.array([f"new-{i}" for i in range(12)]))
    assert main(["nightly", str(folder), str(out), "--quiet", "--min-recall", "0", "--run-id", "second"]) == 0
    first, second = (
        " ".join(" ".join(Tags((out / layout.report_folder(run) / "report.html").read_text()).text).split())
        for run in ("first", "second")
    )
    assert "A full run without a base run" in first
    assert "Since run first : 12 faces new, 0 changed, 0 removed; 0 faces of both runs changed their cluster" in second
    events = pq.read_table(out / layout.events_part("second"))["event"].to_pylist()
    assert events.count("created") == 2
    assert re.search(r"created grown shrunk changed merged split vanished 2 ", second)


def test_in_a_real_browser(made: Path, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    address = (made / "out" / layout.report_folder("r") / "report.html").as_uri()
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND",
    ]  # fmt: skip
    shot = tmp_path / "shot.png"
    taken = subprocess.run(
        [*command, "--window-size=1200,3000", f"--screenshot={shot}", address], capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert shot.exists(), taken.stderr
    assert ":CONSOLE" not in taken.stderr, (
        taken.stderr
    )  # a policy that is broken, or a picture that is missing, is logged there
    with Image.open(shot) as image:
        colors = image.convert("RGB").resize((120, 300)).getcolors(maxcolors=40_000)
    assert colors is not None
    assert len(colors) > 30, "the page is blank"
    dom = subprocess.run([*command, "--dump-dom", address], capture_output=True, text=True, timeout=120, check=True).stdout
    seen = Tags(dom)
    assert sum(tag == "svg" for tag, _ in seen.tags) == 4
    assert "Least certain clusters" in seen.text


def test_status_and_runs_that_do_not_exist(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(made / "out"), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert (results["run_id"], results["state"], results["stage"]) == ("r", "current", "")
    assert list(results["seconds"]) == ["ingest", "quantize", "search", "link", "detect", "publish"]
    assert main(["status", str(made / "out")]) == 0
    assert "run r: current; ended" in capsys.readouterr().out
    for arguments in (["status", "--run-id", "x"], ["report", "--run-id", "x"]):
        assert main([arguments[0], str(made / "out"), *arguments[1:]]) == 2
        assert "no run x" in capsys.readouterr().err
    assert main(["status", str(made / "nowhere")]) == 2


def test_a_run_that_stopped_says_why(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(made / "strict")
    arguments = [
        "cluster",
        str(made / "in" / "f.parquet"),
        out,
        "--quiet",
        "--index",
        "cells",
        "--cells",
        "80",
        "--probes",
        "1",
    ]
    assert main([*arguments, "--min-recall", "1"]) == 4
    capsys.readouterr()
    assert main(["status", out, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["state"] == "stopped"
    assert "--min-recall" in results["why"]
    assert main(["status", out]) == 0
    assert "the same command continues it" in capsys.readouterr().out
    assert main(["report", out, "--run-id", results["run_id"]]) == 2
    assert "is not finished" in capsys.readouterr().err
