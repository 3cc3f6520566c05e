"""All stages, in the order of the data's journey.

They are named here and imported when asked for: a stage stands above this list in the house, beside the code that does it.
"""

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from stm.config import parse_config
from stm.jobs.progress import log_to
from stm.stages.declaration import Files, Stage
from stm.stages.jobs import Jobs

JOURNEY = (
    "stm.demo.stage:DEMO_MODELS",
    "stm.plan.stage:PLAN",
    "stm.datasets.moving_shapes.stage:GENERATE",
    "stm.datasets.stage:MANIFEST",
    "stm.datasets.stage:SPLIT",
    "stm.preprocess.frames.stage:FRAMES",
    "stm.preprocess.captions.stage:CAPTIONS",
    "stm.preprocess.similarity.stage:EMBEDDINGS",
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


@cache
def all_stages() -> dict[str, Stage]:
    """Every stage by its name, in the order of the journey."""
    stages: list[Stage] = []
    for place in JOURNEY:
        module, _, name = place.partition(":")
        stages.append(getattr(import_module(module), name))
    return {stage.name: stage for stage in stages}


def run_stage(
    name: str, config: Any, wildcards: Mapping[str, str], inputs: Files, outputs: Files, processes: int, log: Path
) -> None:
    """Does one job of the workflow.

    Args:
        config: as Snakemake has it: plain values.
        inputs, outputs: by name, as the stage declares them.
        log: gets what the stage writes to standard error, and its traceback if it fails.
    """
    job = Jobs(parse_config(config)).make(**wildcards)
    with log_to(log):
        if told := all_stages()[name].run(job, inputs, outputs, processes):
            print(told)
