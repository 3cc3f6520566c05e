# Shared by all stages: the checked config, where results go, and the lists of shards that the split yields.

from functools import cache
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.utils import validate

from stm.config import ConfigError, parse_config
from stm.datasets import list_fingerprint
from stm.files import local_model_files
from stm.layout import Layout, dataset_root
from stm.manifest import read_shards, split_of
from stm.report import figure_names, table_names

try:
    CONFIG = parse_config(config, ", ".join(map(str, workflow.configfiles)) or "config")
except ConfigError as error:
    raise WorkflowError(str(error)) from None

# The schema is generated from the same classes; defaults stay theirs, jsonschema would fill in those of the wrong source.
validate(config, workflow.source_path("../../config/schema.json"), set_default=False)

LAYOUT = Layout.of(CONFIG)
ROOT = LAYOUT.root.as_posix()
GENERATED = CONFIG.dataset.source == "moving-shapes"


wildcard_constraints:
    shard=r"[A-Za-z0-9][A-Za-z0-9_-]*-\d{5}",
    split=r"[A-Za-z0-9][A-Za-z0-9_-]*",
    source=r"[A-Za-z0-9][A-Za-z0-9_-]*",
    run=r"[A-Za-z0-9][A-Za-z0-9_-]*",
    task=r"[A-Za-z0-9][A-Za-z0-9_-]*",


def dump(section):
    """What decides in a section of the config, for `params`: when it changes, what depends on it is rerun.

    Keys that change no byte of a result (deadlines, loading processes) are left out; the scripts find them in the config.
    """
    return section.deciding()


@cache
def listing():
    """The state of the dataset's files. Asked for when a job needs it: jobs on a cluster read these files too."""
    return list_fingerprint(CONFIG)


def share_of_cores(jobs):
    """Threads of one of so many like jobs. Small models lose by more threads; runs side by side do not."""
    return max(1, (workflow.cores or 1) // max(1, jobs))


def all_shards(split=None):
    """The shards of a split (of all splits when None); waits for the checkpoint that deals the clips."""
    index = Path(checkpoints.split.get().output.index)
    return [shard for shard in read_shards(index) if split in (None, split_of(shard))]


def slice_of(wildcards):
    """The slice of a shard. It is no declared output: unchanged slices stay untouched when the split runs again."""
    checkpoints.split.get()
    return LAYOUT.slice(wildcards.shard).as_posix()


def packed(split):
    """Index files of a split's packed shards, the tars lie beside them."""
    return [LAYOUT.shard(shard).as_posix() for shard in all_shards(split)]


def annotations():
    """The annotation file of a folder dataset, if it has one."""
    path = getattr(CONFIG.dataset, "annotations", None)
    return [path] if path else []


def source_model(wildcards):
    """The files of a caption source's model, when it is a local folder."""
    return local_model_files(getattr(CONFIG.captions[wildcards.source], "model", None))


def similarity_inputs(wildcards):
    """What a shard's similarity is computed from; the embeddings too, where they are kept."""
    inputs = {
        "tar": LAYOUT.frames_tar(wildcards.shard).as_posix(),
        "frames": LAYOUT.frames(wildcards.shard).as_posix(),
        "captions": LAYOUT.captions(wildcards.source, wildcards.shard).as_posix(),
        "model": local_model_files(CONFIG.similarity.model),
    }
    if CONFIG.similarity.keep_embeddings:
        inputs["embeddings"] = LAYOUT.embeddings(wildcards.shard).as_posix()
    return inputs


def shard_inputs(wildcards):
    """What is packed into a shard."""
    pack = CONFIG.pack
    inputs = {
        "slice": slice_of(wildcards),
        "tar": LAYOUT.frames_tar(wildcards.shard).as_posix(),
        "frames": LAYOUT.frames(wildcards.shard).as_posix(),
    }
    if pack.captions is not None:
        inputs["captions"] = LAYOUT.captions(pack.captions, wildcards.shard).as_posix()
        if pack.similarity:
            inputs["similarity"] = LAYOUT.similarity(
                pack.captions, wildcards.shard
            ).as_posix()
    if pack.motion:
        inputs["motion"] = LAYOUT.motion(wildcards.shard).as_posix()
    return inputs


def task_splits(wildcards):
    """The packed shards that an evaluation reads."""
    task = CONFIG.evaluate[wildcards.task]
    return {"train": packed(task.train_split), "test": packed(task.test_split)}


def mask_quality_inputs(wildcards):
    """Every caption source's similarity, the motion and the true boxes of the measured split."""
    shards = all_shards(CONFIG.mask_quality.split)
    return {
        "frames": [LAYOUT.frames(shard).as_posix() for shard in shards],
        "similarity": [
            LAYOUT.similarity(source, shard).as_posix()
            for source in CONFIG.captions
            for shard in shards
        ],
        "motion": [LAYOUT.motion(shard).as_posix() for shard in shards],
        "truth": (LAYOUT.generated / "truth.parquet").as_posix(),
    }


def faithfulness_inputs(wildcards):
    """The frames and the packed source's similarity of the measured split."""
    shards = all_shards(CONFIG.mask_quality.split)
    source = CONFIG.pack.captions
    return {
        "tars": [LAYOUT.frames_tar(shard).as_posix() for shard in shards],
        "frames": [LAYOUT.frames(shard).as_posix() for shard in shards],
        "similarity": [LAYOUT.similarity(source, shard).as_posix() for shard in shards],
    }


def report_inputs(wildcards):
    """Everything that the report shows."""
    shards = all_shards()
    inputs = {
        "quarantine": LAYOUT.quarantine.as_posix(),
        "plan": LAYOUT.plan.as_posix(),
        "frames": [LAYOUT.frames(shard).as_posix() for shard in shards],
        "captions": [
            LAYOUT.captions(source, shard).as_posix()
            for source in CONFIG.captions
            for shard in shards
        ],
        "shards": packed(None),
        "weights": [
            (LAYOUT.pretrain(run) / "weights.safetensors").as_posix()
            for run in CONFIG.pretrain
        ],
        "metrics": [
            (LAYOUT.evaluate(run, task) / "metrics.json").as_posix()
            for run in CONFIG.pretrain
            for task in CONFIG.evaluate
        ],
    }
    if CONFIG.mask_quality is not None:
        inputs["mask_quality"] = LAYOUT.mask_quality.as_posix()
        if CONFIG.pack.captions is not None:
            inputs["faithfulness"] = LAYOUT.faithfulness.as_posix()
    return inputs
