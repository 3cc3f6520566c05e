"""Converts published weights (`release`) to the weights of a run, which evaluations then test as they are."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from stm.config import LanguageRun, PretrainRun
from stm.models.text.decoder import TextDecoder
from stm.models.text.split_bert import SplitBert
from stm.models.video_language import ANSWERS, EXTRA, PARTS, VideoLanguageModel
from stm.models.vit import VideoEncoder
from stm.models.weights import zoo
from stm.models.weights.checks import WeightsError, build_encoder, check_tensors
from stm.models.weights.released import Release, read_release
from stm.models.weights.safetensors import write_own
from stm.storage.files import sha256_file, write_json
from stm.storage.receipts import make_receipt

_log = logging.getLogger(__name__)


def convert_release(run: PretrainRun | LanguageRun, output: Path) -> None:
    """Writes `weights.safetensors` and `config.json`, as `stm.training.pretraining.pretrain` does, without training.

    The release of a run with `language` is a checkpoint of UMT's second stage or of STM; that of any other run is a
    fine-tuned classifier.

    Args:
        run: the settings, with `release`.
        output: the folder of the run.

    Raises:
        ValueError: the file cannot be read, or does not contain the run's model; the message lists the differences.
    """
    assert run.release is not None
    path = Path(run.release).expanduser()
    if isinstance(run, LanguageRun) and run.language is not None:
        _convert_language(run, path, output / "weights.safetensors")
    else:
        _convert_classifier(run, path, output / "weights.safetensors")
    settings = run.model_dump(mode="json", exclude={*run.cache_neutral, "seed"})
    receipt = make_receipt("pretrain", settings, ("torch", "timm"), release={"sha256": sha256_file(path)})
    write_json(output / "config.json", {"run": run.model_dump(mode="json"), "receipt": receipt})


def _convert_classifier(run: PretrainRun | LanguageRun, path: Path, target: Path) -> None:
    weights = zoo.read(path, zoo.describe(run))
    if weights.kind != "classifier":
        raise WeightsError(
            f"release: {path} has no classifier, but is a model for {weights.kind}; to probe or fine-tune it, give it as `init`"
        )
    _log.info(f"release: {path}: encoder and classifier of {weights.classes} classes")
    write_own(weights, target)


def _convert_language(run: LanguageRun, path: Path, target: Path) -> None:
    assert run.language is not None
    release = read_release(path, zoo.describe(run), run.language.fusion_layer)
    with torch.device("meta"):  # only names and shapes are needed
        encoder = VideoEncoder(release.encoder.architecture)
        model = VideoLanguageModel(encoder, SplitBert.blank(run.language), run.language.embedding)
        answers = TextDecoder.of(model.language).weights()
    what = f"release: {path} is read as the run's model"
    model.absent = find_absent(release.language)
    check_tensors(release.language, model.language_state(), what)
    if release.decoder:
        check_tensors(release.decoder, answers, f"{what} with a decoder of answers")
    for note in _describe(release, model.absent):
        _log.info(f"release: {path}: {note}")
    parts = {EXTRA: release.language} | ({ANSWERS: release.decoder} if release.decoder else {})
    zoo.save(build_encoder(release.encoder), target, extra=parts, header={EXTRA: model.describe()})


def find_absent(state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The `PARTS` of a model that have no tensor in a state dict."""
    return tuple(part for part, starts in PARTS.items() if not any(name.startswith(starts) for name in state))


def _describe(release: Release, absent: tuple[str, ...]) -> list[str]:
    """Human-readable notes on what was taken and what was not."""
    notes = ["video encoder, text layers and fusion layers" + ("; decoder of answers" if release.decoder else "")]
    if absent:
        notes.append(f"it does not contain: {', '.join(absent)}")
    if release.unused:
        notes.append(f"not used, because only training needs it: {', '.join(release.unused)}")
    return notes
