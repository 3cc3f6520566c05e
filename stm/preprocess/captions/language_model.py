"""Captions that a causal language model writes from the action label (TGM, Figure 5b)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stm.config import LanguageModelCaptions
from stm.distributed.process import choose_device
from stm.jobs.journal import Journal
from stm.jobs.progress import Progress
from stm.jobs.status import Status
from stm.preprocess.batches import generate_texts
from stm.preprocess.captions.templates import NO_LABEL, WHOLE_CLIP, ClipCaptions, collect, label_text
from stm.pretrained.hub import explain_missing, find_model, load_complete


class LanguageModel:
    """A loaded decoder-only language model."""

    def __init__(self, source: LanguageModelCaptions, device: str | None = None) -> None:
        """Load the model; a local folder is loaded without network access.

        Args:
            device: CUDA by default if available.

        Raises:
            ModelError: the model cannot be loaded.
        """
        self._source = source
        self._device = choose_device(device)
        location = find_model(source.model)
        try:
            # Padding on the left: a decoder continues from the last token, which must not be padding.
            self._tokenizer = AutoTokenizer.from_pretrained(**location.arguments, padding_side="left")
        except (OSError, ValueError) as error:
            raise explain_missing(location, error) from error
        # Some decoders, such as GPT-2, have no padding token. The attention mask hides padding, so any token will do.
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._model = load_complete(AutoModelForCausalLM, location, source.precision, self._device)
        self.identity = location.identify(getattr(self._model.config, "_commit_hash", None))

    def _tokenize(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Tokenize prompts, with the chat template if the tokenizer has one."""
        if not self._tokenizer.chat_template:
            return self._tokenizer(list(prompts), return_tensors="pt", padding=True)
        chats = [
            self._tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            for prompt in prompts
        ]
        # The template writes the special tokens itself.
        return self._tokenizer(chats, return_tensors="pt", padding=True, add_special_tokens=False)

    @torch.inference_mode()
    def answer(self, prompts: Sequence[str]) -> list[str]:
        """Generate one answer per prompt; by greedy search, so that it is deterministic."""
        tokens = {name: value.to(self._device) for name, value in self._tokenize(prompts).items()}
        inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        output = self._model.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            max_new_tokens=self._source.max_new_tokens,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        new = output[:, inputs["input_ids"].shape[1] :]
        return self._tokenizer.batch_decode(new, skip_special_tokens=True)

    def describe_clips(
        self, rows: Sequence[Mapping[str, Any]], journal: Journal, shard: str
    ) -> dict[str, ClipCaptions]:
        """Describe clips by one answer per prompt, with the clip's label in place of `{}`.

        The answers for a label are generated once, however many clips have it.

        Args:
            rows: rows of the slice, of which `key` and `label` are used.
            journal: gets one entry per finished label.
            shard: name of the shard, for the progress line.

        Returns:
            the captions of each clip, by key.
        """
        labels = sorted({label_text(row) for row in rows} - {""})
        items = [(label, prompt) for label in labels for prompt in self._source.prompts]

        def load(batch: range) -> list[str]:
            return [prompt.replace("{}", label) for label, prompt in (items[i] for i in batch)]

        with Progress(f"captions {shard}", len(labels), "labels") as progress:
            owners = [label for label, _ in items]
            texts = generate_texts(owners, self._source.batch_size, journal, load, self.answer, progress)
        captions = {label: collect([(WHOLE_CLIP, t) for t in texts[label]], Status.CAPTION_FAILED) for label in labels}
        return {row["key"]: captions.get(label_text(row), NO_LABEL) for row in rows}
