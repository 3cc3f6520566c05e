"""All stages, in the order in which data passes through them.

Stages are listed by name and imported on first use, because each is declared next to the code that it runs, in a
package that may import this module.
"""

import gc
import logging
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from stm.config import Config, parse_config
from stm.jobs.gpus import claim_gpus
from stm.jobs.messages import configure_messages
from stm.jobs.progress import log_duration, log_to
from stm.pretrained.local_files import find_missing
from stm.stages.declaration import Files, Stage
from stm.stages.jobs import Jobs
from stm.stages.provenance import check_inputs

_log = logging.getLogger(__name__)

JOURNEY = (
    "stm.demo.stage:DEMO_MODELS",
    "stm.plan.stage:PLAN",
    "stm.rehearsal.stage:REHEARSE",
    "stm.datasets.moving_shapes.stage:GENERATE",
    "stm.datasets.stage:MANIFEST",
    "stm.datasets.stage:SPLIT",
    "stm.preprocess.frames.stage:FRAMES",
    "stm.preprocess.captions.stage:CAPTIONS",
    "stm.preprocess.similarity.stage:EMBEDDINGS",
    "stm.preprocess.similarity.stage:JOINT_SIMILARITY",
    "stm.preprocess.similarity.stage:SIMILARITY",
    "stm.preprocess.text.stage:TEXT",
    "stm.preprocess.motion.stage:MOTION",
    "stm.preprocess.flow.stage:FLOW",
    "stm.preprocess.packing.stage:SHARDS",
    "stm.training.stage:PRETRAIN",
    "stm.evaluation.stage:EVALUATE",
    "stm.evaluation.masks.stage:MASK_QUALITY",
    "stm.evaluation.masks.stage:CROP_AGREEMENT",
    "stm.report.stage:TABLE",
    "stm.report.stage:FIGURE",
    "stm.report.stage:REPORT",
)

# Large enough for imports, and small enough that decoders in reference cycles are still released promptly.
OBJECTS_PER_COLLECTION = 10_000


@cache
def all_stages() -> dict[str, Stage]:
    """Return all stages by name, in the order of `JOURNEY`."""
    stages: list[Stage] = []
    for entry in JOURNEY:
        module, _, name = entry.partition(":")
        stages.append(getattr(import_module(module), name))
    return {stage.name: stage for stage in stages}


def missing_models(study: Config) -> list[str]:
    """Return one line per local model of any stage that does not exist: the path, and the first job that needs it."""
    jobs = Jobs(study, lambda dataset: ["any-00000"])  # a stage's jobs on different shards have the same models
    found: dict[str, str] = {}
    for stage in all_stages().values():
        for dataset in study.dataset_names if "dataset" in stage.per else [""]:
            for job in stage.each(jobs, dataset):
                for model in (model for models in stage.models(job).values() for model in models):
                    path = find_missing(model)
                    if path is not None:
                        parts = (stage.name, "" if job.run else job.dataset, job.source, job.run, job.task)
                        found.setdefault(path, "/".join(filter(None, parts)))
    return [f"{path} (no such file or folder; for {job})" for path, job in found.items()]


def run_stage(
    name: str,
    config: Any,
    wildcards: Mapping[str, str],
    inputs: Files,
    outputs: Files,
    processes: int,
    log: Path,
    gpus: int = 0,
) -> None:
    """Run one job of the workflow.

    Args:
        config: the config as passed by Snakemake, in plain Python types.
        inputs, outputs: paths by name, as declared by the stage.
        log: file that receives the stage's standard error, and the traceback if the stage fails.
        gpus: GPUs that the job requests; see `stm.jobs.gpus.claim_gpus`.
    """
    # Importing torch, timm or transformers creates millions of objects that all stay alive. By default Python searches them for
    # garbage after every 700 new objects, which takes up to a sixth of the time of these imports.
    gc.set_threshold(OBJECTS_PER_COLLECTION)
    job = Jobs(parse_config(config)).make(**wildcards)
    configure_messages()
    with log_to(log), log_duration("/".join([name, *wildcards.values()])):
        stage = all_stages()[name]
        _log_files("input", inputs)
        _log_files("output", outputs)
        check_inputs(stage, job, all_stages())
        claim_gpus(gpus, "/".join([name, *wildcards.values()]))
        if message := stage.run(job, inputs, outputs, processes):
            print(message)


def _log_files(what: str, files: Files) -> None:
    for name, value in files.items():
        paths = [value] if isinstance(value, Path) else list(value)
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        _log.debug(f"{what} {name}: {paths[0] if paths else 'none'}{more}")
