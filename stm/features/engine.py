"""Computes a model's values for every window of every source: decoding, batches, journal and progress.

Values go to the journal as they come, so that memory does not grow with the number of videos or windows, and an interrupted run
resumes after the last finished video.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stm.features.batches import ClipBatches
from stm.features.cutting import Pulse, Restart, Summary, Window
from stm.features.decoding import RefusedTask, Task, decode_task
from stm.features.inputs import Source
from stm.features.model import ClipModel, find_device
from stm.features.settings import ClipPlan, ClipSettings
from stm.features.shards import ShardTask
from stm.features.videos import VideoTask
from stm.jobs.journal import Journal
from stm.jobs.progress import Progress
from stm.jobs.streams import Turn, stream_isolated
from stm.jobs.workers import Failure
from stm.storage.tables import REMOVE, DamagedError

Combine = Callable[[NDArray[np.float32]], NDArray[Any]]  # the values of a window's crops, [crops, ...], to one value


@dataclass(frozen=True)
class Values:
    """What was computed for a source."""

    source: Source
    summary: Summary
    windows: Iterator[NDArray[Any]]  # the value of each window, flat; read from the journal one by one


class Engine:
    """Runs a model over sources.

    Args:
        model: the model.
        plan: which windows it sees.
        settings: how they are computed.
        journal: keeps the values.
        combine: makes one value of those of a window's crops.
        dtype: of the values in the journal.
        what: label of the progress line.
    """

    def __init__(
        self,
        model: ClipModel,
        plan: ClipPlan,
        settings: ClipSettings,
        journal: Journal,
        combine: Combine,
        dtype: str,
        what: str,
    ) -> None:
        self._plan = plan
        self._settings = settings
        self._journal = journal
        self._combine = combine
        self._dtype = np.dtype(dtype)
        self._what = what
        self._failures: dict[str, Failure] = {}
        device = find_device(settings)
        model.module.to(device)
        self._batches = ClipBatches(model, settings.batch_size, device, self._deliver, settings.precision)
        self._sources: Sequence[Source] = ()
        self._crops: dict[tuple[int, int], dict[int, NDArray[np.float32]]] = {}  # of windows that lack some
        self._ended: list[
            tuple[int, Source, Summary]
        ] = []  # whose values may wait for their batch, with the place after them
        self._computed = 0  # windows

    def run(self, sources: Sequence[Source]) -> Iterator[Values]:
        """Compute all values that the journal does not have; then yield those of each source, in order."""
        self._sources = sources
        done = [self._journal.get(source.item) is not None for source in sources]
        tasks = [self._task(source) for source, known in zip(sources, done, strict=True) if not known]
        options = self._settings.processes, self._settings.timeout_seconds, _name
        with (
            closing(stream_isolated(decode_task, tasks, *options)) as stream,
            Progress(self._what, len(sources), "videos") as progress,
        ):
            progress.resume(sum(done))
            for number, source in enumerate(sources):
                if done[number]:
                    self._batches.skip(len(self._read_summary(source).frames) * self._plan.clips_per_window)
                else:
                    self._take(number, stream, progress)
            self._batches.flush(end=True)
            self._finish()
            next(stream, None)  # raises what only its end shows
        return (self._collect(source) for source in sources)

    def seed(self, source: Source, summary: Summary, windows: Sequence[NDArray[Any]]) -> None:
        """Give the values of a source that are known from an earlier run."""
        for number, values in enumerate(windows):
            self._journal.put(f"{source.item}/{number}", values.astype(self._dtype).tobytes())
        self._journal.put(source.item, json.dumps(summary).encode())

    def _task(self, source: Source) -> Task:
        plan = self._plan
        if source.refused is not None:
            return RefusedTask(source.video, str(source.refused[0]), source.refused[1])
        if source.clip is not None:
            return ShardTask(source.clip, source.seconds, plan.shard_windows, plan.crops)
        place = source.path, source.start, source.end
        return VideoTask(*place, plan.windows, plan.crops, plan.short_side, plan.backend)

    def _take(self, number: int, stream: Iterator[tuple[int, Any]], progress: Progress) -> None:
        """Take a source's windows from the stream."""
        source, summary, outcome = self._sources[number], None, None
        self._batches.begin()
        for _, part in stream:
            if isinstance(part, Window):
                for crop, clip in enumerate(part.video):
                    self._batches.add(number, part.number * self._plan.clips_per_window + crop, clip)
                progress.advance(0, self._note())
            elif isinstance(part, Pulse):
                progress.advance(0, self._note())
            elif isinstance(part, Restart) or part is Turn.RESTARTED:
                self._forget(number)
            elif isinstance(part, Summary):
                summary = part
            else:
                outcome = part
                break
        if outcome is not Turn.FINISHED or summary is None or not summary.frames:
            self._forget(number)
        if isinstance(outcome, Failure):
            self._failures[source.item] = outcome
        elif summary is not None and outcome is Turn.FINISHED:
            self._ended.append((self._batches.next, source, summary))
        self._finish()
        progress.advance(note=self._note())

    def _forget(self, number: int) -> None:
        self._batches.restart()
        self._crops = {key: crops for key, crops in self._crops.items() if key[0] != number}

    def _note(self) -> str:
        """What the progress says besides videos; windows wait until their batch is full."""
        counts = {"windows": self._computed, "failed": len(self._failures)}
        return ", ".join(f"{count} {what}" for what, count in counts.items() if count)

    def _finish(self) -> None:
        """Mark the sources as finished whose values are all in the journal."""
        while self._ended and self._ended[0][0] <= self._batches.computed:
            _, source, summary = self._ended.pop(0)
            self._journal.put(source.item, json.dumps(summary).encode())

    def _deliver(self, number: int, clip: int, values: NDArray[np.float32]) -> None:
        window, crop = divmod(clip, self._plan.clips_per_window)
        crops = self._crops.setdefault((number, window), {})
        crops[crop] = values
        if len(crops) == self._plan.clips_per_window:
            del self._crops[number, window]
            value = self._combine(np.stack([crops[crop] for crop in sorted(crops)])).astype(self._dtype)
            self._journal.put(f"{self._sources[number].item}/{window}", value.tobytes())
            self._computed += 1

    def _read_summary(self, source: Source) -> Summary:
        failure = self._failures.get(source.item)
        if failure is not None:
            return Summary([], [], str(failure.status), failure.detail)
        return Summary(*json.loads(self._get(source.item)))

    def _collect(self, source: Source) -> Values:
        summary = self._read_summary(source)
        values = (
            np.frombuffer(self._get(f"{source.item}/{number}"), self._dtype) for number in range(len(summary.frames))
        )
        return Values(source, summary, values)

    def _get(self, item: str) -> bytes:
        data = self._journal.get(item)
        if data is None:
            raise DamagedError(f"{self._journal.folder}: the record of {item} is damaged or missing", REMOVE)
        return data


def _name(task: Task) -> str:
    return task.name
