"""Parts of items arrive item by item, whatever the number of processes, and an item that crashes affects no other."""

import sys
from pathlib import Path
from typing import Any

import pytest

from stm.jobs.status import Status
from stm.jobs.streams import Turn, stream_isolated
from stm.jobs.workers import Failure, ItemKilledError

MODULE = """
import os, signal, time

def act(item):
    kind, value = item
    for part in range(value if isinstance(value, int) else 2):
        if part == 1 and kind == "raise":
            raise KeyError("odd")
        if part == 1 and kind == "disk":
            raise OSError(28, "No space left on device")
        if part == 1 and kind == "hang":
            time.sleep(600)
        if part == 1 and kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if part == 1 and kind == "once" and not os.path.exists(value):
            open(value, "w").close()
            os.kill(os.getpid(), signal.SIGSEGV)
        yield f"{kind}{part}"
"""


@pytest.fixture
def act(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "acts_for_streams.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    import acts_for_streams  # type: ignore[import-not-found]

    yield acts_for_streams.act
    sys.modules.pop("acts_for_streams")


def test_parts_come_item_by_item_and_a_crash_is_tried_again(act: Any, tmp_path: Path) -> None:
    items = [("a", 3), ("raise", 2), ("once", str(tmp_path / "marker")), ("b", 1), ("none", 0), ("c", 2)]
    events = list(stream_isolated(act, items, processes=2, timeout_seconds=60, ahead=1))
    assert [index for index, _ in events] == sorted(index for index, _ in events)
    parts = {index: [part for i, part in events if i == index] for index in range(len(items))}
    done = Turn.FINISHED
    assert parts[0] == ["a0", "a1", "a2", done]
    assert parts[1][0] == "raise0" and parts[1][1] == Failure(Status.CRASHED, "KeyError: 'odd'")
    assert parts[2] == ["once0", Turn.RESTARTED, "once0", "once1", done]
    assert (parts[3], parts[4], parts[5]) == (["b0", done], [done], ["c0", "c1", done])


@pytest.mark.slow
def test_a_part_that_is_not_finished_at_its_deadline_ends_its_item_alone(act: Any) -> None:
    events = list(stream_isolated(act, [("hang", 2), ("a", 1)], processes=2, timeout_seconds=1.0))
    assert [part for index, part in events if index == 0][:3] == ["hang0", Turn.RESTARTED, "hang0"]
    assert events[3][1].status == Status.TIMEOUT
    assert events[4:] == [(1, "a0"), (1, Turn.FINISHED)]


def test_the_machines_errors_end_the_stream_and_kills_are_named_at_its_end(act: Any) -> None:
    with pytest.raises(OSError, match="while processing disk"):
        list(stream_isolated(act, [("disk", 2)], 1, 60, lambda item: item[0]))
    events = []
    stream = stream_isolated(act, [("kill", 2), ("a", 1)], 1, 60, lambda item: item[0])
    with pytest.raises(ItemKilledError, match=r"kill: .*SIGKILL"):
        while True:
            events.append(next(stream))
    assert events[-3:] == [(0, Turn.GIVEN_UP), (1, "a0"), (1, Turn.FINISHED)]
