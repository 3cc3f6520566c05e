"""Checks the evaluations of a config against the protocols of their benchmarks.

A wrong number of frames, text length or split produces results that look plausible but are not comparable. A config
that deviates from the protocol is therefore rejected before anything runs.
"""

from collections.abc import Iterator

from stm.config import Config, EvaluationTask, LanguageDataset, Run
from stm.datasets.folder import DatasetError
from stm.datasets.video_text.protocol import InputSizes, Protocol, protocol_names, read_protocol


def check_tasks(config: Config) -> None:
    """Checks every evaluation with text on a benchmark that has a protocol.

    Raises:
        DatasetError: one line per key that deviates from the protocol, with the required value.
    """
    wrong = list(dict.fromkeys(_differences(config)))
    if wrong:
        raise DatasetError(
            "evaluations that do not follow their benchmark's protocol:\n" + "\n".join(f"  {w}" for w in wrong)
        )


def has_shared_texts(config: Config, run: str, task: str) -> bool:
    """Whether clips with equal captions share them in retrieval: one query per caption, with all of its clips correct.

    This is set by the benchmark's protocol (`several_videos_per_text`: SSv2), not by the config. Without a protocol, a
    caption matches only its own clip.

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
            # Folders of videos and web corpora have no protocol.
            if not isinstance(dataset, LanguageDataset) or dataset.source not in protocol_names():
                continue
            protocol, where = read_protocol(dataset.source), f"evaluate.{name}"
            if task.benchmark_task != protocol.task:
                yield f"{where}.task is {task.task}, and {protocol.title} is a benchmark of {protocol.task}"
                continue
            yield from _compare(where, task, config.pretrain[run], protocol)


def _compare(where: str, task: EvaluationTask, run: Run, protocol: Protocol) -> Iterator[str]:
    sizes: InputSizes | None = protocol.fine_tuned if task.fine_tunes else protocol.zero_shot
    if sizes is None:
        yield f"{where} is zero-shot, for which {protocol.title} has no protocol; give `optimisation`"
        return
    required: dict[str, object] = {
        "frames": sizes.test_frames,
        "max_tokens": sizes.max_text_tokens,
        "test_split": protocol.test,
    }
    if task.trains:
        required["validation_split"] = protocol.validation
    if protocol.max_answer_tokens is not None:
        required["max_answer_tokens"] = protocol.max_answer_tokens
    configured = task.protocol_settings(run)
    for key, value in required.items():
        if configured[key] != value:
            yield f"{where}.{key} is {configured[key]}, and {protocol.title} requires {value} (config/datasets)"
