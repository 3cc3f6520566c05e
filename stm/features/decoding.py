"""What worker processes do; it loads no torch, which would take them seconds."""

from collections.abc import Iterator
from dataclasses import dataclass

from stm.features.cutting import Summary
from stm.features.shards import ShardTask, read_packed
from stm.features.videos import Part, VideoTask, decode_video


@dataclass(frozen=True)
class RefusedTask:
    """A source that cannot be read, as is known before it is opened."""

    name: str
    status: str
    detail: str


Task = VideoTask | ShardTask | RefusedTask


def decode_task(task: Task) -> Iterator[Part]:
    """Yield the windows of a source, then their summary, in a worker process."""
    if isinstance(task, RefusedTask):
        return iter([Summary([], [], task.status, task.detail)])
    return read_packed(task) if isinstance(task, ShardTask) else decode_video(task)
