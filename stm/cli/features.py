"""`stm features`: features of videos of one's own, as a table."""

import argparse
from pathlib import Path
from typing import Any

from stm.cli.common import positive

_TEXT = "compute the features of videos, or of packed clips, with any weights, and write them as a Parquet table"
_WEIGHTS = (
    "weights: stm's safetensors, a run's folder, a VideoMAE .pth, a transformers folder, or owner/name on the hub"
)
_INPUTS = (
    "videos, folders of videos, lists of videos (.csv, .jsonl, .parquet, ...: path, start, end, id), or packed shards"
)


def add_features(commands: Any) -> None:
    """Add the command and its options to the parser's subcommands."""
    command = commands.add_parser("features", description=_TEXT)
    command.set_defaults(function=_features)
    add_inputs(command)
    command.add_argument(
        "--out", type=Path, default=Path("features.parquet"), help="the table to write; default: features.parquet"
    )
    command.add_argument(
        "--pool", choices=("mean", "none"), default="mean", help="mean of all tokens (default), or every token"
    )
    command.add_argument(
        "--dtype",
        choices=("float32", "float16"),
        help="of the stored features; default: float32, and float16 with --pool none",
    )
    command.add_argument("--average", action="store_true", help="one row per video: the mean over its windows")
    add_clip_options(command, "1, in the middle")


def add_inputs(command: argparse.ArgumentParser) -> None:
    """Add the weights and the inputs."""
    command.add_argument("weights", help=_WEIGHTS)
    command.add_argument("inputs", nargs="+", metavar="input", help=_INPUTS)


def add_clip_options(command: argparse.ArgumentParser, windows: str, crops: str = "1") -> None:
    """Add the options of `stm.features.ClipSettings`.

    Args:
        windows, crops: their defaults, for the help.
    """
    add = command.add_argument
    add("--windows", type=positive, help=f"windows per video, spread evenly; default: {windows}")
    add(
        "--stride",
        type=float,
        metavar="SECONDS",
        help="instead, sliding windows: from the start of one to that of the next",
    )
    add("--stride-frames", type=positive, metavar="N", help="likewise, in frames of the video")
    add("--frames", type=positive, help="frames per window; default: the weights'")
    add(
        "--every",
        type=positive,
        help="use every k-th frame; default: 4 (of shards: the stored ones), times the run's stride",
    )
    add("--sampling", choices=("dense", "tsn", "sparse"), help="as in a config; default: the run's, or dense")
    add("--crops", type=int, choices=(1, 3), help=f"square crops per window, along the long side; default: {crops}")
    add(
        "--short-side",
        type=positive,
        metavar="PIXELS",
        help="to which frames are resized before cropping; default: 256",
    )
    add("--backend", choices=("pyav", "pyav-seek", "decord"), default="pyav", help="how videos are read; default: pyav")
    add("--root", type=Path, help="folder to which the paths in lists are relative; default: that of the list")
    add("--processes", type=positive, default=1, help="decoding processes; default: 1")
    add("--batch-size", type=positive, default=16, help="clips per batch; default: 16")
    add("--device", help="cuda or cpu; default: cuda if there is one")
    add("--precision", choices=("float32", "bf16"), default="float32", help="default: float32")
    add(
        "--timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="after which a decoder is ended, per window; default: 600",
    )


def read_settings(arguments: argparse.Namespace) -> Any:
    """The options as `stm.features.ClipSettings`."""
    from stm.features import ClipSettings

    return ClipSettings(
        frames=arguments.frames,
        every=arguments.every,
        windows=arguments.windows,
        stride_seconds=arguments.stride,
        stride_frames=arguments.stride_frames,
        sampling=arguments.sampling,
        crops=arguments.crops,
        short_side=arguments.short_side,
        backend=arguments.backend,
        processes=arguments.processes,
        batch_size=arguments.batch_size,
        device=arguments.device,
        precision=arguments.precision,
        timeout_seconds=arguments.timeout,
    )


def _features(arguments: argparse.Namespace) -> int:
    from stm.features import extract

    done = extract(
        arguments.weights,
        arguments.inputs,
        arguments.out,
        read_settings(arguments),
        pool=arguments.pool,
        dtype=arguments.dtype,
        average=arguments.average,
        root=arguments.root,
    )
    failed = f"; {len(done.failed)} without features" if done.failed else ""
    print(f"{done.path}: {done.windows} windows of {done.videos} videos{failed}")
    return 1 if done.failed else 0
