"""The viewer for a video of the user's own: the offline stages run on it in a temporary folder, with the study's own code."""

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa

from stm.config import Config, Frames, Similarity, Teacher, parse_config
from stm.config.strategies import find_strategy
from stm.data.geometry import Geometry
from stm.datasets.annotations import AnnotatedClip
from stm.datasets.folder import NamedClip, row_of
from stm.datasets.probe_pool import probe_files
from stm.jobs.status import Status
from stm.layout import Layout
from stm.manifest import MANIFEST_SCHEMA
from stm.preprocess.clip_outcomes import Outcome
from stm.pretrained.hub import ModelError
from stm.report.clips.cuts import cut_clips, load_frame_teacher
from stm.report.clips.gallery import explain_missing, ordered_strategies
from stm.report.clips.select import choose_clips
from stm.report.viewer.masks import CAPTION_GUIDE, MaskViewer, draw_masks
from stm.stages.jobs import Jobs
from stm.stages.journey import all_stages
from stm.storage.tables import read_table, write_table

_log = logging.getLogger(__name__)

EVERY = 4  # decoded frames from one frame to the next, as in TGM, section 4.2
PROBE_SECONDS = 60.0
SOURCE = "own"  # the caption source
STAGES = ("split", "frames", "captions", "similarity", "motion", "flow", "shards")
OPTIONAL_MAPS = ("motion", "flow")  # a video without them is shown under the other strategies


class ViewError(ValueError):
    """A video that cannot be shown, or unsuitable options; the message contains the reason and the remedy."""


@dataclass(frozen=True)
class ViewRequest:
    """What to show of which video."""

    video: Path
    captions: tuple[str, ...] = ()
    strategies: tuple[str, ...] = ()  # of the user's own, `path/to/file.py:name`, besides the known ones
    model: str | None = None  # a CLIP, in the syntax of similarity.model; see `clip_model`
    frames: int = 16
    image_size: int = 224  # pixels
    patch_size: int = 16  # pixels
    tubelet: int = 2  # frames
    every: int | None = None  # decoded frames from one frame to the next; None: `EVERY`, fewer in a short video
    start: float | None = None  # seconds; None: such that the frames are the middle of the video

    @property
    def clip_model(self) -> str | None:
        """The model that is loaded: by default, the config's default for captions, and none without captions."""
        return self.model or (Similarity().model if self.captions else None)

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.image_size, self.patch_size, self.tubelet, self.frames)


def check_request(request: ViewRequest) -> None:
    """Check the options before any work is done.

    Raises:
        ViewError: sizes that do not fit each other, an empty caption, or no such file.
        StrategyError: a strategy of the user's own does not exist.
    """
    if request.tubelet < 1 or request.frames < 2 or request.frames % request.tubelet:
        raise ViewError(f"--frames {request.frames} must be at least 2 and divisible by --tubelet {request.tubelet}")
    if request.patch_size < 1 or request.image_size % request.patch_size or not 2 <= request.geometry.side <= 64:
        raise ViewError(
            f"--image-size {request.image_size} must be divisible by --patch-size {request.patch_size}, into 2 to 64 patches"
        )
    if request.every is not None and not 1 <= request.every <= 64:
        raise ViewError(f"--every {request.every} must be from 1 to 64 frames")
    if request.start is not None and not 0 <= request.start < math.inf:
        raise ViewError(f"--start {request.start:g} must be a number of seconds, 0 or more")
    if not all(caption.strip() for caption in request.captions):
        raise ViewError("--caption is empty; describe the video, or leave the option out")
    for strategy in request.strategies:
        find_strategy(strategy)
    if not request.video.is_file():
        raise ViewError(f"{request.video}: {'not a file' if request.video.exists() else 'there is no such file'}")


def draw_video(request: ViewRequest) -> MaskViewer:
    """Decode a video, compute its maps as the offline stages do, and draw all masks on it.

    Raises:
        ViewError: see `check_request`; or the video has no usable frames, or the model cannot be loaded.
    """
    check_request(request)
    facts = probe_video(request.video)
    try:
        with TemporaryDirectory(prefix="stm-view-") as folder:
            return _draw(request, facts, Path(folder))
    except ModelError as error:
        raise ViewError(
            f"{str(error).replace('similarity.model', 'model', 1)}\nName another model with --model, such as one in a "
            "local folder (local-dir:FOLDER). Without --caption and --model, all strategies that need no model are shown."
        ) from error


def probe_video(video: Path) -> Mapping[str, Any]:
    """Return a video's frame rate, duration and number of frames, where its container reports them.

    Raises:
        ViewError: it cannot be opened as a video, has no video stream, or is too small.
    """
    defaults = Frames()
    limits = {"min_side": defaults.min_side, "max_side": defaults.max_side}
    ((_, facts),) = probe_files([video], limits, 1, PROBE_SECONDS)
    status = Status(facts["status"])
    _check_kept(video, Outcome(status, status.default_policy, facts["detail"]))
    return facts


def _check_kept(video: Path, outcome: Outcome) -> None:
    if not outcome.kept:
        raise ViewError(f"{video} cannot be shown: {_describe(outcome)}")


def _describe(outcome: Outcome) -> str:
    status = outcome.status.replace("_", " ")
    return outcome.detail if outcome.detail.startswith(status) else f"{status}: {outcome.detail}"


def _draw(request: ViewRequest, facts: Mapping[str, Any], folder: Path) -> MaskViewer:
    teacher = None if request.clip_model is None else Teacher(model=request.clip_model)
    if teacher is not None and not request.captions:
        load_frame_teacher(teacher, request.geometry.side, layers=0)  # a misspelt name fails now, not after decoding
    every = choose_step(request, facts)
    config = make_config(request, every, folder)
    write_manifest(request, facts, every, Layout.of(config).manifest)
    config, reasons = _run_stages(config, request.video)
    jobs = Jobs(config)
    clips = choose_clips(config, jobs.layouts[config.name], jobs.list_shards(config.name), 1)
    cuts = cut_clips(clips, request.geometry, config.seed)
    return draw_masks(cuts, ordered_strategies(request.strategies), partial(_explain_missing, reasons), teacher)


def _explain_missing(reasons: Mapping[str, str], needs: Iterable[str]) -> str:
    """Describe why a guide is missing; `reasons` are those of stages that failed, by stage."""
    for need in needs:
        if need == CAPTION_GUIDE:
            return "needs a caption: --caption"
        if need in ("attention", "features"):
            return "needs a model: --model"
        if need == "spatiotemporal":
            return "learned by runs of the method stm"
        if stage := next((stage for stage in reasons if need.startswith(stage)), None):
            return reasons[stage]
    return explain_missing(needs)


def make_config(request: ViewRequest, every: int, results: Path) -> Config:
    """Make the config of a study of one video, of which every `every`-th frame is stored."""
    return parse_config(
        {
            "name": "view",
            "results": str(results),
            "dataset": {"source": "folder", "root": str(request.video.resolve().parent)},
            "grid": request.geometry.side,
            # Only the frames that are shown are stored, so that nothing else is computed.
            "frames": {"every": every, "short_side": request.image_size, "max_frames": request.frames},
            "captions": {SOURCE: {"kind": "human"}},
            "similarity": {"model": request.clip_model} if request.clip_model else {},
            "pack": {"captions": SOURCE if request.captions else None, "flow": True},
        },
        "stm view",
    )


def write_manifest(request: ViewRequest, facts: Mapping[str, Any], every: int, path: Path) -> None:
    """Write the table of clips, with the video as its only one, which starts where the shown part does."""
    start = request.start
    if start is None:
        start = find_middle(facts, request.frames * every)
    name = request.video.resolve().name
    clip = AnnotatedClip(name, "test", captions=request.captions, start=start or None)
    row = row_of(NamedClip(name, clip), dict(facts))
    write_table(path, pa.Table.from_pylist([row], schema=MANIFEST_SCHEMA), {"stage": "view"})


def choose_step(request: ViewRequest, facts: Mapping[str, Any]) -> int:
    """Return how many decoded frames lie between shown ones: as requested, or fewer than usual in a short video."""
    if request.every is not None:
        return request.every
    total = facts["frames"] or round((facts["duration"] or 0) * (facts["fps"] or 0))
    return max(1, min(EVERY, total // request.frames)) if total else EVERY


def find_middle(facts: Mapping[str, Any], span: int) -> float:
    """Return the start of the middle `span` decoded frames, in seconds; 0 if the container does not report enough."""
    if not facts["duration"] or not facts["fps"]:
        return 0.0
    return round(max(0.0, (facts["duration"] - span / facts["fps"]) / 2), 3)


def _run_stages(config: Config, video: Path) -> tuple[Config, dict[str, str]]:
    """Run the offline stages; return the config without the maps that this video has not, and the reasons, by stage.

    Raises:
        ViewError: the video has no usable frames.
    """
    reasons: dict[str, str] = {}
    for name in STAGES:
        jobs = Jobs(config)
        stage = all_stages()[name]
        if name in ("captions", "similarity") and not config.pack.sources:
            continue
        _log.info(f"view: {stage.title}")  # a stage counts clips, so that it is silent during the only one
        for job in stage.each(jobs, config.name):
            outputs = stage.outputs(job)
            stage.run(job, stage.inputs(job), outputs, 1)
            if name == "frames":
                _check_kept(video, _read_outcome(outputs["index"]))
            if name in OPTIONAL_MAPS and not (outcome := _read_outcome(outputs[name])).kept:
                reasons[name] = _describe(outcome)
                config = config.model_copy(update={"pack": config.pack.model_copy(update={name: False})})
    return config, reasons


def _read_outcome(table: Path) -> Outcome:
    """Read the outcome of the only clip in a stage's table."""
    (row,) = read_table(table, ["status", "policy", "detail"]).to_pylist()
    return Outcome(Status(row["status"]), row["policy"], row["detail"])
