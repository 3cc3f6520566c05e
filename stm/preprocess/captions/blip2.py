"""Captions of key frames by BLIP-2, without a text prompt (TGM, section 3.2)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Blip2ForConditionalGeneration, Blip2Processor

from stm.config import Blip2Captions
from stm.distributed.process import choose_device
from stm.jobs.journal import Journal
from stm.jobs.progress import Progress
from stm.jobs.status import Status
from stm.preprocess.batches import generate_texts
from stm.preprocess.captions.templates import ClipCaptions, collect
from stm.preprocess.frames.table import load_frame
from stm.pretrained.hub import PRECISIONS, ModelError, explain_missing, find_model, load_complete


def choose_key_frames(stored: int, count: int) -> list[int]:
    """Indices of the stored frames at the centres of `count` equal segments of a clip of `stored` frames.

    Segment i spans [i, i + 1) * stored / count; its centre lies in frame floor((i + 1/2) * stored / count). A clip with
    fewer frames than segments returns each of its frames once.
    """
    # In integers: floating-point rounding could move a centre into the frame before it.
    return sorted({(2 * i + 1) * stored // (2 * count) for i in range(count)})


class Blip2Captioner:
    """A loaded BLIP-2."""

    def __init__(self, source: Blip2Captions, device: str | None = None) -> None:
        """Load the model; a local folder is loaded without network access.

        Args:
            device: CUDA by default if available.

        Raises:
            ModelError: the model cannot be loaded or cannot generate captions.
        """
        self._source = source
        self._device = choose_device(device)
        location = find_model(source.model)
        try:
            self._processor = Blip2Processor.from_pretrained(**location.arguments)
        except (OSError, ValueError) as error:
            raise explain_missing(location, error) from error
        self._model = load_complete(Blip2ForConditionalGeneration, location, source.precision, self._device)
        self._prompt_tokens = self._count_prompt_tokens()
        self.identity = location.identify(getattr(self._model.config, "_commit_hash", None))

    def _count_prompt_tokens(self) -> int:
        """Number of tokens before a generated caption: image placeholders and start token; 0 for an encoder-decoder.

        BLIP-2 inserts them itself if it gets no text. No text prompt is passed, because one without the placeholders
        would make the model silently ignore the image.
        """
        config = self._model.config
        if config.image_token_index is None or config.text_config.bos_token_id is None:
            raise ModelError(
                f"model {self._source.model!r}: its config.json lacks `image_token_index` or the text model's "
                "`bos_token_id`; it was saved by an old version of transformers. Save it again with a current one"
            )
        return 0 if self._model.language_model.config.is_encoder_decoder else config.num_query_tokens + 1

    def prepare(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """Preprocess images, uint8 [H, W, 3], to the model's input: float32 [B, 3, S, S], on the CPU."""
        pixels: torch.Tensor = self._processor.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
        return pixels

    @torch.inference_mode()
    def caption(self, pixels: torch.Tensor) -> list[str]:
        """Generate one caption per image from `prepare`; by greedy or beam search, so that it is deterministic."""
        tokens = self._model.generate(
            pixel_values=pixels.to(self._device, PRECISIONS[self._source.precision]),
            do_sample=False,
            num_beams=self._source.beams,
            max_new_tokens=self._source.max_new_tokens,
        )
        return self._processor.tokenizer.batch_decode(tokens[:, self._prompt_tokens :], skip_special_tokens=True)

    def caption_clips(
        self, rows: Sequence[Mapping[str, Any]], frames_tar: Path, journal: Journal
    ) -> dict[str, ClipCaptions]:
        """Caption the key frames of clips; batches span clips.

        Args:
            rows: kept rows of the frames index, in its order.
            journal: gets one entry per finished clip.

        Returns:
            the captions of each clip, by key.
        """
        key_frames = {row["key"]: choose_key_frames(row["frames"], self._source.key_frames) for row in rows}
        items = [(row, frame) for row in rows for frame in key_frames[row["key"]]]

        def load(batch: range) -> torch.Tensor:
            return self.prepare([load_frame(frames_tar, *items[i]) for i in batch])

        with Progress(f"captions {frames_tar.stem}", len(rows), "clips") as progress:
            texts = generate_texts(
                [row["key"] for row, _ in items], self._source.batch_size, journal, load, self.caption, progress
            )
        return {
            key: collect(list(zip(frames, texts[key], strict=True)), Status.CAPTION_FAILED)
            for key, frames in key_frames.items()
        }
