"""What the config alone says of a report: the names of its files, and the runs that a table compares with.

The workflow declares them, so importing this module is cheap.
"""

from stm.config import Config, TableSpec


def shown_datasets(config: Config) -> list[str]:
    """Return the datasets whose clips are shown: the training datasets of the runs, or all datasets without runs."""
    trained_on = [name for name in config.dataset_names if any(run.dataset == name for run in config.pretrain.values())]
    return trained_on or list(config.dataset_names)


def table_names(config: Config) -> list[str]:
    """Return the file names under `tables/` that `build_report` writes: each table as CSV and Markdown.

    `config.tables` are excluded, as `write_table` writes them.
    """
    classified = any(task.per_class for task in config.evaluate.values())
    stems = ["expectations"] if config.report.expect else []
    stems += ["results"] if config.pretrain else []
    stems += ["per_class"] if config.pretrain and classified else []
    stems += ["mask_quality"] if measures_masks(config) else []
    stems += ["quarantine"]
    return [f"{stem}.{ending}" for stem in stems for ending in ("csv", "md")]


def figure_names(config: Config) -> list[str]:
    """Return the file names under `figures/` that `build_report` writes, whether or not their results exist.

    `config.figures` are excluded, as `write_figure` writes them.
    """
    names = ["loss_curves.png"] if config.pretrain else []
    names += ["mask_quality.png"] if measures_masks(config) else []
    for dataset in shown_datasets(config) if config.report.clips else []:
        names += [clip_name(config, dataset, number) for number in range(1, config.report.clips + 1)]
        names += [masks_name(config, dataset)]
    return names


def clip_name(config: Config, dataset: str, number: int) -> str:
    """Return the file name of a clip's figure; `number` starts at 1."""
    return f"clip_{dataset}_{number}.png" if config.datasets else f"clip_{number}.png"


def masks_name(config: Config, dataset: str) -> str:
    """Return the file name of the figure with all masks."""
    return f"masks_{dataset}.png" if config.datasets else "masks.png"


def measures_masks(config: Config) -> bool:
    return any(config.of(name).mask_quality is not None for name in config.dataset_names)


def untrained_runs(config: Config, spec: TableSpec, column: int) -> list[str]:
    """Return the untrained runs that a column's numbers are compared with, whether or not the table has rows for them."""
    task = spec.columns[column].task
    runs = {run for row in spec.rows if (run := row.run_of(column)) is not None}
    datasets = {config.dataset_of(run, task) for run in runs}
    return [
        run
        for run in config.runs_of(task)
        if not config.pretrain[run].trains_encoder and config.dataset_of(run, task) in datasets
    ]
