"""Stages of the report: the config's tables and figures, and the page."""

from dataclasses import replace
from pathlib import Path

from stm.config import FigureSpec, TableSpec
from stm.evaluation.masks.stage import CROP_AGREEMENT, MASK_QUALITY
from stm.report.names import figure_names, table_names, untrained_runs
from stm.stages.declaration import Files, Stage
from stm.stages.jobs import Job
from stm.training.stage import weights_of


def _metrics_of(job: Job, run: str, task: str) -> Path:
    """Path of an evaluation's results, which are stored with the run, regardless of the evaluation dataset."""
    return job.on(job.study.dataset_of(run)).layout.metrics(run, task)


def _cells(job: Job, spec: TableSpec | FigureSpec) -> list[Path]:
    """Files that contain the numbers of a table or figure, one per seed, and those that a table's are compared with."""
    cells = spec.cells()
    if isinstance(spec, TableSpec):
        cells |= {
            (run, column.task)
            for number, column in enumerate(spec.columns)
            for run in untrained_runs(job.study, spec, number)
        }
    return [_metrics_of(job, instance, task) for run, task in sorted(cells) for instance in job.study.instances(run)]


def _drawn_runs(job: Job) -> list[str]:
    return [run for name in job.study.figures[job.figure].runs.values() for run in job.study.instances(name)]


def _drawn(job: Job) -> Files:
    """Inputs of a figure: weights and clips, logs, or evaluation results."""
    spec, study = job.study.figures[job.figure], job.study
    instances = _drawn_runs(job)
    inputs = {"weights": [weights_of(job, run) for run in instances], "cells": _cells(job, spec)}
    if spec.kind == "clips":
        datasets = sorted({study.dataset_of(run) for run in instances})
        inputs["shards"] = [path for name in datasets for path in job.on(name).packed()]
    return inputs


def _of_dataset(job: Job) -> list[Path]:
    """Paths of one dataset's offline results that the page shows."""
    config, layout, shards = job.config, job.layout, job.shards()
    inputs = [layout.quarantine, *(layout.frames(shard) for shard in shards)]
    # A dataset used only for transfer neither packs nor needs captions.
    sources = config.captions if MASK_QUALITY.applies(config) or config.pack.sources else ()
    guided = [shard for shard in shards if replace(job, shard=shard).guided]
    inputs += [layout.captions(source, shard) for source in sources for shard in guided]
    for stage in (MASK_QUALITY, CROP_AGREEMENT):
        inputs += list(stage.outputs(job).values()) if stage.applies(config) else []
    return inputs + job.packed()


def _shown(job: Job) -> Files:
    """All inputs of the page."""
    study, layout = job.study, job.layout
    tables = [layout.tables / f"{name}.csv" for name in study.tables]
    figures = [layout.figures / f"{name}.png" for name in study.figures]
    return {
        "plan": layout.plan,
        "datasets": [path for name in study.dataset_names for path in _of_dataset(job.on(name))],
        "weights": [weights_of(job, run) for run in study.runs],
        "metrics": [_metrics_of(job, run, task) for run, task in study.evaluations()],
        "shown": tables + figures,
    }


def _write_table(job: Job, inputs: Files, outputs: Files, processes: int) -> str:
    from stm.report import write_table

    return str(write_table(job.study, job.table))


def _write_figure(job: Job, inputs: Files, outputs: Files, processes: int) -> str:
    from stm.report import write_figure

    return str(write_figure(job.study, job.figure))


def _write_report(job: Job, inputs: Files, outputs: Files, processes: int) -> str:
    from stm.report import build_report

    build_report(job.study, job.layout)
    return str(job.layout.report)


TABLE = Stage(
    name="table",
    title="a table of a paper",
    per=("table",),
    inputs=lambda job: {"cells": _cells(job, job.study.tables[job.table])},
    outputs=lambda job: {
        "csv": job.layout.tables / f"{job.table}.csv",
        "markdown": job.layout.tables / f"{job.table}.md",
    },
    settings=("tables.{table}",),
    partial=True,
    run=_write_table,
)

FIGURE = Stage(
    name="figure",
    title="a figure of a paper",
    per=("figure",),
    inputs=_drawn,
    runs=lambda job: _drawn_runs(job) if job.study.figures[job.figure].kind == "clips" else (),
    outputs=lambda job: {"png": job.layout.figures / f"{job.figure}.png"},
    settings=("figures.{figure}",),
    partial=True,
    run=_write_figure,
)

REPORT = Stage(
    name="report",
    title="tables, figures and the page",
    per=(),
    inputs=_shown,
    outputs=lambda job: {
        "page": job.layout.report,
        "provenance": job.layout.provenance,
        "figures": [job.layout.figures / name for name in figure_names(job.study)],
        "tables": [job.layout.tables / name for name in table_names(job.study)],
    },
    settings=("*",),
    threads=2,
    partial=True,
    run=_write_report,
)
