"""`stm retrieve`: the videos of a folder that fit a text best."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stm.config import Text
from stm.evaluation.features import average_vectors
from stm.evaluation.retrieval.embed import check_encoder, check_width
from stm.features.cutting import Summary
from stm.features.extraction import TableWriter, make_plan
from stm.features.inputs import Source, check_output, collect_sources
from stm.features.model import ClipModel, find_device, hash_source, read_config, read_weights
from stm.features.settings import ClipSettings, FeatureError
from stm.features.table import FeatureTable, read_features
from stm.jobs.progress import say
from stm.methods.contrast_head import EXTRA as CONTRAST
from stm.methods.contrast_head import VideoEmbedder, load_contrast_head
from stm.models.video_language import EXTRA as LANGUAGE
from stm.models.video_language import load_video_language
from stm.models.weights.checks import Weights, build_encoder
from stm.models.weights.provenance import own_file
from stm.models.weights.safetensors import read_extra_names
from stm.pretrained.hub import ModelError
from stm.pretrained.text_encoder import TextEncoder

_MAX_TOKENS = 32  # of a text, unless the run's config says otherwise
_NO_TEXT = (
    "these weights have no text, so that they cannot compare it with videos. Take a run of umt, stm or clusterstm with "
    "`language`, or a run of mae with `contrast`; `stm features` works with any weights"
)

Embed = Callable[[Sequence[str]], NDArray[np.float32]]  # texts to vectors [texts, D]


@dataclass(frozen=True)
class Match:
    """A video that was found."""

    video: str
    path: str
    score: float  # cosine similarity


@dataclass(frozen=True)
class TwoTowers:
    """A model of videos and one of texts in a common space."""

    video: ClipModel
    embed_texts: Embed
    average: Callable[[NDArray[np.float32]], NDArray[np.float32]]  # vectors of windows [1, windows, D] -> [1, D]
    settings: ClipSettings


def retrieve(
    weights: str | Path,
    texts: str | Sequence[str],
    inputs: str | Path | Sequence[str | Path],
    settings: ClipSettings | None = None,
    *,
    top: int = 5,
    index: str | Path | None = None,
    text_model: str | None = None,
    text_pooling: str | None = None,
    root: str | Path | None = None,
) -> list[list[Match]]:
    """Find the videos that fit each text best.

    The videos' vectors are kept in a table, and computed only for videos that are not in it, or have changed since.

    Args:
        weights: a run's weights with text: its folder or file.
        inputs: see `stm.features.inputs.collect_sources`.
        settings: which windows; by default one, sampled as the run's clips.
        top: number of videos per text.
        index: the table; by default beside the first input, named like it with `.stm-retrieve.parquet` behind.
        text_model: the text encoder of a run with `contrast`, as `text.model` of a config; by default the one in its weights.
        text_pooling: as `text.pooling` of a config.

    Returns:
        per text, its videos, the most similar first.

    Raises:
        FeatureError: the weights have no text, or an option or input cannot be used.
        ModelError: the text encoder cannot be loaded.
    """
    settings = settings or ClipSettings()
    settings.check()
    texts = [texts] if isinstance(texts, str) else texts
    if not texts or not all(text.strip() for text in texts):
        raise FeatureError("a text is empty; describe what the videos show")
    sources = collect_sources(inputs, None if root is None else Path(root))
    first = Path(inputs if isinstance(inputs, str | Path) else inputs[0]).expanduser().resolve()
    place = first.parent / f"{first.name}.stm-retrieve.parquet" if index is None else Path(index)
    check_output(place, [".parquet"], inputs)
    towers = load_towers(weights, settings, text_model, text_pooling)
    table = _update_index(towers, weights, sources, place)
    videos, vectors = _average(towers, table, {source.video for source in sources})
    if not videos:
        raise FeatureError("none of the videos can be read")
    similarity = towers.embed_texts(list(texts)) @ vectors.T
    found = []
    for scores in similarity:
        order = np.argsort(-scores, kind="stable")[:top].tolist()
        found.append([Match(videos[place][0], videos[place][1], float(scores[place])) for place in order])
    return found


def _average(
    towers: TwoTowers, table: FeatureTable, wanted: set[str]
) -> tuple[list[tuple[str, str]], NDArray[np.float32]]:
    """Return the (id, path) of each video with vectors, and the mean of its vectors, [videos, D]."""
    rows: dict[tuple[str, str], list[int]] = {}
    names = zip(table.rows.column("video").to_pylist(), table.rows.column("path").to_pylist(), strict=True)
    for number, name in enumerate(names):
        if name[0] in wanted:
            rows.setdefault(name, []).append(number)
    means = [towers.average(table.features[numbers][None])[0] for numbers in rows.values()]
    return list(rows), np.stack(means) if means else np.zeros((0, 0), np.float32)


def _update_index(towers: TwoTowers, weights: str | Path, sources: Sequence[Source], path: Path) -> FeatureTable:
    """Compute the vectors that the table does not have, and write it."""
    plan = make_plan(towers.video, towers.settings, weights, windows=1)
    writer = TableWriter(
        towers.video, plan, towers.settings, {"dtype": "float32", "pool": "text"}, sources, path, dated=True
    )
    known = _read_known(path, writer.receipt | {"average": False})
    reused = 0
    for source in sources:
        old = known.get((source.video, source.printable_path, source.bytes, source.modified))
        # Of a part of a video, the table does not say which part it is.
        if old is not None and source.start is None and source.end is None and source.clip is None:
            writer.engine.seed(source, *old)
            reused += 1
    extracted = writer.write()
    say(f"retrieve: {path}: {extracted.videos} videos, {reused} of which were known")
    return read_features(path)


_Known = dict[tuple[Any, ...], tuple[Summary, list[NDArray[Any]]]]


def _read_known(path: Path, receipt: Mapping[str, Any]) -> _Known:
    """Return the windows of an earlier table by video, if the same model and settings made it."""
    if not path.is_file():
        return {}
    table = read_features(path)
    if table.receipt != receipt:
        say(f"retrieve: {path} was made with other weights or settings, and is made again")
        return {}
    known: _Known = {}
    for row, feature in zip(table.rows.to_pylist(), table.features, strict=True):
        key = tuple(row[name] for name in ("video", "path", "bytes", "modified"))
        summary, values = known.setdefault(key, (Summary([], [], row["status"], row["detail"]), []))
        summary.seconds.append((row["start"], row["end"]))
        summary.frames.append(row["frames"])
        values.append(feature)
    return known


def load_towers(
    source: str | Path, settings: ClipSettings, text_model: str | None = None, text_pooling: str | None = None
) -> TwoTowers:
    """Load the video and the text side of a run's weights.

    Raises:
        FeatureError: the weights have no text.
        ModelError: the text encoder of a run with `contrast` cannot be loaded.
    """
    weights, file = read_weights(source, settings), own_file(source)
    if file is not None:  # other formats have no text
        extras = read_extra_names(file)
        if LANGUAGE in extras:
            return _load_language(file, weights, settings)
        if CONTRAST in extras:
            return _load_contrast(file, weights, settings, text_model, text_pooling)
    raise FeatureError(f"{source}: {_NO_TEXT}")


def _load_language(path: Path, weights: Weights, settings: ClipSettings) -> TwoTowers:
    """A run of UMT, STM or ClusterSTM: clips are the mean of their frames' vectors, of whole frames, as in its evaluation."""
    a = weights.architecture
    model = load_video_language(path, architecture=a)
    if "retrieval heads" in model.absent:
        raise FeatureError(
            f"{path}: the release that it was made from has no retrieval heads: take one fine-tuned for retrieval"
        )
    device = find_device(settings)
    language = read_config(path).get("language") or {}
    length = language.get("max_tokens") or _MAX_TOKENS

    def embed_video(video: Tensor) -> Tensor:
        return model.embed_frames(model.encoder(video), a.frames)

    @torch.inference_mode()
    def embed_texts(texts: Sequence[str]) -> NDArray[np.float32]:
        tokens = model.language.tokenizer.encode(list(texts), length).to(device)
        vectors: NDArray[np.float32] = model.embed_text(model.encode_text(tokens)).float().cpu().numpy()
        return vectors

    clip_model = ClipModel(model, embed_video, (model.embedding,), a, hash_source(path, weights), "language")
    if settings.crops is None:
        settings = replace(settings, whole=True, interpolation="bicubic")
    return TwoTowers(
        clip_model, embed_texts, lambda vectors: vectors.mean(1, dtype=np.float64).astype(np.float32), settings
    )


def _load_contrast(
    path: Path, weights: Weights, settings: ClipSettings, text_model: str | None, text_pooling: str | None
) -> TwoTowers:
    """A run of masked autoencoding with a contrastive head, whose texts another model encodes."""
    embedder = VideoEmbedder(build_encoder(weights), load_contrast_head(path)).eval()
    trained = embedder.branch.text_model or {}
    name = text_model or trained.get("model")
    if name is None:
        raise FeatureError(f"{path}: its run does not name the text encoder of its captions: give it with --text-model")
    values = {"model": name, **({} if text_pooling is None else {"pooling": text_pooling})}
    try:
        encoder = TextEncoder.load(Text.model_validate(values), settings.device)
    except ModelError as error:
        raise FeatureError(
            f"{error}\nTexts are encoded by the model of the run's captions, {trained.get('model')}: say where it is with "
            "--text-model"
        ) from error
    try:
        check_encoder(embedder, encoder.identity, f"{path}: texts are encoded by")
        check_width(embedder, encoder.encode([]).shape[1], f"{name}: its vectors have")
    except ValueError as error:
        raise FeatureError(f"{error}. Name the right one with --text-model") from error
    shape = (embedder.branch.text_width,)
    model = ClipModel(embedder, embedder, shape, weights.architecture, hash_source(path, weights), "contrast")
    return TwoTowers(model, encoder.encode, average_vectors, settings)
