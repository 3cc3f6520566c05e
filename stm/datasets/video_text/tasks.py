"""Checks the evaluations of a config against the protocols of their benchmarks.

A wrong number of frames, text length or split produces results that look plausible but are not comparable. A config
that deviates from the protocol is therefore rejected before anything runs.
"""

from collections.abc import Iterator
from pathlib import Path

from stm.config import Config, EvaluationTask, HumanCaptions, LanguageDataset, LanguageRun, Run
from stm.datasets.folder import DatasetError
from stm.datasets.video_text import find_answers, read_answers
from stm.datasets.video_text.protocol import InputSizes, Protocol, protocol_names, read_protocol


def check_tasks(config: Config) -> None:
    """Checks every evaluation with text, and every pretraining, on a benchmark that has a protocol.

    Raises:
        DatasetError: one line per key that deviates from the protocol, with the required value.
    """
    wrong = list(dict.fromkeys([*_differences(config), *_unshared_texts(config), *_absent_captions(config)]))
    if wrong:
        raise DatasetError(
            "settings that do not follow their benchmark's protocol:\n" + "\n".join(f"  {w}" for w in wrong)
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
    benchmark = _benchmark(config, config.dataset_of(run, task))
    return benchmark is not None and read_protocol(benchmark.source).several_videos_per_text


def candidate_answers(config: Config, run: str, task: str) -> tuple[str, ...]:
    """The answers among which a benchmark's questions are answered; empty if it has no such list.

    Raises:
        DatasetError: the benchmark's file is missing or is not a list of answers.
    """
    benchmark = _questions(config, run, task)
    return () if benchmark is None else read_answers(benchmark)


def has_own_answers(config: Config, run: str, task: str) -> bool:
    """Whether the benchmark of a task has a list of `candidate_answers`, downloaded or not."""
    return _questions(config, run, task) is not None


def answers_file(config: Config, run: str, task: str) -> Path | None:
    """The file with the `candidate_answers`; None if there is none, or none yet."""
    benchmark = _questions(config, run, task)
    return None if benchmark is None else find_answers(benchmark)


def _questions(config: Config, run: str, task: str) -> LanguageDataset | None:
    asks = config.evaluate[task].benchmark_task == "question_answering"
    benchmark = _benchmark(config, config.dataset_of(run, task)) if asks else None
    return benchmark if benchmark is not None and read_protocol(benchmark.source).answers else None


def _benchmark(config: Config, name: str) -> LanguageDataset | None:
    """A dataset of the config, if it is a benchmark with a protocol: folders of videos and web corpora have none."""
    dataset = config.of(name).dataset
    known = isinstance(dataset, LanguageDataset) and dataset.source in protocol_names()
    return dataset if known and isinstance(dataset, LanguageDataset) else None


def _unshared_texts(config: Config) -> Iterator[str]:
    """Pretraining runs that would take clips with the same caption as negatives on a benchmark that shares captions."""
    for name, run in config.pretrain.items():
        if not isinstance(run, LanguageRun) or not run.has_text or run.objectives.shared_texts:
            continue
        for source, _ in run.video_sources:
            benchmark = _benchmark(config, source or config.dataset_of(name))
            if benchmark is not None and read_protocol(benchmark.source).several_videos_per_text:
                title = read_protocol(benchmark.source).title
                yield f"pretrain.{name}.objectives.shared_texts is false, and clips of {title} share captions: set it"


def _absent_captions(config: Config) -> Iterator[str]:
    """Datasets that would pack the captions of a benchmark that has only questions: every clip would be dropped."""
    for name in config.dataset_names:
        benchmark, corpus = _benchmark(config, name), config.of(name)
        if benchmark is None or read_protocol(benchmark.source).task != "question_answering":
            continue
        for source in corpus.pack.sources:
            if isinstance(corpus.captions[source], HumanCaptions):
                where = f"datasets.{name}.pack" if config.datasets else "pack"
                title = read_protocol(benchmark.source).title
                yield f"{where}.captions is {source}, and {title} has questions but no captions: set it to null"


def _differences(config: Config) -> Iterator[str]:
    for name, task in config.evaluate.items():
        if task.benchmark_task is None:
            continue
        for run in config.runs_of(name):
            benchmark = _benchmark(config, config.dataset_of(run, name))
            if benchmark is None:
                continue
            protocol, where = read_protocol(benchmark.source), f"evaluate.{name}"
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
