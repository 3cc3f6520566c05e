"""`stm <stage> …`: each stage by hand, without Snakemake, on the same paths and with the same bytes."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

import stm
from stm.config import Config, ConfigError, json_schema, parse_config
from stm.layout import Layout, dataset_root
from stm.manifest import read_shards, split_of, write_slices

# The stages import their libraries when they run: `stm --help` answers at once.


def _load(arguments: argparse.Namespace) -> Config:
    """The config files of the command line, later ones over earlier ones, then the --set overrides."""
    values: dict[str, Any] = {}
    for path in arguments.config:
        try:
            part = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: cannot be read as YAML ({error})") from error
        if not isinstance(part, dict):
            raise ConfigError(f"{path}: must be a mapping of keys to values")
        _merge(values, part)
    for override in arguments.set:
        key, separator, text = override.partition("=")
        if not separator:
            raise ConfigError(f"--set {override}: write key=value, for instance --set motion.backend=codec")
        try:
            value: Any = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {override}: the value is not valid YAML ({error})") from error
        for part_name in reversed(key.split(".")):
            value = {part_name: value}
        _merge(values, value)
    return parse_config(values, ", ".join(arguments.config))


def _merge(base: dict[str, Any], update: dict[str, Any]) -> None:
    for key, value in update.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value


def _chosen(what: str, wanted: Sequence[str] | None, known: Iterable[str]) -> list[str]:
    """The names asked for, or all; an unknown one is an error that lists what there is."""
    names = list(known)
    unknown = [name for name in wanted or () if name not in names]
    if unknown:
        raise ConfigError(f"no such {what}: {', '.join(unknown)}; there are: {', '.join(names) or 'none'}")
    return list(wanted or names)


def _all_shards(layout: Layout) -> list[str]:
    if not layout.shard_index.exists():
        raise ConfigError(f"{layout.shard_index} does not exist yet; run `stm manifest` and `stm split` first")
    return read_shards(layout.shard_index)


def _shards(arguments: argparse.Namespace, layout: Layout) -> list[str]:
    return _chosen("shard", arguments.shard, _all_shards(layout))


def schema(arguments: argparse.Namespace) -> None:
    print(json.dumps(json_schema(), indent=2))


def plan(arguments: argparse.Namespace) -> None:
    from stm.report.plan import describe_plan, make_plan, write_plan

    config = _load(arguments)
    made = make_plan(config)
    write_plan(made, Layout.of(config).plan)
    print(describe_plan(made, config))


def generate(arguments: argparse.Namespace) -> None:
    from stm.datasets.moving_shapes import generate as generate_clips

    config = _load(arguments)
    if config.dataset.source != "moving-shapes":
        raise ConfigError(f"dataset.source is {config.dataset.source}: there is nothing to generate")
    generate_clips(config.dataset, config.seed, Layout.of(config).generated, arguments.processes)


def manifest(arguments: argparse.Namespace) -> None:
    from stm.datasets import build_manifest

    config = _load(arguments)
    layout = Layout.of(config)
    generated = layout.generated if config.dataset.source == "moving-shapes" else None
    build_manifest(config, generated, layout.manifest, layout.quarantine, arguments.processes)


def split(arguments: argparse.Namespace) -> None:
    config = _load(arguments)
    layout = Layout.of(config)
    shards = write_slices(layout.manifest, layout.slice("x").parent, layout.shard_index, config.shard_size)
    print("\n".join(shards))


def frames(arguments: argparse.Namespace) -> None:
    from stm.preprocess.frames import extract_frames

    config = _load(arguments)
    layout = Layout.of(config)
    for shard in _shards(arguments, layout):
        extract_frames(
            layout.slice(shard),
            dataset_root(config),
            layout.frames_tar(shard),
            layout.frames(shard),
            config.frames,
            config.bad_input,
            arguments.processes,
        )


def captions(arguments: argparse.Namespace) -> None:
    from stm.preprocess.captions import write_captions

    config = _load(arguments)
    layout = Layout.of(config)
    for source in _chosen("caption source", arguments.source, config.captions):
        for shard in _shards(arguments, layout):
            write_captions(
                layout.slice(shard),
                layout.frames_tar(shard),
                layout.frames(shard),
                layout.captions(source, shard),
                config.captions[source],
                config.bad_input,
            )


def embeddings(arguments: argparse.Namespace) -> None:
    from stm.preprocess.similarity import write_embeddings

    config = _load(arguments)
    layout = Layout.of(config)
    for shard in _shards(arguments, layout):
        write_embeddings(
            layout.frames_tar(shard),
            layout.frames(shard),
            layout.embeddings(shard),
            config.similarity,
            config.grid,
        )


def similarity(arguments: argparse.Namespace) -> None:
    from stm.preprocess.similarity import write_similarity

    config = _load(arguments)
    layout = Layout.of(config)
    for source in _chosen("caption source", arguments.source, config.captions):
        for shard in _shards(arguments, layout):
            write_similarity(
                layout.frames_tar(shard),
                layout.frames(shard),
                layout.captions(source, shard),
                layout.similarity(source, shard),
                config.similarity,
                config.grid,
                config.bad_input,
                embeddings=layout.embeddings(shard) if config.similarity.keep_embeddings else None,
            )


def motion(arguments: argparse.Namespace) -> None:
    from stm.preprocess.motion import extract_motion

    config = _load(arguments)
    layout = Layout.of(config)
    for shard in _shards(arguments, layout):
        extract_motion(
            layout.slice(shard),
            dataset_root(config),
            layout.frames(shard),
            layout.motion(shard),
            config.motion,
            config.grid,
            config.bad_input,
            arguments.processes,
        )


def shards(arguments: argparse.Namespace) -> None:
    from stm.preprocess.shards import pack_shard

    config = _load(arguments)
    layout, pack = Layout.of(config), config.pack
    for shard in _shards(arguments, layout):
        pack_shard(
            layout.slice(shard),
            layout.frames_tar(shard),
            layout.frames(shard),
            layout.captions(pack.captions, shard) if pack.captions else None,
            layout.similarity(pack.captions, shard) if pack.captions and pack.similarity else None,
            layout.motion(shard) if pack.motion else None,
            layout.shard_tar(shard),
            layout.shard(shard),
            pack,
            config.grid,
            config.bad_input,
        )


def verify(arguments: argparse.Namespace) -> None:
    from stm.preprocess.shards import verify_shard

    layout = Layout.of(_load(arguments))
    for shard in _shards(arguments, layout):
        verify_shard(layout.shard_tar(shard), layout.shard(shard))
        print(f"{layout.shard_tar(shard)}: every member has the size and hash of its index")


def _packed(layout: Layout, split_name: str) -> list[Path]:
    return [layout.shard(shard) for shard in _all_shards(layout) if split_of(shard) == split_name]


def pretrain(arguments: argparse.Namespace) -> None:
    from stm.training.launch import run_pretraining

    config = _load(arguments)
    layout = Layout.of(config)
    for run in _chosen("run", arguments.run, config.pretrain):
        run_pretraining(config.pretrain[run], _packed(layout, "train"), layout.pretrain(run), config.seed)


def evaluate(arguments: argparse.Namespace) -> None:
    from stm.evaluation import evaluate as evaluate_run

    config = _load(arguments)
    layout = Layout.of(config)
    for run in _chosen("run", arguments.run, config.pretrain):
        for name in _chosen("task", arguments.task, config.evaluate):
            task = config.evaluate[name]
            evaluate_run(
                task,
                config.pretrain[run],
                layout.pretrain(run) / "weights.safetensors",
                _packed(layout, task.train_split),
                _packed(layout, task.test_split),
                layout.evaluate(run, name),
                config.seed,
            )


def mask_quality(arguments: argparse.Namespace) -> None:
    from stm.evaluation.mask_quality import measure_mask_quality

    config = _load(arguments)
    layout = Layout.of(config)
    if config.mask_quality is None:
        raise ConfigError("the config has no section mask_quality")
    chosen = [s for s in _all_shards(layout) if split_of(s) == config.mask_quality.split]
    measure_mask_quality(
        [layout.frames(shard) for shard in chosen],
        {source: [layout.similarity(source, shard) for shard in chosen] for source in config.captions},
        [layout.motion(shard) for shard in chosen],
        layout.generated / "truth.parquet",
        config.mask_quality,
        layout.mask_quality,
    )


def faithfulness(arguments: argparse.Namespace) -> None:
    from stm.evaluation.faithfulness import measure_faithfulness

    config = _load(arguments)
    layout, settings, source = Layout.of(config), config.mask_quality, config.pack.captions
    if settings is None or source is None:
        raise ConfigError("faithfulness needs the section mask_quality and a caption source in pack.captions")
    chosen = [s for s in _all_shards(layout) if split_of(s) == settings.split]
    measure_faithfulness(
        [layout.frames_tar(shard) for shard in chosen],
        [layout.frames(shard) for shard in chosen],
        [layout.similarity(source, shard) for shard in chosen],
        config.similarity,
        settings.image_size,
        settings.patch_size,
        layout.faithfulness,
        crops=settings.crops,
        seed=config.seed,
        ratio=settings.text_ratio,
    )


def report(arguments: argparse.Namespace) -> None:
    from stm.report import build_report

    config = _load(arguments)
    layout = Layout.of(config)
    build_report(config, layout)
    print(layout.report)


STAGES: dict[str, tuple[Callable[[argparse.Namespace], None], str, tuple[str, ...]]] = {
    "plan": (plan, "what the run will cost, before it runs", ()),
    "generate": (generate, "make the clips of moving-shapes", ("processes",)),
    "manifest": (manifest, "the table of clips, and the quarantine", ("processes",)),
    "split": (split, "deal the clips to shards", ()),
    "frames": (frames, "sampled frames as JPEGs", ("shard", "processes")),
    "captions": (captions, "captions, by source", ("shard", "source")),
    "embeddings": (embeddings, "patch embeddings, where the config keeps them", ("shard",)),
    "similarity": (similarity, "patch-text similarity maps", ("shard", "source")),
    "motion": (motion, "motion maps", ("shard", "processes")),
    "shards": (shards, "pack WebDataset shards", ("shard",)),
    "verify": (verify, "check packed shards against their hashes", ("shard",)),
    "pretrain": (pretrain, "pretrain", ("run",)),
    "evaluate": (evaluate, "evaluate the pretrained weights", ("run", "task")),
    "mask-quality": (mask_quality, "how well masks cover the named object's true box", ()),
    "faithfulness": (faithfulness, "how true cached maps stay under random crops", ()),
    "report": (report, "tables, figures and the page", ()),
    "schema": (schema, "print the JSON schema of the config", ()),
}

_OPTIONS: dict[str, dict[str, Any]] = {
    "shard": {"nargs": "+", "help": "these shards only, train-00000 for instance; default: all"},
    "source": {"nargs": "+", "help": "these caption sources only; default: all"},
    "run": {"nargs": "+", "help": "these runs only; default: all"},
    "task": {"nargs": "+", "help": "these evaluations only; default: all"},
    "processes": {"type": int, "default": 1, "help": "worker processes; default: 1"},
}


def build_parser() -> argparse.ArgumentParser:
    """The command line: one subcommand a stage."""
    parser = argparse.ArgumentParser(prog="stm", description=__doc__)
    parser.add_argument("--version", action="version", version=f"stm {stm.__version__}")
    commands = parser.add_subparsers(dest="stage", required=True, metavar="stage")
    for name, (function, text, options) in STAGES.items():
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(function=function)
        command.add_argument(
            "--config", nargs="+", default=["config/demo.yaml"], help="YAML files; later ones override"
        )
        command.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="override one key, a.b=value"
        )
        for option in options:
            command.add_argument(f"--{option}", **_OPTIONS[option])
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one stage; mistakes of the user are one message and exit status 2, not a traceback."""
    parsed = build_parser().parse_args(arguments)
    try:
        parsed.function(parsed)
    except (ValueError, RuntimeError) as error:
        # Errors of our own kinds (config, dataset, model, too many failures) are written for people; others are bugs.
        if not type(error).__module__.startswith("stm."):
            raise
        print(f"stm {parsed.stage}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
