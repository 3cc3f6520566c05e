"""Holds a config's evaluations against the protocols of the benchmarks that they are done on.

A wrong number of frames, length of text or split makes results that look fine and compare with nobody's. So a config that
says other ones than the protocol is refused before anything runs.
"""

from collections.abc import Iterator

from stm.config import Config, EvaluationTask, LanguageDataset, Run
from stm.datasets.folder import DatasetError
from stm.datasets.video_text.protocol import Feed, Protocol, protocol_names, read_protocol


def check_tasks(config: Config) -> None:
    """Checks every evaluation with text that is done on a benchmark with a protocol.

    Raises:
        DatasetError: one line for each key that says something else than the protocol, with what it must say.
    """
    wrong = list(dict.fromkeys(_differences(config)))
    if wrong:
        raise DatasetError(
            "evaluations that do not follow their benchmark's protocol:\n" + "\n".join(f"  {w}" for w in wrong)
        )


def has_shared_texts(config: Config, run: str, task: str) -> bool:
    """Whether clips with an equal caption share it in a retrieval: the caption asks once, and each of them is right.

    The protocol of the evaluation's benchmark says it (`several_videos_per_text`: SSv2), and no key of a config can. Without
    a protocol a caption means its own clip alone.

    Args:
        run, task: names in the config.

    Raises:
        DatasetError: the protocol cannot be read.
    """
    dataset = config.of(config.dataset_of(run, task)).dataset
    if not isinstance(dataset, LanguageDataset) or dataset.source not in protocol_names():
        return False
    return read_protocol(dataset.source).several_videos_per_text


def _differences(config: Config) -> Iterator[str]:
    for name, task in config.evaluate.items():
        if task.benchmark_task is None:
            continue
        for run in config.runs_of(name):
            dataset = config.of(config.dataset_of(run, name)).dataset
            if (
                not isinstance(dataset, LanguageDataset) or dataset.source not in protocol_names()
            ):  # or a corpus of the web
                continue
            protocol, where = read_protocol(dataset.source), f"evaluate.{name}"
            if task.benchmark_task != protocol.task:
                yield f"{where}.task is {task.task}, and {protocol.title} is a benchmark of {protocol.task}"
                continue
            yield from _compare(where, task, config.pretrain[run], protocol)


def _compare(where: str, task: EvaluationTask, run: Run, protocol: Protocol) -> Iterator[str]:
    feed: Feed | None = protocol.fine_tuned if task.fine_tunes else protocol.zero_shot
    if feed is None:
        yield f"{where} is zero-shot, for which {protocol.title} has no protocol; give `optimisation`"
        return
    wanted: dict[str, object] = {
        "frames": feed.test_frames,
        "max_tokens": feed.max_text_tokens,
        "test_split": protocol.test,
    }
    if task.fine_tunes:
        wanted["validation_split"] = protocol.validation
    if protocol.max_answer_tokens is not None:
        wanted["max_answer_tokens"] = protocol.max_answer_tokens
    found = task.prescribed(run)
    for key, right in wanted.items():
        if found[key] != right:
            yield f"{where}.{key} is {found[key]}, and {protocol.title} asks for {right} (config/datasets)"
