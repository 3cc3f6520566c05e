"""The task `mask_persistence`: how long a run's masks keep the named object of generated clips, whose boxes are known.

ClusterSTM's argument (Figure 2) is that the tokens that its masks keep show in later frames, too, what they show now,
wherever it has moved: what is hidden is then not shown by a neighbouring frame. The masks are those of training, for whole
frames, with the noise of the clips' own samples, so that runs of one geometry are compared on the same noise.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from stm.config import AnyRun, Augmentation, LanguageRun, MaskPersistence, Run
from stm.data.dataset import ClipDataset
from stm.data.geometry import Geometry
from stm.data.loader import Batch, ClipLoader, move
from stm.data.loading_processes import explain_lost_processes
from stm.data.sampling import view_windows
from stm.distributed.process import Process
from stm.evaluation.inputs import EvaluationInputs
from stm.evaluation.masks.box_coverage import bootstrap_interval, read_truth
from stm.evaluation.masks.persistence import (
    ClipCounts,
    average,
    bootstrap_ratio,
    count_kept,
    expect_random,
    object_tokens,
)
from stm.evaluation.results import make_evaluation_receipt, write_metrics
from stm.jobs.progress import Progress
from stm.masking import count_masked, get_strategy, to_boolean
from stm.methods import TEACHER_GUIDE, dataset_needs
from stm.models.teachers.frame_teacher import FrameTeacher
from stm.storage.tables import write_table

CLIPS_PER_BATCH = 32

COUNTS_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("visible", pa.int32(), nullable=False),  # slots that show the object
        pa.field("kept", pa.int32(), nullable=False),  # of these, slots in which a kept token lies on it
        # Pairs of slots that show the object, which is kept in the earlier one; and those of them in which it is kept in both.
        pa.field("before", pa.int32(), nullable=False),
        pa.field("again", pa.int32(), nullable=False),
    ]
)

Masker = Callable[[Batch], Tensor]  # a batch -> the hidden tokens, bool [B, slots, N]


def measure_persistence(task: MaskPersistence, run: AnyRun, inputs: EvaluationInputs, process: Process) -> None:
    """Writes `metrics.json` and `kept.parquet`; see `stm.evaluation.evaluate`.

    `metrics.json` contains `kept_share`, `persistence` and `by_lag` (see `stm.evaluation.masks.persistence.Persistence`), their
    `confidence95`, the same of random masks in `chance`, `ratio`, `slots` and `clips` (those that show the object). With
    several processes, the first one does all.

    Raises:
        ValueError: the truth belongs to other clips, no clip shows its object, or a mask cannot be computed.
    """
    if not process.first:
        return
    run = run.model_copy(update={"mask": run.mask.model_copy(update={"ratio": task.ratio or run.mask.ratio})})
    geometry = Geometry.of(run, task)
    guides = dataset_needs(run).guides
    clips = ClipDataset(inputs.test, geometry, Augmentation(), inputs.seed, False, whole=True, guides=guides)
    boxes = _read_boxes(task, inputs, clips)
    draw = make_masker(run, inputs.weights, geometry, process.device)
    counts = _count_clips(clips, boxes, draw, run.workers, process.device)
    if not counts:
        raise ValueError(
            f"none of the {len(clips)} clips of split {task.test_split!r} shows its object in the sampled frames"
        )
    kept_tokens = geometry.tokens - count_masked(geometry.tokens, run.mask.ratio)
    expected = [chance for key in counts if (chance := expect_random(boxes[key], kept_tokens)) is not None]
    receipt = make_evaluation_receipt(task, run, inputs, clips)
    columns = {
        "key": list(counts),
        "visible": [clip.visible for clip in counts.values()],
        "kept": [int(clip.kept) for clip in counts.values()],
        "before": [int(clip.before[1:].sum()) for clip in counts.values()],
        "again": [int(clip.again[1:].sum()) for clip in counts.values()],
    }
    write_table(inputs.output / "kept.parquet", pa.table(columns, schema=COUNTS_SCHEMA).sort_by("key"), receipt)
    sizes = {"ratio": run.mask.ratio, "slots": geometry.slots, "clips": len(counts)}
    write_metrics(task, inputs, {**_summarise(list(counts.values()), expected), **sizes}, receipt)


def _read_boxes(task: MaskPersistence, inputs: EvaluationInputs, clips: ClipDataset) -> dict[str, NDArray[np.bool_]]:
    """The tokens that lie on the object of each clip, bool [slots, N], by key."""
    assert inputs.truth is not None, "the stage gives it to tasks that read boxes"
    truth = read_truth(inputs.frames, inputs.truth, task.test_split)
    keys = [clips.index[number].key for number in range(len(clips))]
    if unknown := [key for key in keys if key not in truth]:
        raise ValueError(
            f"{inputs.truth}: has no boxes of {len(unknown)} clips of split {task.test_split!r}, such as {unknown[0]!r}; they "
            "come from different videos"
        )
    g = clips.geometry
    return {
        key: object_tokens(
            truth[key].boxes[view_windows(1, g.frames, g.stride, clips.index[number].frames, g.sampling)[0]],
            g.side,
            g.tubelet,
        )
        for number, key in enumerate(keys)
    }


@torch.inference_mode()
def _count_clips(
    clips: ClipDataset, on: Mapping[str, NDArray[np.bool_]], draw: Masker, workers: int, device: torch.device
) -> dict[str, ClipCounts]:
    """The counts of the clips that show their object, by key."""
    counts: dict[str, ClipCounts] = {}
    with (
        explain_lost_processes(),
        ClipLoader(clips, CLIPS_PER_BATCH, shuffle=False, workers=workers) as loader,
        Progress("mask persistence", len(clips), "clips") as progress,
    ):
        for batch in loader.batches():
            hidden = draw(move(batch, device)).cpu().numpy()
            for number, mask in zip(batch["clip"].tolist(), hidden, strict=True):
                key = clips.index[number].key
                counted = count_kept(on[key], mask)
                if counted is not None:
                    counts[key] = counted
            progress.advance(len(hidden))
    return counts


def _summarise(counts: list[ClipCounts], expected: list[ClipCounts]) -> dict[str, Any]:
    found, chance = average(counts), average(expected)
    shares = np.array([clip.share for clip in counts])
    interval = bootstrap_ratio(counts)
    return {
        "kept_share": found.kept_share,
        "persistence": _or_none(found.persistence),
        "by_lag": [_or_none(value) for value in found.by_lag],
        "confidence95": {
            "kept_share": list(bootstrap_interval(shares)),
            "persistence": None if interval is None else list(interval),
        },
        "chance": {
            "kept_share": chance.kept_share,
            "persistence": _or_none(chance.persistence),
            "by_lag": [_or_none(value) for value in chance.by_lag],
        },
    }


def _or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return value if value == value else None


def make_masker(run: Run, weights: Path, geometry: Geometry, device: torch.device) -> Masker:
    """What draws a run's masks as its training does.

    Args:
        weights: the run's weights; read only if its mask is learned.

    Raises:
        ValueError: the teacher cannot be loaded; or a learned mask is missing from the weights or incompatible.
    """

    def boolean(kept: Tensor) -> Tensor:
        return to_boolean(kept, geometry.slots, geometry.tokens)

    if isinstance(run, LanguageRun):
        choose = _choose_by_frame_teacher(run, weights, geometry.side, device)
        return lambda batch: boolean(choose(batch))
    strategy, ratio = get_strategy(run.mask.strategy), run.mask.ratio
    settings = getattr(run, "teacher", None)
    if TEACHER_GUIDE not in strategy.needs or settings is None:
        return lambda batch: boolean(strategy(batch["guides"], ratio))
    teacher = FrameTeacher.load(settings, geometry.side).to(device)

    def attend(batch: Batch) -> Tensor:
        attention = teacher.attend(batch["video"], geometry.tubelet)
        return boolean(strategy({**batch["guides"], TEACHER_GUIDE: attention}, ratio))

    return attend


def _choose_by_frame_teacher(run: LanguageRun, weights: Path, side: int, device: torch.device) -> Masker:
    """The kept tokens, int64 [B, K], of a run of UMT, STM or ClusterSTM."""
    from stm.methods.stm import load_mask
    from stm.methods.video_language import MediaMasks

    teacher = FrameTeacher.load(run.teacher, side).to(device)
    masks, predictor = MediaMasks(run), None
    if run.mask.strategy == "spatiotemporal":
        predictor = load_mask(weights, run, teacher.stem_width).to(device)

    def choose(batch: Batch) -> Tensor:
        output = teacher(batch["video"])
        if predictor is None:
            return masks.keep(batch, output)
        sampled = predictor(output.stem, output.attention, batch["guides"]["noise"], run.mask.ratio)
        return masks.keep(batch, output, {"spatiotemporal": sampled.score})

    return choose
