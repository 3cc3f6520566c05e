"""Embeds clips in the text embedding space with a run's contrastive head."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stm.config import Run
from stm.data.dataset import ClipDataset
from stm.distributed.process import Process
from stm.evaluation.features import run_over
from stm.evaluation.results import check_architecture
from stm.methods.contrast_head import VideoEmbedder, load_embedder


def load_checked_embedder(weights: Path, run: Run) -> VideoEmbedder:
    """Loads the encoder and head from a run's weights.

    Raises:
        ValueError: the file has no head, or its architecture differs from the run's.
    """
    embedder = load_embedder(weights)
    check_architecture(embedder.encoder, weights, run)
    return embedder


def embed_clips(embedder: VideoEmbedder, run: Run, clips: ClipDataset, process: Process) -> NDArray[np.float32]:
    """Unit vectors of all views of all clips, float32 [clips, views, D], computed from all tokens."""
    embedder = embedder.to(process.device)
    return run_over(embedder, clips, process, what="clips embedded", workers=run.workers, precision=run.precision)


def check_encoder(embedder: VideoEmbedder, encoder: Mapping[str, str | None] | None, what: str) -> None:
    """Checks that texts use the encoder with which the head was trained, if the hashes of both are known.

    Raises:
        ValueError: the hashes differ; the message starts with `what`.
    """
    trained = embedder.branch.text_model
    if trained is None or encoder is None:
        return
    hashes = [{key: value for key, value in e.items() if "sha256" in key and value} for e in (trained, encoder)]
    if all(hashes) and hashes[0] != hashes[1]:
        raise ValueError(
            f"{what} {encoder.get('model')}, and the run's contrastive head was trained with {trained.get('model')}: their "
            "weights differ (config: text.model)"
        )


def check_width(embedder: VideoEmbedder, width: int, what: str) -> None:
    """Checks that text vectors have the output width of the head.

    Raises:
        ValueError: the widths differ; the message starts with `what`.
    """
    expected = embedder.branch.text_width
    if width != expected:
        raise ValueError(
            f"{what} {width} dimensions, and the run's contrastive head was trained with {expected}: they come from "
            "different text encoders (config: text.model)"
        )
