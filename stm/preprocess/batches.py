"""Work in fixed batches, with the next one prepared in a thread meanwhile.

Where the batches of a shard begin and end depends on the shard alone, never on what an earlier attempt has finished.
A model's sums can differ in the last bit with the place of an item in its batch, so this is what makes a resumed job
give the same bytes as an uninterrupted one.
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
    """Yields the tasks' results in order, with up to `ahead` further ones under way in one thread."""
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(1) as pool:
        try:
            for task in tasks:
                waiting.append(pool.submit(task))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def needed_batches(owners: Sequence[str], finished: set[str], batch_size: int) -> list[range]:
    """The batches, as ranges of item numbers, that hold an item of an owner that is not finished.

    Args:
        owners: whose item each one is, in the order of the shard; an owner's items are neighbours.
    """
    every = [range(i, min(i + batch_size, len(owners))) for i in range(0, len(owners), batch_size)]
    return [batch for batch in every if any(owners[i] not in finished for i in batch)]


def generate_texts(
    owners: Sequence[str],
    batch_size: int,
    journal: Journal,
    load: Callable[[range], T],
    generate: Callable[[T], list[str]],
    progress: Progress,
) -> dict[str, list[str]]:
    """Runs a model that turns items into texts, and returns each owner's texts in the order of its items.

    Args:
        owners: whose item each one is; an owner's items are neighbours. Each owner has an entry in the journal.
        load: prepares a batch of item numbers; called in a thread, ahead of `generate`.
        generate: one text for each item of the batch.
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
            if owner in finished:
                continue
            texts.setdefault(owner, []).append(text)
            if len(texts[owner]) == counts[owner]:
                journal.put(owner, json.dumps(texts[owner]).encode())
                progress.advance()
    return texts
