# Shared by all stages: the checked config, where results go, and the lists of shards that the split yields.

import inspect
import os
from functools import cache
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.utils import validate

from stm.config import (
    BenchmarkDataset,
    ConfigError,
    LanguageDataset,
    resolve_config,
    parse_config,
)
from stm.datasets import DatasetError, list_fingerprint
from stm.datasets.actions import check_benchmark
from stm.datasets.video_text import check_language
from stm.datasets.video_text.tasks import check_tasks
from stm.storage.receipts import library_versions
from stm.pretrained.local_files import local_model_files, without_folders
from stm.layout import Layout, dataset_root
from stm.manifest import read_shards, split_of
from stm.report.names import figure_names, table_names

try:
    # `extends` is ours; from here on, and for the scripts, `config` has what it stands for.
    resolved = resolve_config(
        config, workflow.configfiles, workflow.config_settings.config
    )
    config.clear()
    config.update(resolved)
    CONFIG = parse_config(config, ", ".join(map(str, workflow.configfiles)) or "config")
    check_tasks(CONFIG)
except (ConfigError, DatasetError) as error:
    raise WorkflowError(str(error)) from None

# The schema is generated from the same classes; defaults stay theirs, jsonschema would fill in those of the wrong source.
validate(config, workflow.source_path("../../config/schema.json"), set_default=False)

# Each dataset has a folder of its own, and what is shown of them all another; with one dataset the two are one.
CORPORA = {name: CONFIG.of(name) for name in CONFIG.dataset_names}
LAYOUTS = {name: Layout.of(CONFIG, name) for name in CORPORA}
ROOT = f"{CONFIG.results}/{{dataset}}"
SHOWN = Layout.of(CONFIG).root.as_posix()


wildcard_constraints:
    dataset="|".join(CORPORA),
    shard=r"[A-Za-z0-9][A-Za-z0-9_-]*-\d{5}",
    split=r"[A-Za-z0-9][A-Za-z0-9_-]*",
    source=r"[A-Za-z0-9][A-Za-z0-9_-]*",
    run=r"[A-Za-z0-9][A-Za-z0-9_-]*",
    task=r"[A-Za-z0-9][A-Za-z0-9_-]*",
    table="|".join(CONFIG.tables) or "-",
    figure="|".join(CONFIG.figures) or "-",


# Whether results are shared with other projects.
SHARED = workflow.workflow_settings.cache is not None
if SHARED:
    # Snakemake itself looks at the folder when the first result is to go there: after the work.
    place = os.environ.get("SNAKEMAKE_OUTPUT_CACHE", "")
    if "://" not in place and not (place and os.access(place, os.W_OK)):
        raise WorkflowError(
            "--cache: set the environment variable SNAKEMAKE_OUTPUT_CACHE to a folder that exists and can be written; "
            f"it is {place!r}"
        )
SOFTWARE = library_versions(
    (
        "av",
        "numpy",
        "opencv-python-headless",
        "open_clip_torch",
        "pyarrow",
        "simplejpeg",
    )
    + ("timm", "tokenizers", "torch", "torchvision", "transformers")
)


def signed(function):
    """Notes a function's signature. Snakemake asks for it anew in every job, which costs a tenth of a large dry run."""
    function.__signature__ = inspect.signature(function)
    return function


def dump(section):
    """What decides in a section of the config, for `params`: when it changes, what depends on it is rerun.

    Keys that change no byte of a result (deadlines, loading processes) are left out; the scripts find them in the config.
    """
    return section.fingerprint()


def stage(*keys):
    """For `params`: what decides in a section of the dataset's config, found by the keys that lead to it.

    Local models go by their own names: their files are inputs, and where they lie makes no other result.
    """

    @cache
    def find(dataset):
        section = CORPORA[dataset]
        for key in keys:
            section = getattr(section, key)
        return (
            without_folders(dump(section))
            if hasattr(section, "fingerprint")
            else section
        )

    return signed(lambda wildcards: find(wildcards.dataset))


@cache
def caption_settings(dataset, source):
    """For `params`: what decides in a caption source."""
    return without_folders(dump(CORPORA[dataset].captions[source]))


@signed
def software(wildcards, input):
    """For `params` of rules whose results can be shared: it stands in for an environment in the shared results' keys.

    The unused `input` is why Snakemake takes it for no reason to run a finished job again.
    """
    return SOFTWARE


@cache
def listing(dataset):
    """The state of the dataset's files. Asked for when a job needs it: jobs on a cluster read these files too."""
    return list_fingerprint(CORPORA[dataset])


def share_of_cores(jobs):
    """Threads of one of so many like jobs. Small models lose by more threads; runs side by side do not.

    A cluster has no number of cores to share: there its profile sets the threads.
    """
    return max(1, (workflow.resource_settings.cores or 1) // max(1, jobs))


def each_attempt(megabytes):
    """Memory of a job: as much again for each further attempt. One that was killed for its memory would be killed again."""
    return signed(lambda wildcards, attempt: megabytes * attempt)


@cache
def shards_in(index, changed):
    """The shards that an index names; `changed` is the time of its last change."""
    return read_shards(index)


def all_shards(dataset, split=None):
    """The shards of a split (of all splits when None); waits for the checkpoint that deals the clips."""
    index = Path(checkpoints.split.get(dataset=dataset).output.index)
    shards = shards_in(index, index.stat().st_mtime_ns)
    return [shard for shard in shards if split in (None, split_of(shard))]


@signed
def slice_of(wildcards):
    """The slice of a shard. It is no declared output: unchanged slices stay untouched when the split runs again."""
    checkpoints.split.get(dataset=wildcards.dataset)
    return LAYOUTS[wildcards.dataset].slice(wildcards.shard).as_posix()


def packed(dataset, split):
    """Index files of a split's packed shards, the tars lie beside them."""
    shards = all_shards(dataset, split)
    if not shards:
        raise WorkflowError(
            f"the dataset {dataset} has no clips of the split {split!r}"
        )
    return [LAYOUTS[dataset].shard(shard).as_posix() for shard in shards]


def joined(dataset, sources):
    """The packed shards of all (dataset, split) pairs that a run trains on; None: its own dataset."""
    return [path for name, split in sources for path in packed(name or dataset, split)]


def annotation_files(dataset):
    """The annotation file of a folder, if it has one. A benchmark's lists are covered by `listing`."""
    path = getattr(CORPORA[dataset].dataset, "annotations", None)
    folder = CORPORA[dataset].dataset.source == "folder"
    return [path] if path and folder else []


@cache
def manifest_inputs(dataset):
    """What the manifest is made from.

    The copy of a benchmark is checked here, before any job runs: a wrong or partial one is said now, not after a day.
    """
    source = CORPORA[dataset].dataset
    if source.source == "moving-shapes":
        return [(LAYOUTS[dataset].generated / "annotations.parquet").as_posix()]
    if isinstance(source, BenchmarkDataset | LanguageDataset):
        check = (
            check_language if isinstance(source, LanguageDataset) else check_benchmark
        )
        try:
            check(source)
        except DatasetError as error:
            raise WorkflowError(str(error)) from None
    return annotation_files(dataset)


# Asked for by every job: a folder is read once.
model_files = cache(local_model_files)


def source_model(wildcards):
    """The files of a caption source's model, when it is a local folder."""
    source = CORPORA[wildcards.dataset].captions[wildcards.source]
    return model_files(getattr(source, "model", None))


def similarity_model(wildcards):
    """The files of the CLIP that scores patches, when it is a local folder."""
    return model_files(CORPORA[wildcards.dataset].similarity.model)


def text_model(dataset):
    """The files of the text encoder, when it is a local folder."""
    return model_files(CORPORA[dataset].text.model)


def flow_model(wildcards):
    """The file of RAFT's weights, where the flow is RAFT's."""
    return model_files(CORPORA[wildcards.dataset].flow.weights)


def captions_of(wildcards):
    """The captions of a shard by one source."""
    layout = LAYOUTS[wildcards.dataset]
    return layout.captions(wildcards.source, wildcards.shard).as_posix()


def similarity_inputs(wildcards):
    """What a shard's similarity is computed from; the embeddings too, where they are kept."""
    layout = LAYOUTS[wildcards.dataset]
    inputs = {
        "tar": layout.frames_tar(wildcards.shard).as_posix(),
        "frames": layout.frames(wildcards.shard).as_posix(),
        "captions": captions_of(wildcards),
        "model": similarity_model(wildcards),
    }
    if CORPORA[wildcards.dataset].similarity.keep_embeddings:
        inputs["embeddings"] = layout.embeddings(wildcards.shard).as_posix()
    return inputs


def shard_inputs(wildcards):
    """What is packed into a shard; captions, similarity and text are lists, in the order of the sources."""
    pack, layout, shard = (
        CORPORA[wildcards.dataset].pack,
        LAYOUTS[wildcards.dataset],
        wildcards.shard,
    )
    inputs = {
        "slice": slice_of(wildcards),
        "tar": layout.frames_tar(shard).as_posix(),
        "frames": layout.frames(shard).as_posix(),
        "captions": [layout.captions(s, shard).as_posix() for s in pack.sources],
    }
    if pack.similarity:
        inputs["similarity"] = [
            layout.similarity(s, shard).as_posix() for s in pack.sources
        ]
    if pack.text:
        inputs["text"] = [layout.text(s, shard).as_posix() for s in pack.sources]
    if pack.motion:
        inputs["motion"] = layout.motion(shard).as_posix()
    if pack.flow:
        inputs["flow"] = layout.flow(shard).as_posix()
    return inputs


def task_splits(wildcards):
    """The packed shards that an evaluation reads: of the run's own dataset, or of the one that the evaluation names."""
    task = CONFIG.evaluate[wildcards.task]
    dataset = task.dataset or wildcards.dataset
    inputs = {use: packed(dataset, split) for use, split in task.splits.items()}
    return inputs | {
        "text_model": text_model(wildcards.dataset) if task.encodes_text else []
    }


def pretrain_models(wildcards):
    """The local files that a run starts from or is guided by; weights of another run are waited for."""
    run = CONFIG.runs[wildcards.run]
    made = {weights_of(name) for name in CONFIG.runs}
    init = Path(run.init).as_posix() if run.init else None
    return {
        "init": [init] if init in made else model_files(run.init),
        "teacher": [path for model in run.models for path in model_files(model)],
        "masks": run.mask_files,
    }


def gpus_of(wildcards):
    """GPUs of a pretraining run on one node: one a process. On several, Slurm is asked for those of each node (`gres`)."""
    run = CONFIG.runs[wildcards.run]
    return run.processes if run.nodes == 1 else None


def processes_of(wildcards):
    """Processes of a pretraining run on each of its nodes."""
    return CONFIG.runs[wildcards.run].processes


def on_nodes(give):
    """A resource of runs on several nodes, `give(run)`; others do not have it."""

    def find(wildcards):
        run = CONFIG.runs[wildcards.run]
        return give(run) if run.nodes > 1 else None

    return find


def weights_of(run):
    """The weights of a run of `CONFIG.runs`."""
    layout = LAYOUTS[CONFIG.dataset_of(run)]
    return (layout.pretrain(run) / "weights.safetensors").as_posix()


def metrics_of(run, task):
    """What an evaluation of a run found; it lies beside the run, whatever dataset it used."""
    layout = LAYOUTS[CONFIG.dataset_of(run)]
    return (layout.evaluate(run, task) / "metrics.json").as_posix()


def cells(spec):
    """The files with the numbers of a table or figure, one a seed."""
    return [
        metrics_of(instance, task)
        for run, task in sorted(spec.cells())
        for instance in CONFIG.instances(run)
    ]


def mask_quality_inputs(wildcards):
    """Every caption source's similarity, the motion and the true boxes of the measured split."""
    corpus, layout = CORPORA[wildcards.dataset], LAYOUTS[wildcards.dataset]
    shards = all_shards(wildcards.dataset, corpus.mask_quality.split)
    return {
        "frames": [layout.frames(shard).as_posix() for shard in shards],
        "similarity": [
            layout.similarity(source, shard).as_posix()
            for source in corpus.captions
            for shard in shards
        ],
        "motion": [layout.motion(shard).as_posix() for shard in shards],
        "truth": (layout.generated / "truth.parquet").as_posix(),
    }


def faithfulness_inputs(wildcards):
    """The frames and the first packed source's similarity of the measured split."""
    corpus, layout = CORPORA[wildcards.dataset], LAYOUTS[wildcards.dataset]
    shards = all_shards(wildcards.dataset, corpus.mask_quality.split)
    source = corpus.pack.sources[0]
    return {
        "tars": [layout.frames_tar(shard).as_posix() for shard in shards],
        "frames": [layout.frames(shard).as_posix() for shard in shards],
        "similarity": [layout.similarity(source, shard).as_posix() for shard in shards],
    }


def figure_inputs(wildcards):
    """What a figure is drawn from: weights and clips, logs, or numbers."""
    spec = CONFIG.figures[wildcards.figure]
    instances = [run for name in spec.runs.values() for run in CONFIG.instances(name)]
    inputs = {"weights": [weights_of(run) for run in instances], "cells": cells(spec)}
    if spec.kind == "clips":
        datasets = sorted({CONFIG.dataset_of(run) for run in instances})
        inputs["shards"] = [path for d in datasets for path in packed(d, None)]
    return inputs


def dataset_inputs(dataset):
    """What the report shows of a dataset's offline stages."""
    corpus, layout, shards = CORPORA[dataset], LAYOUTS[dataset], all_shards(dataset)
    inputs = [layout.quarantine, *(layout.frames(shard) for shard in shards)]
    # A dataset that packs none of the captions, for transfer, has no need of them.
    sources = corpus.captions if corpus.mask_quality or corpus.pack.sources else ()
    inputs += [layout.captions(s, shard) for s in sources for shard in shards]
    if corpus.mask_quality is not None:
        inputs.append(layout.mask_quality)
        if corpus.pack.sources:
            inputs.append(layout.faithfulness)
    return [path.as_posix() for path in inputs] + packed(dataset, None)


def report_inputs(wildcards):
    """Everything that the report shows."""
    tables = [f"{SHOWN}/tables/{name}.csv" for name in CONFIG.tables]
    figures = [f"{SHOWN}/figures/{name}.png" for name in CONFIG.figures]
    return {
        "plan": f"{SHOWN}/plan.json",
        "datasets": [path for name in CORPORA for path in dataset_inputs(name)],
        "weights": [weights_of(run) for run in CONFIG.runs],
        "metrics": [metrics_of(run, task) for run, task in CONFIG.evaluations()],
        "shown": tables + figures,
    }
