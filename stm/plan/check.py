"""Refuses a plan whose jobs must fail, before any of them has run."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from stm.config import Checkpointing, Config, ConfigError, FineTune, FolderDataset, LanguageTask
from stm.layout import Layout
from stm.plan.clips import Clips, count_clips
from stm.plan.hardware import Hardware
from stm.pretrained.sizes import refused_by_dense
from stm.stages.jobs import Jobs

if TYPE_CHECKING:
    from stm.plan.memory import Memory


def check_plan(config: Config, clips: Mapping[str, Clips] | None = None) -> None:
    """Check that batches fit the data, that splits have clips, that dense maps can be made, and that runs have GPUs.

    It does not import torch, so that dry runs are quick; see also `check_memory`.

    Args:
        clips: the clip counts of each dataset; by default they are counted, without opening a video.

    Raises:
        ConfigError: one line per run, evaluation or dataset that must fail.
    """
    wrong = [*_missing_gpus(config), *_towers(config)]
    with suppress(pa.ArrowInvalid):  # a damaged manifest, which its readers explain
        counted = clips or {name: _count(config.of(name)) for name in config.dataset_names}
        wrong += [*_runs(config, counted), *_evaluations(config, counted)]
    _refuse(wrong)


def check_memory(config: Config) -> None:
    """Check that runs and evaluations fit into the memory of the GPU that `prices` names, without torch as well.

    Raises:
        ConfigError: one line per run or evaluation that does not.
    """
    from stm.plan.costs import evaluation_gpus
    from stm.plan.memory import evaluation_memory, pretraining_memory

    hardware, jobs = Hardware.of(config), Jobs(config)
    wrong: list[str] = []
    for name in config.pretrain:
        first = config.runs[config.instances(name)[0]]
        remedy = _remedy(first.gradient_checkpointing, first.parallel)
        wrong += _too_large(f"pretrain.{name}", pretraining_memory(first), hardware, remedy)
    for run, name in config.evaluations():
        job = jobs.make(dataset=config.dataset_of(run), run=run, task=name)
        task = config.evaluate[name]
        memory = evaluation_memory(config.runs[run], task, evaluation_gpus(job))
        remedy = "choose a larger GPU"
        if isinstance(task, FineTune | LanguageTask) and task.trains:
            remedy = _remedy(task.gradient_checkpointing, task.parallel)
        wrong += _too_large(f"evaluate.{name} of {run}", memory, hardware, remedy)
    _refuse(wrong)


def _remedy(parts: Checkpointing, parallel: str) -> str:
    """What makes training smaller; first what changes neither the number of GPUs nor of passes."""
    first = "set `gradient_checkpointing`, " if parts == "none" else ""
    return f"{first}raise `accumulate` or `processes`" + (", or use `parallel: fsdp`" if parallel == "ddp" else "")


def _refuse(wrong: list[str]) -> None:
    if wrong:
        raise ConfigError("jobs that must fail:\n" + "\n".join(f"  {line}" for line in wrong))


def _count(config: Config) -> Clips:
    """Count the clips per split; from a manifest without its texts, because it may have millions of rows."""
    manifest = Layout.of(config).manifest
    if manifest.exists():
        splits = Counter(pq.read_table(manifest, columns=["split"])["split"].to_pylist())
        return Clips(dict(splits), 0, 0, 0, "the manifest")
    if isinstance(config.dataset, FolderDataset) and not Path(config.dataset.root).is_dir():
        raise ConfigError(f"dataset.root {config.dataset.root!r}: no such folder")
    return count_clips(config)


def _runs(config: Config, clips: Mapping[str, Clips]) -> Iterator[str]:
    for name, run in config.pretrain.items():
        if run.release is not None:
            continue
        for medium in run.media:
            samples = 0
            for named, split in medium.sources:
                dataset = named or config.dataset_of(name)
                samples += clips[dataset].per_split.get(split, 0)
                if clips[dataset].total and not clips[dataset].per_split.get(split):
                    yield f"pretrain.{name}: {_without(dataset, split, clips)}"
            enough = samples * run.repeats >= medium.batch_size
            if samples and run.optimisation.epochs and not enough:
                yield (
                    f"pretrain.{name}.{medium.key} is {medium.batch_size}, but an epoch has {samples * run.repeats:,} samples "
                    f"({samples:,} {medium.name} x {run.repeats} repeats)"
                )


def _evaluations(config: Config, clips: Mapping[str, Clips]) -> Iterator[str]:
    for name, task in config.evaluate.items():
        optimisation = getattr(task, "optimisation", None)
        for dataset in dict.fromkeys(config.dataset_of(run, name) for run in config.runs_of(name)):
            counted = clips[dataset]
            if not counted.total:  # which its manifest refuses
                continue
            empty = [split for split in task.splits.values() if not counted.per_split.get(split)]
            if empty:
                yield f"evaluate.{name}: {_without(dataset, empty[0], clips)}"
            elif task.trains and optimisation is not None:
                split = task.splits["train"]
                samples = counted.per_split[split] * getattr(task, "repeats", 1)
                if task.needs == "language":
                    if split not in counted.texts:  # one sample per text, whose number is unknown
                        continue
                    texts = counted.texts[split]
                    samples = int(texts.questions if task.benchmark_task == "question_answering" else texts.captions)
                if samples < optimisation.batch_size:
                    yield (
                        f"evaluate.{name}.optimisation.batch_size is {optimisation.batch_size}, but an epoch of the split "
                        f"{split!r} of {dataset} has {samples:,} samples"
                    )


def _without(dataset: str, split: str, clips: Mapping[str, Clips]) -> str:
    known = ", ".join(name for name, count in clips[dataset].per_split.items() if count) or "none"
    return f"{dataset} has no clips of the split {split!r}; it has: {known}"


def _towers(config: Config) -> Iterator[str]:
    for name in config.dataset_names:
        corpus = config.of(name)
        settings, pack = corpus.similarity, corpus.pack
        scored = (pack.similarity and pack.sources) or corpus.mask_quality is not None
        kind = refused_by_dense(settings.model) if scored and settings.method == "dense" else None
        if kind is not None:
            yield (
                f"similarity.method of {name} is dense, and the image tower of {settings.model} is {kind}: choose a ViT of "
                "open_clip's own, or `method: patches`"
            )


def _missing_gpus(config: Config) -> Iterator[str]:
    gpus = Hardware.of(config).gpus
    for name, run in config.pretrain.items():
        if run.world_size > gpus:
            yield f"pretrain.{name} uses {run.world_size} GPUs, and prices.gpus is {gpus}"
    for name, task in config.evaluate.items():
        if task.world_size > gpus:
            yield f"evaluate.{name} uses {task.world_size} GPUs, and prices.gpus is {gpus}"


def _too_large(what: str, memory: "Memory", hardware: Hardware, remedy: str) -> Iterator[str]:
    needed, activations, available = memory.total / 1e9, memory.activations / 1e9, hardware.gpu.gigabytes
    if needed > available:
        yield (
            f"{what} needs about {needed:.0f} GB on each GPU ({activations:.0f} GB of them activations), and the "
            f"{hardware.name} of prices.gpu has {available:g} GB; {remedy}"
        )
