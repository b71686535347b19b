"""The command line: every command and its flags, defined once."""

from __future__ import annotations

import argparse
import re
from typing import Any

from faceflow import __version__, logs
from faceflow.cli.commands import UNSET
from faceflow.config import DEFAULTS, SETTINGS, choices_of, is_switch
from faceflow.errors import did_you_mean

EXIT_CODES = """exit codes: 0 done; 2 bad input or settings; 3 could not finish (the same command continues);
4 a quality gate failed; 5 another run published first"""


class _Parser(argparse.ArgumentParser):
    """argparse, with "did you mean" for unknown flags and commands."""

    def error(self, message: str) -> Any:
        unknown = message.removeprefix("unrecognized arguments: ") if message.startswith("unrecognized") else ""
        if unknown.startswith("--"):
            message += did_you_mean(
                unknown.split()[0].split("=")[0], [f for f in self._option_string_actions if f.startswith("--")]
            )
        if choice := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            message += did_you_mean(choice[1], [name.strip(" '") for name in choice[2].split(",")])
        self.exit(2, f"{self.prog}: error: {message}\n")


def _add_command(commands: Any, name: str, help: str, description: str, **options: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=help, description=description, epilog=EXIT_CODES, allow_abbrev=False, **options
    )
    return parser


def _settings_parser(commands: Any, name: str, help: str, description: str) -> argparse.ArgumentParser:
    parser = _add_command(commands, name, help, description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.usage = f"faceflow {name} INPUT OUTPUT [options]"
    for key in ("input", "output"):
        parser.add_argument(key, metavar=key.upper(), nargs="?", default=UNSET, help=SETTINGS[key].help)
    _add_settings(parser, name)
    return parser


def _add_settings(parser: argparse.ArgumentParser, command: str) -> None:
    """The settings that a command obeys, by group, and how it reports."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for key, setting in SETTINGS.items():
        if key in ("input", "output") or command not in setting.commands:
            continue
        if setting.group not in groups:
            groups[setting.group] = parser.add_argument_group(setting.group)
        _add_setting(groups[setting.group], key)
    more = parser.add_argument_group("configuration and output")
    more.add_argument("--config", metavar="FILE", help="TOML file with any of these settings; flags win over it")
    more.add_argument("--json", action="store_true", help="print one JSON object as the last line of stdout")
    more.add_argument("--quiet", action="store_true", help="no progress bars and no stage lines on stderr")
    more.add_argument(
        "--log-format", choices=logs.FORMATS, default="text", help="log lines on stderr as text or JSON objects (default: text)"
    )


def _add_setting(group: argparse._ArgumentGroup, key: str) -> None:
    setting, flag = SETTINGS[key], f"--{key.replace('_', '-')}"
    if is_switch(key):
        group.add_argument(flag, dest=key, action="store_const", const=True, default=UNSET, help=setting.help)
        return
    shown = "" if DEFAULTS[key] is None else f" (default: {DEFAULTS[key]})"
    metavar = setting.metavar or "|".join(choices_of(key)) or "TEXT"
    group.add_argument(flag, dest=key, default=UNSET, help=(setting.help + shown).replace("%", "%%"), metavar=metavar)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(
        prog="faceflow",
        description="Cluster millions of face embeddings: neighbor search on Ray, a pruned graph, Infomap.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"faceflow {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    _settings_parser(
        commands,
        "cluster",
        "cluster a Parquet data set of face embeddings",
        "Give every face of INPUT a cluster id and publish the labels under OUTPUT:\n"
        "  OUTPUT/labels/run=<run id>/part-*.parquet   id (its own type), cluster (int64), in input order\n"
        "  OUTPUT/latest.json                          names the current labels; replaced atomically\n"
        "Run the same command again after an interruption: it continues from what is finished.",
    )
    _settings_parser(
        commands,
        "nightly",
        "cluster a growing data set again: an incremental run",
        "An incremental run on top of the current one: only new and changed files are read, only their faces are searched "
        "for,\n"
        "and a cluster keeps its id. Also written:\n"
        "  OUTPUT/events/run=<run id>/   what became of the clusters: created, grown, shrunk, merged, split, vanished\n"
        "  OUTPUT/moves/run=<run id>/    every face in another cluster than before (from or to null: new, or removed)\n"
        "The first run on an OUTPUT is a full run, and so is every --full-every'th.",
    )
    evaluate = _add_command(
        commands,
        "evaluate",
        "score labels against known identities",
        "Pairwise and BCubed precision, recall and F, NMI and ARI of LABELS against TRUTH.",
    )
    evaluate.add_argument("labels", metavar="LABELS", help="an OUTPUT folder (follows latest.json) or label Parquet")
    evaluate.add_argument("truth", metavar="TRUTH", help="Parquet with an id and a label column; a file, folder or glob")
    evaluate.add_argument("--label-column", default="label", metavar="TEXT", help="identity column of TRUTH (default: label)")
    evaluate.add_argument("--partial", action="store_true", help="score only the faces that TRUTH names")
    evaluate.add_argument("--id-column", default="id", metavar="TEXT", help="id column of TRUTH (default: id)")
    compare = _add_command(
        commands,
        "compare",
        "run published clustering methods on one neighbor table and score them",
        "Cluster INPUT once, run every method on its neighbor table, and score each against TRUTH: a table as text and CSV,\n"
        "a plot, and each method's labels, in OUTPUT/compare/run=<run id>/. Needs the methods extra.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    compare.add_argument("input", metavar="INPUT", help="as for cluster; or a neighbor table, .npz")
    compare.add_argument("truth", metavar="TRUTH", help="Parquet with an id and a label column; may be INPUT itself")
    compare.add_argument(
        "--output", default="compare-out", metavar="OUTPUT", help="folder or s3:// prefix (default: compare-out)"
    )
    compare.add_argument(
        "--methods", metavar="A,B", help="only these methods (default: all but those that need the number of clusters)"
    )
    compare.add_argument("--label-column", default="label", metavar="TEXT", help="identity column of TRUTH (default: label)")
    _add_settings(compare, "compare")
    scaling = _add_command(
        commands,
        "scaling",
        "measure time against workers and faces",
        "Run `cluster` on INPUT over numbers of workers and of faces on one Ray cluster, check that the labels agree, and\n"
        "write scaling.json, .csv, .png and reading.txt into OUTPUT: time, speed-up, efficiency, growth, projections.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    scaling.add_argument("input", metavar="INPUT", help="as for cluster")
    scaling.add_argument(
        "--output", default="scaling-out", metavar="OUTPUT", help="folder or s3:// prefix (default: scaling-out)"
    )
    scaling.add_argument("--workers", dest="counts", default="1,2", metavar="1,2,4", help="numbers of workers (default: 1,2)")
    scaling.add_argument("--faces", metavar="100k,1M", help="numbers of faces, from INPUT's first on (default: all)")
    scaling.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of each, interleaved (default: 3)")
    scaling.add_argument("--predict", metavar="8:5M,16:5M", help="workers:faces to project (default: up to 8 times as many)")
    _add_settings(scaling, "scaling")
    plan = _add_command(
        commands,
        "plan",
        "predict time, memory and disk of a run, and check that it fits",
        "Predict faces, edges, memory, disk and seconds from a sample of INPUT and the Ray cluster. Writes nothing.\n"
        "Exit code 2 if the run cannot fit; the message says what to change.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plan.add_argument("input", metavar="INPUT", help="as for cluster")
    plan.add_argument("output", metavar="OUTPUT", nargs="?", default=".", help="as for cluster; for the space on its disk")
    _add_settings(plan, "plan")
    synthesize = _add_command(
        commands,
        "synthesize",
        "write a synthetic data set of faces with known identities",
        "Write synthetic faces (id, embedding, label) as Parquet files into the folder OUTPUT.",
    )
    synthesize.add_argument("output", metavar="OUTPUT", help="an empty or new folder, or an s3:// prefix")
    synthesize.add_argument("--faces", type=int, required=True, metavar="N", help="number of faces")
    synthesize.add_argument("--dim", type=int, default=256, metavar="D", help="dimension of the embeddings (default: 256)")
    synthesize.add_argument("--mean-size", type=float, default=68.5, metavar="X", help="mean faces an identity (default: 68.5)")
    synthesize.add_argument(
        "--sizes", metavar="FILE", help="Parquet with cluster_size and clusters: a size distribution to follow"
    )
    synthesize.add_argument(
        "--look",
        default="plain",
        metavar="NAME",
        help="plain: identities far apart; ms1m: as in MS-Celeb-1M, with poor photos and wrong labels (default: plain)",
    )
    synthesize.add_argument("--seed", type=int, default=0, metavar="N", help="seed; same arguments, same faces (default: 0)")
    imports = _add_command(
        commands,
        "import",
        "convert a published benchmark's files to Parquet",
        "Write FEATURES (.bin of float32, or .npy) and their labels as Parquet (id, embedding, label) into the folder OUTPUT.",
    )
    imports.add_argument("features", metavar="FEATURES", help="a local .bin file of float32 rows, or a .npy array [faces, dim]")
    imports.add_argument("output", metavar="OUTPUT", help="an empty or new folder, or an s3:// prefix")
    imports.add_argument("--dim", type=int, metavar="D", help="dimension of the embeddings; needed for .bin")
    imports.add_argument("--labels", metavar="FILE", help=".meta text with one integer a line, or .npy vector")
    runs = _add_command(
        commands,
        "runs",
        "list the runs of an OUTPUT",
        "State, furthest stage, age and size of every run of OUTPUT, the newest first; * marks the current one.",
    )
    clean = _add_command(
        commands,
        "clean",
        "remove old runs of an OUTPUT",
        "Remove all but the newest runs of OUTPUT with their labels; never the current run, nor an unfinished one "
        "that was begun or continued within a day.",
    )
    clean.add_argument("--keep", type=int, required=True, metavar="N", help="runs to keep beside the current one")
    clean.add_argument("--dry-run", action="store_true", help="only list what would be removed")
    diff = _add_command(
        commands,
        "diff",
        "list what changed between two runs of an OUTPUT",
        "Count the faces that moved, came and went between RUN_A and RUN_B and what became of the clusters, and list both as "
        "events.parquet and moves.parquet.",
    )
    diff.add_argument("output", metavar="OUTPUT", help="OUTPUT of cluster and nightly commands")
    diff.add_argument(
        "first", metavar="RUN_A", help="run id of the older labels; or `previous`, the run before the current one"
    )
    diff.add_argument("second", metavar="RUN_B", help="run id of the newer labels; or `latest`, the current run")
    diff.add_argument("--to", metavar="FOLDER", help="where the lists go (default: OUTPUT/diffs/RUN_A..RUN_B)")
    status = _add_command(
        commands,
        "status",
        "show how far a run of an OUTPUT is",
        "Stage, step, rows, rate and retries of a running run, or of the last one, from any machine that can read OUTPUT.",
    )
    status.add_argument("--run-id", metavar="ID", help="a run (default: the one with the last heartbeat)")
    report = _add_command(
        commands,
        "report",
        "write the report of a run again",
        "Write report.html and its charts for a finished run of OUTPUT; every run writes its own at the end.",
    )
    report.add_argument("--run-id", metavar="ID", help="a run (default: the current one)")
    report.add_argument("--thumbnails", metavar="TEMPLATE", help=SETTINGS["thumbnails"].help)
    report.add_argument("--to", metavar="FOLDER", help="where it goes (default: OUTPUT/reports/run=<run id>)")
    for command in (runs, clean, status, report):
        command.add_argument("output", metavar="OUTPUT", help="OUTPUT of cluster commands")
        command.add_argument("--work-dir", metavar="DIR", help="where their run directories lie (default: OUTPUT/_runs)")
    for command in (evaluate, synthesize, imports, runs, clean, status, report, diff):
        command.add_argument("--storage-options", metavar="JSON", help="options of the s3fs file system, as JSON")
        command.add_argument("--json", action="store_true", help="print one JSON object as the last line of stdout")
    for command in commands.choices.values():
        command.set_defaults(parser=command)
    return parser
