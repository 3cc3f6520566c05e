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


def choose_key_frames(stored: int, wanted: int) -> list[int]:
    """The stored frames at the centres of `wanted` equal segments of a clip of `stored` frames.

    Segment i spans [i, i + 1) * stored / wanted; its centre lies in frame floor((i + 1/2) * stored / wanted). A clip
    with fewer frames than segments gives each of its frames once.
    """
    return sorted({(2 * i + 1) * stored // (2 * wanted) for i in range(wanted)})


class Blip2Captioner:
    """A loaded BLIP-2."""

    def __init__(self, source: Blip2Captions, device: str | None = None) -> None:
        """Loads the model; a local folder never reaches for the network.

        Raises:
            ModelError: the model cannot be loaded, or is of a kind that cannot caption.
        """
        self._source = source
        self._device = choose_device(device)
        found = find_model(source.model)
        try:
            self._processor = Blip2Processor.from_pretrained(**found.arguments)
        except (OSError, ValueError) as error:
            raise explain_missing(found, error) from error
        self._model = load_complete(Blip2ForConditionalGeneration, found, source.precision, self._device)
        self._prompt = self._count_prompt_tokens()
        self.identity = found.identify(getattr(self._model.config, "_commit_hash", None))

    def _count_prompt_tokens(self) -> int:
        """Tokens in front of a generated caption: the image placeholders and the start token; none in an encoder-decoder.

        BLIP-2 puts them there by itself when it gets no text. A text prompt of one's own without the placeholders
        would make it ignore the image without a word, so none is given.
        """
        config = self._model.config
        if config.image_token_index is None or config.text_config.bos_token_id is None:
            raise ModelError(
                f"model {self._source.model!r}: its config.json lacks `image_token_index` or the text model's "
                "`bos_token_id`; it was saved by an old transformers. Save it again with a current one"
            )
        return 0 if self._model.language_model.config.is_encoder_decoder else config.num_query_tokens + 1

    def prepare(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """The model's input for images uint8 [H, W, 3]: float32 [B, 3, S, S], on the CPU."""
        pixels: torch.Tensor = self._processor.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
        return pixels

    @torch.inference_mode()
    def caption(self, pixels: torch.Tensor) -> list[str]:
        """One caption for each of `prepare`'s images; greedy or beam search, never sampled."""
        tokens = self._model.generate(
            pixel_values=pixels.to(self._device, PRECISIONS[self._source.precision]),
            do_sample=False,
            num_beams=self._source.beams,
            max_new_tokens=self._source.max_new_tokens,
        )
        return self._processor.tokenizer.batch_decode(tokens[:, self._prompt :], skip_special_tokens=True)

    def caption_clips(
        self, rows: Sequence[Mapping[str, Any]], frames_tar: Path, journal: Journal
    ) -> dict[str, ClipCaptions]:
        """Captions of the key frames of clips, by key; batches are filled across clips.

        Args:
            rows: kept rows of the frames index, in its order.
            journal: has an entry for each finished clip.
        """
        chosen = {row["key"]: choose_key_frames(row["frames"], self._source.key_frames) for row in rows}
        items = [(row, frame) for row in rows for frame in chosen[row["key"]]]

        def load(batch: range) -> torch.Tensor:
            return self.prepare([load_frame(frames_tar, *items[i]) for i in batch])

        with Progress(f"captions {frames_tar.stem}", len(rows), "clips") as progress:
            texts = generate_texts(
                [row["key"] for row, _ in items], self._source.batch_size, journal, load, self.caption, progress
            )
        return {
            key: collect(list(zip(frames, texts[key], strict=True)), Status.CAPTION_FAILED)
            for key, frames in chosen.items()
        }
