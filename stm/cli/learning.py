"""Pretraining, evaluation and what is shown of them, by hand."""

import argparse
import json
from pathlib import Path

from stm.cli.common import all_shards, chosen, corpora, load, packed
from stm.config import ConfigError, json_schema
from stm.layout import Layout

# The stages import their libraries when they run: `stm --help` answers at once.


def schema(arguments: argparse.Namespace) -> None:
    print(json.dumps(json_schema(), indent=2))


def plan(arguments: argparse.Namespace) -> None:
    from stm.plan.make import describe_plan, make_plan, write_plan

    config = load(arguments)
    made = make_plan(config)
    write_plan(made, Layout.of(config).plan)
    print(describe_plan(made, config))


def pretrain(arguments: argparse.Namespace) -> None:
    from stm.training.launch import run_pretraining

    config = load(arguments)
    for name in chosen("run", arguments.run, config.runs):
        run, own = config.runs[name], config.dataset_of(name)
        videos, images = (
            [path for dataset, split in sources for path in packed(Layout.of(config, dataset or own), split)]
            for sources in (run.video_sources, run.image_sources)
        )
        run_pretraining(run, videos, Layout.of(config, own).pretrain(name), config.seed, images)


def evaluate(arguments: argparse.Namespace) -> None:
    from stm.datasets.video_text.tasks import check_tasks, has_shared_texts
    from stm.evaluation import EvaluationInputs
    from stm.evaluation import evaluate as evaluate_run

    config = load(arguments)
    check_tasks(config)
    runs = chosen("run", arguments.run, config.runs)
    tasks = chosen("task", arguments.task, config.evaluate)
    pairs = [(name, task) for name, task in config.evaluations() if name in runs and task in tasks]
    if not pairs and (arguments.run or arguments.task):
        raise ConfigError(
            f"evaluate: none of {', '.join(tasks)} is done for any of {', '.join(runs)} (`runs`, `contrast`)"
        )
    for name, task_name in pairs:
        run, task, own = config.runs[name], config.evaluate[task_name], config.dataset_of(name)
        data, layout = Layout.of(config, config.dataset_of(name, task_name)), Layout.of(config, own)
        indexes = {use: packed(data, split) for use, split in task.splits.items()}
        inputs = EvaluationInputs(
            weights=layout.pretrain(name) / "weights.safetensors",
            train=indexes.get("train", []),
            validation=indexes.get("validation", []),
            test=indexes["test"],
            output=layout.evaluate(name, task_name),
            seed=config.seed if run.seed is None else run.seed,
            shared_texts=has_shared_texts(config, name, task_name),
            text=config.of(own).text,
        )
        evaluate_run(task, run, inputs)


def mask_quality(arguments: argparse.Namespace) -> None:
    from stm.evaluation.masks.box_coverage import measure_mask_quality

    measured = [(config, layout) for config, layout in corpora(arguments) if config.mask_quality is not None]
    if not measured:
        raise ConfigError("the config has no section mask_quality")
    for config, layout in measured:
        assert config.mask_quality is not None
        shards = all_shards(layout, config.mask_quality.split)
        measure_mask_quality(
            [layout.frames(shard) for shard in shards],
            {source: [layout.similarity(source, shard) for shard in shards] for source in config.captions},
            [layout.motion(shard) for shard in shards],
            layout.generated / "truth.parquet",
            config.mask_quality,
            layout.mask_quality,
        )


def faithfulness(arguments: argparse.Namespace) -> None:
    from stm.evaluation.masks.crop_agreement import measure_crop_agreement

    measured = [(c, layout) for c, layout in corpora(arguments) if c.mask_quality is not None and c.pack.sources]
    if not measured:
        raise ConfigError("faithfulness needs the section mask_quality and a caption source in pack.captions")
    for config, layout in measured:
        settings, source = config.mask_quality, config.pack.sources[0]
        assert settings is not None
        shards = all_shards(layout, settings.split)
        measure_crop_agreement(
            [layout.frames_tar(shard) for shard in shards],
            [layout.frames(shard) for shard in shards],
            [layout.similarity(source, shard) for shard in shards],
            config.similarity,
            settings.image_size,
            settings.patch_size,
            layout.faithfulness,
            crops=settings.crops,
            seed=config.seed,
            ratio=settings.text_ratio,
        )


def table(arguments: argparse.Namespace) -> None:
    from stm.report import write_table

    config = load(arguments)
    for name in chosen("table", arguments.table, config.tables):
        print(write_table(config, name))


def figure(arguments: argparse.Namespace) -> None:
    from stm.report import write_figure

    config = load(arguments)
    for name in chosen("figure", arguments.figure, config.figures):
        print(write_figure(config, name))


def report(arguments: argparse.Namespace) -> None:
    from stm.report import build_report

    config = load(arguments)
    layout = Layout.of(config)
    build_report(config, layout)
    print(layout.report)


def convert(arguments: argparse.Namespace) -> None:
    from stm.models.weights.zoo import convert as convert_weights

    convert_weights(Path(arguments.weights), Path(arguments.target), arguments.format)
    print(arguments.target)
