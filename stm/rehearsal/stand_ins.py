"""Puts a small model or file where the rehearsed config expects one."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from stm.config import (
    Blip2Captions,
    Config,
    ConfigError,
    FineTune,
    LanguageModelCaptions,
    LanguageRun,
    Run,
    VisionLanguageCaptions,
)
from stm.layout import Layout
from stm.pretrained.local_files import ACTION_CLIP
from stm.rehearsal import checkpoints, models, vision_language
from stm.storage.shipped import PACKAGE

_PREFIXES = ("clip:", "local-dir:", "transformers:", ACTION_CLIP)


class StandIn(NamedTuple):
    """A model or file of the full config, and what takes its place."""

    full: str  # as in the config; empty if only a stand-in fits the small student
    place: str  # below the rehearsal's folder
    write: Callable[[Path], None]  # writes the small model


def write_stand_ins(full: Config, small: Config, folder: Path) -> list[str]:
    """Write all models and files that the rehearsed config names, once each; return those used as they are.

    Local models that are small are copied; so are the user's own Python files. Those that come with the package stay there.
    """
    own, written = [], set[str]()
    for stand_in in _list(full, small, folder):
        if stand_in.place in written:
            continue
        written.add(stand_in.place)
        if stand_in.place.startswith(PACKAGE):
            own.append(stand_in.full)
            continue
        target = folder / stand_in.place
        if models.is_small(stand_in.full):
            models.copy_model(_path(stand_in.full), target)
            own.append(stand_in.full)
        elif not target.exists():
            stand_in.write(target)
    return own


def _list(full: Config, small: Config, folder: Path) -> Iterator[StandIn]:
    for name in full.dataset_names:
        yield from _of_dataset(full.of(name), small.of(name))
    weights = {Layout.of(small, small.dataset_of(run)).weights(run).as_posix() for run in small.runs}
    for name, run in full.pretrain.items():
        yield from _of_run(run, small.pretrain[name], weights, folder)
    for name, task in full.evaluate.items():
        other = small.evaluate[name]
        if isinstance(task, FineTune) and task.classes is not None and isinstance(other, FineTune):
            yield StandIn(task.classes, str(other.classes), _refuse(task.classes))


def _of_dataset(full: Config, small: Config) -> Iterator[StandIn]:
    for name, captions in full.captions.items():
        other = small.captions[name]
        if isinstance(captions, Blip2Captions) and isinstance(other, Blip2Captions):
            yield StandIn(captions.model, other.model, models.write_blip2)
        elif isinstance(captions, LanguageModelCaptions) and isinstance(other, LanguageModelCaptions):
            yield _language_model(captions, other)
        elif isinstance(captions, VisionLanguageCaptions) and isinstance(other, VisionLanguageCaptions):
            yield _vision_language_model(captions, other)
    yield _clip(full.similarity.model, small.similarity.model)
    pooling = full.text.pooling
    if full.text.model.startswith("transformers:"):
        place = _path(small.text.model)
        yield StandIn(full.text.model, place, lambda path: models.write_text_encoder(path, pooling))
    else:
        yield _clip(full.text.model, small.text.model)
    if small.flow.weights is not None:
        yield StandIn(str(full.flow.weights), small.flow.weights, checkpoints.write_raft)


def _of_run(full: Run, small: Run, weights: set[str], folder: Path) -> Iterator[StandIn]:
    for file in full.mask_files:
        if not Path(file).is_absolute():
            yield StandIn(file, file, _refuse(file))
    if isinstance(full, LanguageRun) and full.language and isinstance(small, LanguageRun) and small.language:
        layer = full.language.fusion_layer
        yield StandIn(full.language.model, small.language.model, lambda path: models.write_bert(path, layer))
    if small.release is not None:
        yield StandIn("", small.release, lambda path: checkpoints.write_release(path, small, folder))
        return
    if full.init is not None and small.init is not None and small.init not in weights:
        yield _initial(full.init, small.init, small)
    teacher, other = getattr(full, "teacher", None), getattr(small, "teacher", None)
    if teacher is not None and other is not None:
        yield _teacher(teacher.model, other.model)
        fusion = getattr(other, "temporal_fusion", None)
        if fusion is not None:
            yield StandIn("", fusion, checkpoints.write_action_clip)


def _initial(full: str, small: str, run: Run) -> StandIn:
    if full.startswith("clip:"):
        return _clip(full.removeprefix("clip:"), small.removeprefix("clip:"))
    return StandIn("", small, lambda path: checkpoints.write_initial(path, run))


def _teacher(full: str, small: str) -> StandIn:
    if full.startswith(ACTION_CLIP):
        return StandIn("", _path(small), checkpoints.write_action_clip)
    if full.startswith("transformers:"):
        return StandIn(full, _path(small), lambda path: models.write_image_text_model(path, full))
    return _clip(full, small)


def _language_model(full: LanguageModelCaptions, small: LanguageModelCaptions) -> StandIn:
    return StandIn(full.model, small.model, lambda path: models.write_language_model(path, full.prompts))


def _vision_language_model(full: VisionLanguageCaptions, small: VisionLanguageCaptions) -> StandIn:
    def write(path: Path) -> None:
        vision_language.write_vision_language_model(path, full.prompts, list(full.template))

    return StandIn(full.model, small.model, write)


def _clip(full: str, small: str) -> StandIn:
    place = _path(small)
    return StandIn(full, place, lambda path: models.write_clip(full, path, place))


def _path(model: str) -> str:
    """The path in a model's name, without what says how it is read."""
    prefix = next((known for known in _PREFIXES if model.startswith(known)), "")
    return model.removeprefix(prefix)


def _refuse(name: str) -> Callable[[Path], None]:
    def refuse(path: Path) -> None:
        raise ConfigError(f"{name}: the config names this file, and it does not exist")

    return refuse
