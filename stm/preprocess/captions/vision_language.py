"""Captions by vision-language models of transformers, which answer prompts about frames of a clip.

Any model that `AutoModelForImageTextToText` loads and whose processor has a chat template is used the same way: the template
turns a conversation (frames and a prompt) into text with placeholders, and the processor replaces these by as many tokens as the
model has for the frames. Only greedy search is used, so that captions are reproducible.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature
from transformers.video_utils import VideoMetadata

from stm.config import VisionLanguageCaptions
from stm.distributed.process import choose_device
from stm.jobs.journal import Journal
from stm.jobs.progress import Progress
from stm.jobs.status import Status
from stm.preprocess.batches import generate_texts
from stm.preprocess.captions.templates import WHOLE_CLIP, ClipCaptions, collect
from stm.preprocess.frames.spread import spread_frames
from stm.preprocess.frames.table import load_frame
from stm.pretrained.hub import PRECISIONS, ModelError, ModelSource, explain_missing, find_model, load_complete

# Times are given to processors as frame numbers of a video of this rate: exact for any frame rate, and for changing ones.
_TICKS = 1000
# What processors call the texts that they replace by the tokens of images and videos.
_PLACEHOLDERS = ("image_token", "video_token", "boi_token", "start_image_token")
_THINKING, _ANSWERING = "<think>", "</think>"


class Question(NamedTuple):
    """What a model is asked at once: a prompt about one or several frames."""

    frames: list[np.ndarray]  # uint8 [H, W, 3], RGB
    times: list[float]  # of the frames: s since the first stored frame of the clip
    duration: float  # of the clip, s
    prompt: str


class _Group(NamedTuple):
    """Questions of a batch with the same number of frames, prepared for the model."""

    positions: list[int]  # in the batch
    inputs: BatchFeature


class VisionLanguageModel:
    """A loaded vision-language model."""

    def __init__(self, source: VisionLanguageCaptions, device: str | None = None) -> None:
        """Load the model; a local folder is loaded without network access.

        Args:
            device: defaults to CUDA if available.

        Raises:
            ModelError: the model cannot be loaded, has no chat template, or does not take the source's input or settings.
        """
        self._source = source
        self._device = choose_device(device)
        location = find_model(source.model)
        revision = _pin(source, location)
        try:
            self._processor = AutoProcessor.from_pretrained(**location.arguments, **revision)
        except (OSError, ValueError, ImportError) as error:  # ImportError: some processors need further packages
            raise explain_missing(location, error) from error
        _check_processor(source, self._processor)
        self._model = load_complete(AutoModelForImageTextToText, location, source.precision, self._device, **revision)
        self.identity = location.identify(getattr(self._model.config, "_commit_hash", None))

    def prepare(self, questions: Sequence[Question]) -> list[_Group]:
        """Return the model's inputs, on the CPU.

        Questions with different numbers of frames are in different groups, because many processors cannot batch them. Within a
        group, shorter prompts are padded on the left, because a decoder continues from the last token.
        """
        positions: dict[int, list[int]] = {}
        for position, question in enumerate(questions):
            positions.setdefault(len(question.frames), []).append(position)
        return [_Group(group, self._process([questions[i] for i in group])) for group in positions.values()]

    def _process(self, questions: Sequence[Question]) -> BatchFeature:
        as_video = self._source.input == "video"
        if as_video:
            questions = [self._lengthen(question) for question in questions]
        settings: dict[str, Any] = {
            "text_kwargs": {"padding": True, "padding_side": "left"},
            "videos_kwargs" if as_video else "images_kwargs": self._source.processor,
        }
        if as_video:
            settings |= {"video_metadata": [_describe_times(q) for q in questions], "do_sample_frames": False}
        return self._processor.apply_chat_template(
            [[{"role": "user", "content": _content(question, as_video)}] for question in questions],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=settings,
            **self._source.template,
        )

    def _lengthen(self, question: Question) -> Question:
        """Repeat the frame of a clip with a single one, of which some processors of videos need two."""
        missing = getattr(self._processor.video_processor, "temporal_patch_size", 1) - len(question.frames)
        frames, times = ([*values, *[values[-1]] * missing] for values in (question.frames, question.times))
        return question._replace(frames=frames, times=times)

    @torch.inference_mode()
    def answer(self, groups: Sequence[_Group]) -> list[str]:
        """Generate one answer per question of a batch from `prepare`, by greedy search, without any reasoning before it."""
        answers: dict[int, str] = {}
        for positions, prepared in groups:
            inputs = self._move(prepared)
            # The model's own settings may ask for several answers, or for more than tokens.
            one = {"num_return_sequences": 1, "return_dict_in_generate": False}
            tokens = self._model.generate(
                **inputs, do_sample=False, num_beams=1, max_new_tokens=self._source.max_new_tokens, **one
            )
            # Decoders return the prompt, too.
            prompts = inputs["input_ids"]
            new = tokens if self._model.config.is_encoder_decoder else tokens[:, prompts.shape[1] :]
            decode = self._processor.tokenizer.batch_decode
            asked, said = decode(prompts), decode(new, skip_special_tokens=True)
            answers |= dict(zip(positions, map(_without_reasoning, asked, said), strict=True))
        return [answers[position] for position in sorted(answers)]

    def _move(self, inputs: BatchFeature) -> BatchFeature:
        """Move inputs to the device, with pixels in the model's precision; times stay as exact as they are."""
        moved = inputs.to(self._device)
        pixels = {name: value for name, value in moved.items() if name.startswith("pixel_values")}
        moved.update({name: value.to(PRECISIONS[self._source.precision]) for name, value in pixels.items()})
        return moved

    def caption_clips(
        self, rows: Sequence[Mapping[str, Any]], frames_tar: Path, journal: Journal
    ) -> dict[str, ClipCaptions]:
        """Caption clips; batches span clips.

        Args:
            rows: kept rows of the frames index, in its order.
            journal: receives one entry per finished clip.

        Returns:
            the captions of each clip, by key: for each prompt in order, one of the clip, or one per key frame.
        """
        items = [(row, prompt, shown) for row in rows for prompt, shown in _plan_questions(self._source, row)]

        def load(batch: range) -> list[_Group]:
            return self.prepare([_load_question(frames_tar, *items[i]) for i in batch])

        with Progress(f"captions {frames_tar.stem}", len(rows), "clips") as progress:
            owners = [row["key"] for row, _, _ in items]
            texts = generate_texts(owners, self._source.batch_size, journal, load, self.answer, progress)
        places: dict[str, list[int]] = {}
        for row, _, shown in items:
            places.setdefault(row["key"], []).append(shown[0] if self._source.input == "key_frames" else WHOLE_CLIP)
        return {key: collect(list(zip(places[key], texts[key], strict=True)), Status.CAPTION_FAILED) for key in places}


def _plan_questions(source: VisionLanguageCaptions, row: Mapping[str, Any]) -> list[tuple[str, list[int]]]:
    """Return the prompts of a clip's questions, with the indices of the stored frames that are shown."""
    frames = spread_frames(row["frames"], source.frames)
    shown = [[frame] for frame in frames] if source.input == "key_frames" else [frames]
    return [(prompt, indices) for prompt in source.prompts for indices in shown]


def _load_question(frames_tar: Path, row: Mapping[str, Any], prompt: str, shown: Sequence[int]) -> Question:
    first, last, count = row["pts"][0], row["pts"][-1], row["frames"]
    # The last frame is shown for as long as the others are on average; how long a single one is shown is unknown.
    duration = (last - first) * count / max(1, count - 1)
    frames = [load_frame(frames_tar, row, index) for index in shown]
    return Question(frames, [row["pts"][index] - first for index in shown], duration, prompt)


def _content(question: Question, as_video: bool) -> list[dict[str, Any]]:
    """Return the content of a message: the frames, then the prompt."""
    if as_video:
        shown = [{"type": "video", "video": np.stack(question.frames)}]
    else:
        shown = [{"type": "image", "image": frame} for frame in question.frames]
    return [*shown, {"type": "text", "text": question.prompt}]


def _describe_times(question: Question) -> VideoMetadata:
    height, width = question.frames[0].shape[:2]
    return VideoMetadata(
        total_num_frames=max(1, round(question.duration * _TICKS)),
        fps=_TICKS,
        width=width,
        height=height,
        duration=question.duration,
        frames_indices=[round(time * _TICKS) for time in question.times],
    )


def _without_reasoning(prompt: str, answer: str) -> str:
    """Return an answer without the reasoning before it; empty if the reasoning did not end within `max_new_tokens`.

    Args:
        prompt: the templates of some models begin the reasoning at the end of the prompt.
    """
    begun = prompt.rstrip().endswith(_THINKING) or answer.lstrip().startswith(_THINKING)
    if _ANSWERING in answer:
        return answer.rpartition(_ANSWERING)[2]
    return "" if begun else answer


def _pin(source: VisionLanguageCaptions, location: ModelSource) -> dict[str, str]:
    """Return the argument of `from_pretrained` for the source's revision."""
    if source.revision is None:
        return {}
    if location.folder is not None:
        raise ModelError(f"model {source.model!r} is a local folder, which has no revisions; remove `revision`")
    return {"revision": source.revision}


def _check_processor(source: VisionLanguageCaptions, processor: Any) -> None:
    """Check that a processor has a chat template, takes the source's input and prompts, and knows its settings.

    Raises:
        ModelError: says what is missing, and what can be done.
    """
    name = f"model {source.model!r}"
    template = getattr(processor, "chat_template", None)
    part = "video_processor" if source.input == "video" else "image_processor"
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise ModelError(f"{name}: its processor, a {type(processor).__name__}, does not take both images and text")
    if not template:
        raise ModelError(
            f"{name}: its processor has no chat template, so that kind `vlm` cannot ask it. Instruction-tuned models have one; "
            "BLIP-2 is of kind `blip2`"
        )
    if getattr(processor, part, None) is None:
        raise ModelError(f"{name}: its processor takes no videos; set input to `images` or `key_frames`")
    placeholders = {getattr(part, name, None) for part in (processor, processor.tokenizer) for name in _PLACEHOLDERS}
    for prompt in source.prompts:
        taken = sorted(mark for mark in placeholders if isinstance(mark, str) and mark and mark in prompt)
        if taken:
            raise ModelError(
                f"{name}: the prompt {prompt!r} contains {taken[0]}, which stands for an image or video to this model; frames "
                "are added by themselves: remove it"
            )
    # transformers only warns about settings that it does not know, and ignores them.
    known = set(getattr(processor, part).valid_kwargs.__annotations__)
    unknown = sorted(set(source.processor) - known)
    if unknown:
        raise ModelError(f"{name}: its {part} has no setting {unknown[0]!r}; it has {', '.join(sorted(known))}")
    absent = [variable for variable in source.template if variable not in str(template)]
    if absent:
        raise ModelError(f"{name}: its chat template has no variable {absent[0]!r}; remove it from `template`")
