"""Processing in fixed batches, while a thread prepares the next batches.

Batch boundaries depend only on the shard, never on what an earlier attempt finished. The position of an item in its
batch can change the last bit of a model's sums, so a resumed job writes the same bytes as an uninterrupted one only if
the boundaries are fixed.
"""

import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from stm.jobs.journal import Journal
from stm.jobs.progress import Progress

T = TypeVar("T")


def prefetch(tasks: Iterable[Callable[[], T]], ahead: int = 2) -> Iterator[T]:
    """Yield the results of the tasks in order, while a thread computes up to `ahead` results in advance."""
    pending: deque[Future[T]] = deque()
    with ThreadPoolExecutor(1) as pool:
        try:
            for task in tasks:
                pending.append(pool.submit(task))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def needed_batches(owners: Sequence[str], finished: set[str], batch_size: int) -> list[range]:
    """Return the batches, as ranges of item indices, that contain at least one item of an unfinished owner.

    Args:
        owners: the owner of each item, in the order of the shard; items of one owner are adjacent.
        finished: owners whose items need no computation.
    """
    batches = [range(i, min(i + batch_size, len(owners))) for i in range(0, len(owners), batch_size)]
    return [batch for batch in batches if any(owners[i] not in finished for i in batch)]


def generate_texts(
    owners: Sequence[str],
    batch_size: int,
    journal: Journal,
    load: Callable[[range], T],
    generate: Callable[[T], list[str]],
    progress: Progress,
) -> dict[str, list[str]]:
    """Generate one text per item with a model, and return the texts of each owner in the order of its items.

    Args:
        owners: the owner of each item (a clip or a label); items of one owner are adjacent.
        journal: receives one entry per finished owner.
        load: prepares a batch from its item indices; called in a thread, ahead of `generate`.
        generate: returns one text per item of the batch.
    """
    counts = Counter(owners)
    stored = {owner: journal.get(owner) for owner in counts}
    texts: dict[str, list[str]] = {owner: json.loads(data) for owner, data in stored.items() if data is not None}
    finished = set(texts)
    progress.resume(len(finished))
    batches = needed_batches(owners, finished, batch_size)
    for batch, loaded in zip(batches, prefetch(partial(load, batch) for batch in batches), strict=True):
        for item, text in zip(batch, generate(loaded), strict=True):
            owner = owners[item]
            # Recomputed only because it shares a batch with unfinished items.
            if owner in finished:
                continue
            texts.setdefault(owner, []).append(text)
            if len(texts[owner]) == counts[owner]:
                journal.put(owner, json.dumps(texts[owner]).encode())
                progress.advance()
    return texts
