"""What becomes of each clip of a shard: notes, records in the journal, and the status that the config's policies give it."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from stm.config import BadInput
from stm.jobs.journal import Journal
from stm.jobs.progress import Progress
from stm.jobs.status import Policy, Status
from stm.jobs.workers import Failure, run_isolated


class Note(NamedTuple):
    """Something noticed about a clip."""

    status: Status
    detail: str


class Outcome(NamedTuple):
    """A clip's status in a stage's table."""

    status: Status
    policy: Policy
    detail: str

    @property
    def kept(self) -> bool:
        return self.policy == "keep"


_STRICTNESS: Mapping[str, int] = {"fail": 0, "drop": 1, "keep": 2}


def decide(notes: Sequence[Note], bad_input: BadInput, *, usable: bool) -> Outcome:
    """One status for everything that was noticed: the one with the strictest policy; among equals the first note.

    Args:
        notes: what was noticed, gravest first; none means `ok`.
        usable: whether the clip has any result; without one, `keep` becomes `drop`.
    """
    if not notes:
        return Outcome(Status.OK, "keep", "")
    note = min(notes, key=lambda n: _STRICTNESS[bad_input.action(n.status)])
    policy = bad_input.action(note.status)
    if policy == "keep" and not usable:
        policy = "drop"
    others = [f"{n.status}: {n.detail}" for n in notes if n is not note]
    return Outcome(note.status, policy, "; ".join([note.detail, *others]))


def as_columns(outcome: Outcome) -> dict[str, Any]:
    """The columns `status`, `policy` and `detail` of a stage's table."""
    return {"status": str(outcome.status), "policy": outcome.policy, "detail": outcome.detail}


class Record(NamedTuple):
    """What a worker found out about a clip."""

    header: dict[str, Any]
    notes: list[Note]
    blobs: list[bytes]


def pack_record(header: Mapping[str, Any], notes: Sequence[Note], blobs: Sequence[bytes] = ()) -> bytes:
    """One string of bytes for a clip: JSON values, what was noticed about it, and blobs."""
    noted = [[str(note.status), note.detail] for note in notes]
    text = json.dumps({"header": dict(header), "notes": noted, "sizes": [len(blob) for blob in blobs]}).encode()
    return b"".join([len(text).to_bytes(8, "little"), text, *blobs])


def unpack_record(data: bytes) -> Record:
    start = 8 + int.from_bytes(data[:8], "little")
    values = json.loads(data[8:start])
    blobs = []
    for size in values["sizes"]:
        blobs.append(data[start : start + size])
        start += size
    notes = [Note(Status(status), detail) for status, detail in values["notes"]]
    return Record(values["header"], notes, blobs)


def read_record(journal: Journal, item: str, failures: Mapping[str, Failure]) -> Record:
    """A clip's record; for one without, because its process was killed, a record with nothing but that note."""
    data = journal.get(item)
    if data is not None:
        return unpack_record(data)
    failure = failures[item]
    return Record({}, [Note(failure.status, failure.detail)], [])


def name_item(row: Mapping[str, Any]) -> str:
    """A clip's name in a journal: another file, or another part of it, under the same key is another item."""
    return json.dumps([row.get(name) for name in ("key", "path", "start", "end", "bytes", "sha256")])


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
