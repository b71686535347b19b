"""What each command does with its arguments, and what it prints. The arguments themselves are in `cli.parser`."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from faceflow.config import SETTINGS, ClusterConfig
from faceflow.config_loading import load_config, parse_setting
from faceflow.errors import SettingsError
from faceflow.logs import say
from faceflow.setting_types import check_thumbnails

UNSET: Any = object()
"""The value of a setting that the command line does not mention."""


def _config_of(arguments: argparse.Namespace) -> ClusterConfig:
    given = {key: value for key in SETTINGS if (value := getattr(arguments, key, UNSET)) is not UNSET}
    return load_config(given, arguments.config)


def _options(arguments: argparse.Namespace) -> Any:
    return parse_setting("storage_options", arguments.storage_options)


def _cluster(arguments: argparse.Namespace) -> None:
    from faceflow.api import run_clustering, run_nightly

    job = run_nightly if arguments.command == "nightly" else run_clustering
    result = job(_config_of(arguments), progress=not arguments.quiet)
    if arguments.json:
        say(json.dumps(result.as_dict()))
    else:
        say(f"{result.faces:,} faces, {result.edges:,} edges -> {result.clusters:,} clusters, {result.singletons:,} singletons")
        if result.quarantined:
            say(f"{result.quarantined:,} rows are quarantined: OUTPUT/quarantined/run={result.run_id} lists them with reasons")
        say(f"run {result.run_id}, {result.seconds['total']:.1f} s; labels: {result.labels}")


def _evaluate(arguments: argparse.Namespace) -> None:
    from faceflow.tools.evaluate import evaluate

    scores = evaluate(
        arguments.labels, arguments.truth, label_column=arguments.label_column, id_column=arguments.id_column,
        partial=arguments.partial, storage_options=_options(arguments),
    )  # fmt: skip
    if arguments.json:
        say(json.dumps(asdict(scores)))
        return
    say(f"{'':10}precision  recall     F")
    for name in ("pairwise", "bcubed"):
        row = [getattr(scores, f"{name}_{part}") for part in ("precision", "recall", "f")]
        say(f"{name:10}" + "  ".join(f"{value:9.4f}" for value in row))
    say(f"NMI {scores.nmi:.4f}  ARI {scores.ari:.4f}")
    say(
        f"{scores.faces:,} faces, {scores.clusters:,} clusters ({scores.singletons:,} singletons), "
        f"{scores.identities:,} identities"
    )


def _compare(arguments: argparse.Namespace) -> None:
    from faceflow.tools.compare import compare_methods, table

    wanted = [name.strip() for name in arguments.methods.split(",")] if arguments.methods is not None else None
    results = compare_methods(
        _config_of(arguments), arguments.truth, wanted, label_column=arguments.label_column,
        progress=not arguments.quiet,
    )  # fmt: skip
    if arguments.json:
        say(json.dumps({"run_id": results.run_id, "folder": results.folder, "rows": [asdict(row) for row in results.rows]}))
        return
    say(table(results.rows))
    say(f"table.txt, table.csv, plot.png and labels: {results.folder}")


def _count(text: str) -> int:
    """100k, 1.5M or a plain number. Raises SettingsError."""
    units = {"k": 10**3, "m": 10**6}
    number, unit = (text[:-1], units[text[-1].lower()]) if text[-1:].lower() in units else (text, 1)
    try:
        return round(float(number) * unit)
    except ValueError:
        raise SettingsError(f"{text!r} is not a number: write 100000, 100k or 1.5M") from None


def _scaling(arguments: argparse.Namespace) -> None:
    from faceflow.tools.scaling.measure import measure_scaling

    sizes = [_count(text) for text in arguments.faces.split(",")] if arguments.faces else None
    wanted = None
    if arguments.predict:
        pairs = [text.partition(":") for text in arguments.predict.split(",")]
        wanted = [(_count(workers), _count(faces)) for workers, _, faces in pairs]
    results = measure_scaling(
        _config_of(arguments), [_count(text) for text in arguments.counts.split(",")], sizes, arguments.repeats, wanted,
        progress=not arguments.quiet,
    )  # fmt: skip
    if arguments.json:
        say(json.dumps({"folder": results.folder, "runs": [asdict(run) for run in results.runs], "reading": results.reading}))
        return
    say("\n".join(results.reading))
    say(f"scaling.json, scaling.csv, scaling.png, reading.txt: {results.folder}")


def _plan(arguments: argparse.Namespace) -> None:
    from faceflow.tools.plan.forecast import lines, plan_run

    results = plan_run(_config_of(arguments))
    say(json.dumps(asdict(results)) if arguments.json else "\n".join(lines(results)))
    if results.problems:
        raise SettingsError("this run does not fit: " + "; ".join(results.problems))


def _synthesize(arguments: argparse.Namespace) -> None:
    from faceflow.tools.datasets.synthesize import synthesize

    made = synthesize(
        arguments.output, arguments.faces, dim=arguments.dim, mean_size=arguments.mean_size, sizes=arguments.sizes,
        look=arguments.look, seed=arguments.seed, storage_options=_options(arguments),
    )  # fmt: skip
    if arguments.json:
        say(json.dumps(made))
    else:
        say(f"{made['faces']:,} faces of {made['identities']:,} identities in {made['files']} file(s): {arguments.output}")


def _import(arguments: argparse.Namespace) -> None:
    from faceflow.tools.datasets.convert import import_faces

    made = import_faces(
        arguments.features, arguments.output, labels=arguments.labels, dim=arguments.dim,
        storage_options=_options(arguments),
    )  # fmt: skip
    if arguments.json:
        say(json.dumps(made))
    else:
        known = f" of {made['identities']:,} identities" if arguments.labels else ""
        say(f"{made['faces']:,} faces{known} in {made['files']} file(s): {arguments.output}")


def _show_runs(results: Sequence[Any], as_json: bool) -> None:
    now = datetime.datetime.now(datetime.UTC)
    if as_json:
        say(json.dumps([asdict(run) | {"updated": run.updated.isoformat()} for run in results]))
        return
    width = max([6, *(len(run.run_id) for run in results)])
    say(f"  {'run':{width}}  {'state':9}  {'stage':8}  {'age':>8}  {'run dir':>9}  {'labels':>9}")
    for run in results:
        say(
            f"{'*' if run.current else ' '} {run.run_id:{width}}  {run.state:9}  {run.stage:8}  {run.age(now):>8}  "
            f"{run.size / 1e6:6,.0f} MB  {run.label_size / 1e6:6,.0f} MB"
        )


def _runs(arguments: argparse.Namespace) -> None:
    from faceflow.runs.housekeeping import list_runs

    options = _options(arguments)
    _show_runs(list_runs(arguments.output, arguments.work_dir, options), arguments.json)


def _clean(arguments: argparse.Namespace) -> None:
    from faceflow.runs.housekeeping import clean

    options = _options(arguments)
    removed = clean(arguments.output, arguments.keep, arguments.work_dir, options, arguments.dry_run)
    if not arguments.json:
        freed = sum(run.size + run.label_size for run in removed) / 1e6
        say(f"{'would remove' if arguments.dry_run else 'removed'} {len(removed)} run(s), {freed:,.0f} MB")
    if removed or arguments.json:
        _show_runs(removed, arguments.json)


def _diff(arguments: argparse.Namespace) -> None:
    from faceflow.tools.diff import compare_runs

    options = _options(arguments)
    results = compare_runs(arguments.output, arguments.first, arguments.second, arguments.to, options)
    if arguments.json:
        say(json.dumps(asdict(results)))
        return
    say(
        f"{results.faces:,} faces in both, {results.moved:,} of them in another cluster; "
        f"{results.new:,} new, {results.gone:,} gone"
    )
    say(", ".join(f"{count:,} clusters {event}" for event, count in results.events.items()) or "no cluster changed")
    say(f"events: {results.events_file}\nmoves: {results.moves_file}")


def _status(arguments: argparse.Namespace) -> None:
    from faceflow.runs.status import lines, status

    options = _options(arguments)
    results = status(arguments.output, arguments.run_id, arguments.work_dir, options)
    say(json.dumps(asdict(results)) if arguments.json else "\n".join(lines(results)))


def _report(arguments: argparse.Namespace) -> None:
    from faceflow.tools.report.page import report_run

    if arguments.thumbnails is not None:
        check_thumbnails(arguments.thumbnails)
    options = _options(arguments)
    made = report_run(arguments.output, arguments.run_id, arguments.thumbnails, arguments.to, arguments.work_dir, options)
    say(json.dumps({"report": made.page, "faces": made.faces, "pictures": made.pictures}) if arguments.json else made.page)
    if complaint := made.complaint(arguments.thumbnails):
        print(complaint, file=sys.stderr)


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "report": _report,
    "status": _status,
    "cluster": _cluster,
    "nightly": _cluster,
    "evaluate": _evaluate,
    "compare": _compare,
    "scaling": _scaling,
    "plan": _plan,
    "synthesize": _synthesize,
    "import": _import,
    "runs": _runs,
    "clean": _clean,
    "diff": _diff,
}
