"""Checks the evaluations of a config against the protocols of their benchmarks.

A wrong number of frames, text length or split gives results that look fine and cannot be compared with any others. So a
config that differs from the protocol is refused before anything runs.
"""

from collections.abc import Iterator

from stm.config import Config, LanguageDataset, LanguageRun, LanguageTask, is_language_run
from stm.datasets.folder import DatasetError
from stm.datasets.video_text.protocol import InputSizes, Protocol, protocol_names, read_protocol

_TASKS = {
    "video_text_retrieval": "retrieval",
    "question_answering": "question_answering",
    "multiple_choice": "multiple_choice",
    "captioning": "captioning",
}


def check_tasks(config: Config) -> None:
    """Checks every evaluation with text on a benchmark that has a protocol.

    Raises:
        DatasetError: one line per key that differs from the protocol, with the value that it must have.
    """
    wrong = list(dict.fromkeys(_differences(config)))
    if wrong:
        raise DatasetError(
            "evaluations that do not follow their benchmark's protocol:\n" + "\n".join(f"  {w}" for w in wrong)
        )


def has_shared_texts(config: Config, run: str, task: str) -> bool:
    """Whether clips with equal captions share them in a retrieval: the caption is one query, and each of the clips is correct.

    The protocol of the benchmark decides (`several_videos_per_text`: SSv2), not the config. Without a protocol a caption
    belongs to its own clip only.

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
        if not isinstance(task, LanguageTask):
            continue
        for run_name in config.runs_of(name):
            run, dataset = config.pretrain[run_name], config.of(config.dataset_of(run_name, name)).dataset
            if not isinstance(dataset, LanguageDataset) or not is_language_run(run):
                continue
            if dataset.source not in protocol_names():  # a corpus of the web
                continue
            protocol = read_protocol(dataset.source)
            where = f"evaluate.{name}"
            if _TASKS[task.task] != protocol.task:
                yield f"{where}.task is {task.task}, and {protocol.title} is a benchmark of {protocol.task}"
                continue
            yield from _compare(where, task, run, protocol)


def _compare(where: str, task: LanguageTask, run: LanguageRun, protocol: Protocol) -> Iterator[str]:
    tuned = task.optimisation is not None
    sizes: InputSizes | None = protocol.fine_tuned if tuned else protocol.zero_shot
    if sizes is None:
        yield f"{where} is zero-shot, for which {protocol.title} has no protocol; give `optimisation`"
        return
    own = run.language.max_tokens if run.language is not None else None
    wanted: dict[str, tuple[object, object]] = {
        "frames": (task.frames or run.frames, sizes.test_frames),
        "max_tokens": (task.max_tokens or own, sizes.max_text_tokens),
        "test_split": (task.test_split, protocol.test),
    }
    if tuned:
        wanted["validation_split"] = (task.validation_split, protocol.validation)
    if protocol.max_answer_tokens is not None:
        wanted["max_answer_tokens"] = (getattr(task, "max_answer_tokens", None), protocol.max_answer_tokens)
    for key, (found, right) in wanted.items():
        if found != right:
            yield f"{where}.{key} is {found}, and {protocol.title} asks for {right} (config/datasets)"
