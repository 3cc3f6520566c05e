"""The outcome of each clip of a shard: notes, journal records, and the status decided by the config's policies."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from stm.config import BadInput
from stm.jobs.journal import Journal
from stm.jobs.progress import Progress
from stm.jobs.status import Policy, Status
from stm.jobs.workers import Failure, run_isolated
from stm.storage.tables import DamagedError


class Note(NamedTuple):
    """One problem found in a clip."""

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


# Policies, strictest first: a clip with several problems is assigned the strictest of their policies.
STRICTNESS: Mapping[str, int] = {"fail": 0, "drop": 1, "keep": 2}


def decide(notes: Sequence[Note], bad_input: BadInput, *, usable: bool) -> Outcome:
    """Return a clip's outcome, decided by the first of its notes that has the strictest policy.

    Args:
        notes: problems, most severe first; empty means `ok`.
        usable: whether the clip has any result; without one, `keep` becomes `drop`.

    Returns:
        an outcome whose detail also names the remaining problems.
    """
    if not notes:
        return Outcome(Status.OK, "keep", "")
    note = min(notes, key=lambda n: STRICTNESS[bad_input.action(n.status)])
    policy = bad_input.action(note.status)
    if policy == "keep" and not usable:
        policy = "drop"
    others = [f"{n.status}: {n.detail}" for n in notes if n is not note]
    return Outcome(note.status, policy, "; ".join([note.detail, *others]))


def as_columns(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome as the columns `status`, `policy` and `detail` of a stage's table."""
    return {"status": str(outcome.status), "policy": outcome.policy, "detail": outcome.detail}


class Record(NamedTuple):
    """A worker's result for one clip."""

    header: dict[str, Any]
    notes: list[Note]
    blobs: list[bytes]


def pack_record(header: Mapping[str, Any], notes: Sequence[Note], blobs: Sequence[bytes] = ()) -> bytes:
    """Serialise a clip's JSON values, notes and binary blobs for the journal.

    Returns:
        the length of the JSON as 8 bytes, little-endian; the JSON; the concatenated blobs.
    """
    pairs = [[str(note.status), note.detail] for note in notes]
    text = json.dumps({"header": dict(header), "notes": pairs, "sizes": [len(blob) for blob in blobs]}).encode()
    # Raw blobs follow the JSON, because JPEGs and maps inside it would have to be encoded as text.
    return b"".join([len(text).to_bytes(8, "little"), text, *blobs])


def unpack_record(data: bytes) -> Record:
    """Deserialise a record written by `pack_record`."""
    start = 8 + int.from_bytes(data[:8], "little")
    values = json.loads(data[8:start])
    blobs = []
    for size in values["sizes"]:
        blobs.append(data[start : start + size])
        start += size
    notes = [Note(Status(status), detail) for status, detail in values["notes"]]
    return Record(values["header"], notes, blobs)


def read_record(journal: Journal, item: str, failures: Mapping[str, Failure]) -> Record:
    """Read a clip's record from the journal; if missing, return an empty record with the failure as its only note.

    Raises:
        DamagedError: the clip was finished without a failure, but its record cannot be read.
    """
    data = journal.get(item)
    if data is not None:
        return unpack_record(data)
    failure = failures.get(item)
    if failure is None:
        raise DamagedError(f"{journal.folder}: the record of {item} is damaged or missing; run again")
    return Record({}, [Note(failure.status, failure.detail)], [])


def name_item(row: Mapping[str, Any]) -> str:
    """Return a clip's identifier in a journal."""
    # The key alone is not enough: the same key with a different file, or a different part of it, is a different item.
    return json.dumps([row.get(name) for name in ("key", "path", "start", "end", "bytes", "sha256")])


class Task(Protocol):
    """The work on one clip; the worker function writes its record to the journal under `item`."""

    @property
    def item(self) -> str: ...

    @property
    def name(self) -> str:
        """The clip's name in error messages."""
        ...


VideoOutcome = tuple[str, Status, Policy, str]  # video id, status, policy, detail, as for `check_failures`
TaskT = TypeVar("TaskT", bound=Task)


def run_shard(
    title: str,
    function: Callable[[TaskT], Failure | None],
    tasks: Sequence[TaskT],
    journal: Journal,
    processes: int,
    timeout_seconds: float,
) -> dict[str, Failure]:
    """Run `function` in worker processes on every task that is not in the journal, and show progress.

    Args:
        title: label of the progress line.
        function: writes the record of its task to the journal, or returns the failure that prevented it.
        processes: number of worker processes.
        timeout_seconds: deadline per clip, after which its process is killed.

    Returns:
        the failures by item. They are not written to the journal, so a later attempt retries them.

    Raises:
        ItemKilledError: the machine ended the work on some clips, twice. The journal keeps all others.
        OSError: `function` met an error of the machine, such as a full disk.
    """
    journal.refresh()
    todo = [task for task in tasks if journal.get(task.item) is None]
    failures: dict[str, Failure] = {}
    with Progress(title, total=len(tasks), unit="clips") as progress:
        progress.resume(len(tasks) - len(todo))
        for index, outcome in run_isolated(function, todo, processes, timeout_seconds, _name):
            if isinstance(outcome, Failure):
                failures[todo[index].item] = outcome
            progress.advance(note=f"{len(failures)} failed" if failures else "")
    journal.refresh()
    return failures


def _name(task: Task) -> str:
    return task.name


def finished_rows(
    tasks: Sequence[TaskT],
    journal: Journal,
    failures: Mapping[str, Failure],
    bad_input: BadInput,
    make_row: Callable[[TaskT, Record, Outcome], dict[str, Any]],
    outcomes: list[VideoOutcome],
) -> Iterator[dict[str, Any]]:
    """Yield the row of each task, from its journal record or its failure, and append each outcome to `outcomes`.

    Only one record is in memory at a time, because the maps of a whole shard may not fit.
    """
    for task in tasks:
        record = read_record(journal, task.item, failures)
        outcome = decide(record.notes, bad_input, usable=bool(record.blobs))
        row = make_row(task, record, outcome)
        outcomes.append((row["video_id"], *outcome))
        yield row
