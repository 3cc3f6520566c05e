"""The rehearsal of a config from beginning to end."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stm.config import Config
from stm.rehearsal.copies.lay_out import LaidOut, lay_out
from stm.rehearsal.differences import Difference, describe_differences, list_differences
from stm.rehearsal.run import check_snakemake, run_workflow
from stm.rehearsal.shrink import shrink
from stm.rehearsal.stand_ins import write_stand_ins
from stm.storage.files import write_json


def rehearse(config: Config, folder: Path, record: Path, cores: int, targets: Sequence[str] = ()) -> str:
    """Run the whole workflow of a config at small size in `folder`, and write the record of it.

    Returns:
        what was rehearsed, in how much time, and what the full run would refuse.

    Raises:
        RehearsalError: a job failed.
        ModuleNotFoundError: Snakemake is not installed.
    """
    check_snakemake()
    small = shrink(config)
    differences = list_differences(config, small)
    print(
        f"The rehearsal of {config.name} differs from the full run in:\n{describe_differences(differences)}", flush=True
    )
    folder.mkdir(parents=True, exist_ok=True)
    copies = {}
    for name in config.dataset_names:
        laid_out = lay_out(config.of(name), small.of(name), folder, splits_of(config, name))
        if laid_out is not None:
            copies[name] = laid_out
            print(f"  {name}: {_describe(laid_out)}", flush=True)
    own = write_stand_ins(config, small, folder)
    done = run_workflow(small, folder, cores, targets)
    refused = {name: copy.problem for name, copy in copies.items() if copy.problem is not None}
    write_json(record, _record(differences, copies, own, done.jobs, done.seconds))
    message = f"The rehearsal of {config.name} ran all {done.jobs} jobs in {done.seconds / 60:.1f} minutes."
    if refused:
        problems = "\n".join(f"{name}: {problem}" for name, problem in refused.items())
        message += f"\nThe full run would refuse these datasets as they are:\n{problems}"
    return message


def splits_of(config: Config, dataset: str) -> list[str]:
    """Return the names of the splits of a dataset that runs and evaluations read, those for training first."""
    splits = []
    for name, run in config.pretrain.items():
        sources = (*run.video_sources, *run.image_sources)
        splits += [split for source, split in sources if (source or config.dataset_of(name)) == dataset]
    for name, task in config.evaluate.items():
        if any(config.dataset_of(run, name) == dataset for run in config.runs_of(name)):
            splits += task.splits.values()
    return list(dict.fromkeys(splits))


def _describe(copy: LaidOut) -> str:
    lists = "your lists" if copy.own_lists else "generated lists"
    return f"{lists}, {copy.own_files} of your files, {copy.generated} generated files"


def _record(
    differences: Sequence[Difference], copies: dict[str, LaidOut], own: list[str], jobs: int, seconds: float
) -> dict[str, Any]:
    return {
        "jobs": jobs,
        "seconds": round(seconds, 1),
        "differences": [{"key": list(d.key), "full": d.full, "rehearsed": d.rehearsed} for d in differences],
        "datasets": {name: copy._asdict() for name, copy in copies.items()},
        "own_models": own,
    }
