"""What Python users call: whole runs, and the report that each ends with."""

from __future__ import annotations

from faceflow import logs
from faceflow.config import ClusterConfig
from faceflow.runs import pipeline
from faceflow.runs.result import RunResult
from faceflow.tools.report.page import write_report


def run_clustering(config: ClusterConfig, *, progress: bool = True, report: bool = True) -> RunResult:
    """Cluster all faces of `config.input` and publish their labels under `config.output`.

    Call it again with the same settings after an interruption: it continues from the finished tasks.

    Parameters
    ----------
    config : ClusterConfig
        All settings of the run.
    progress : bool
        Show progress bars on a terminal; in a notebook also a line a stage, unless log records have a handler already.
    report : bool
        Write report.html once the labels are current.

    Returns
    -------
    RunResult
        Counts, scores that need no labels, seconds, and where the labels are.

    Raises
    ------
    InputError
        The input cannot be used; nothing was published.
    SettingsError
        A setting is wrong or does not fit the unfinished run; nothing was published.
    RunError
        The run could not finish; the same call continues it.
    QualityError
        A quality gate failed (`min_recall`, `verify_codelength`); nothing was published.
    PublishError
        Another run published first.
    """
    with logs.lines_in_notebook(progress):
        return pipeline.execute(config, incremental=False, progress=progress, report=write_report if report else None)


def run_nightly(config: ClusterConfig, *, progress: bool = True, report: bool = True) -> RunResult:
    """Cluster a growing data set again: an incremental run on top of the current one.

    Only new and changed faces are read and searched, and a cluster keeps its id. The first run on an OUTPUT is a full run, and
    so is every `config.full_every`-th, and one after a change that the current run cannot be built on (the log says which).
    Where nothing changed, the current labels stay, and the result is that run's.

    Parameters, result and errors are those of `run_clustering`.
    """
    with logs.lines_in_notebook(progress):
        return pipeline.execute(config, incremental=True, progress=progress, report=write_report if report else None)
