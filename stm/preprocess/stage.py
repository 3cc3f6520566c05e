"""A stage's work on one shard: what the journal holds already is not done again, the rest goes to worker processes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from stm.config import BadInput
from stm.jobs.progress import Progress
from stm.jobs.workers import Failure, run_isolated
from stm.manifest import Policy, Status
from stm.preprocess.outcome import Outcome, decide
from stm.preprocess.records import Record, read_record
from stm.storage.files import Journal


class Task(Protocol):
    """One clip's work; its function leaves the record in the journal under `item`."""

    @property
    def item(self) -> str: ...


Ended = tuple[str, Status, Policy, str]  # video id, and how a clip ended, as `check_failures` takes it
AnyTask = TypeVar("AnyTask", bound=Task)


def run_shard(
    title: str,
    function: Callable[[AnyTask], Failure | None],
    tasks: Sequence[AnyTask],
    journal: Journal,
    processes: int,
    timeout_seconds: float,
) -> dict[str, Failure]:
    """Runs `function` on every task that the journal lacks, and shows the progress.

    Args:
        function: puts the record of its task into the journal, or returns why there is none.

    Returns:
        the items that failed. They are not in the journal, so a later attempt tries them again.
    """
    todo = [task for task in tasks if journal.get(task.item) is None]
    failures: dict[str, Failure] = {}
    with Progress(title, total=len(tasks), unit="clips") as progress:
        progress.resume(len(tasks) - len(todo))
        for index, outcome in run_isolated(function, todo, processes, timeout_seconds):
            if isinstance(outcome, Failure):
                failures[todo[index].item] = outcome
            progress.advance(note=f"{len(failures)} failed" if failures else "")
    return failures


def finished_rows(
    tasks: Sequence[AnyTask],
    journal: Journal,
    failures: Mapping[str, Failure],
    bad_input: BadInput,
    make_row: Callable[[AnyTask, Record, Outcome], dict[str, Any]],
    outcomes: list[Ended],
) -> Iterator[dict[str, Any]]:
    """The row of each task, from its record in the journal or its failure; how each ended is added to `outcomes`."""
    for task in tasks:
        record = read_record(journal, task.item, failures)
        outcome = decide(record.notes, bad_input, usable=bool(record.blobs))
        row = make_row(task, record, outcome)
        outcomes.append((row["video_id"], *outcome))
        yield row
