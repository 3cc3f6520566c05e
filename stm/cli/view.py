"""`stm view`: a page on which a video of one's own is played under every masking strategy."""

import argparse
from pathlib import Path
from typing import Any

from stm.cli.common import positive

_TEXT = "write a page on which a video of your own plays under every masking strategy, at any ratio"


def add_view(commands: Any) -> None:
    """Add the command and its options to the parser's subcommands."""
    command = commands.add_parser("view", description=_TEXT)
    command.set_defaults(function=_view)
    command.add_argument("video", type=Path, help="a video file")
    command.add_argument(
        "--caption", action="append", default=[], help="what the video shows, for the text strategies; may be repeated"
    )
    command.add_argument(
        "--strategy",
        action="append",
        default=[],
        help="a strategy of your own to show with the others, as path/to/file.py:name; may be repeated",
    )
    command.add_argument(
        "--model",
        help="CLIP for captions and for the attention strategies: architecture@tag, architecture@file, hf-hub:owner/name, "
        "local-dir:folder or package:demo-clip; default: similarity.model's (downloaded once), or none without --caption",
    )
    for name, default, text in (
        ("frames", 16, "frames to show"),
        ("image-size", 224, "side of the central square, in pixels"),
        ("patch-size", 16, "side of a token, in pixels"),
        ("tubelet", 2, "frames per token"),
    ):
        command.add_argument(f"--{name}", type=positive, default=default, help=f"{text}; default: {default}")
    command.add_argument(
        "--every", type=positive, help="use every k-th frame of the video; default: 4, or fewer if the video is short"
    )
    command.add_argument(
        "--start", type=float, help="where the shown part starts, in seconds; default: the middle of the video is shown"
    )
    command.add_argument("--out", type=Path, default=Path("view.html"), help="the page to write; default: view.html")


def _view(arguments: argparse.Namespace) -> None:
    from stm.report.viewer.own_video import ViewRequest
    from stm.report.viewer.standalone import write_view

    request = ViewRequest(
        video=arguments.video,
        captions=tuple(arguments.caption),
        strategies=tuple(arguments.strategy),
        model=arguments.model,
        frames=arguments.frames,
        image_size=arguments.image_size,
        patch_size=arguments.patch_size,
        tubelet=arguments.tubelet,
        every=arguments.every,
        start=arguments.start,
    )
    print(write_view(request, arguments.out))
