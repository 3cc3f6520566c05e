"""Vision-language models with a few thousand random weights and their processors, in the formats of the real ones."""

from pathlib import Path
from typing import Any

import torch
from small_models import WORDS
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlamaConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipVisionConfig,
)

_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE "
    "{% elif c['type'] == 'video' %}VIDEO {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% if thinking %}<think> {% endif %}{% endif %}"
)
_LAYERS: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_TEXT: dict[str, Any] = {**_LAYERS, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
_QWEN_MARKS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")


def save_vlm(folder: Path, kind: str, seed: int = 0, **processor: Any) -> Path:
    """Save a small model of a kind: `qwen2_5_vl`, `qwen3_vl`, `llava_onevision` (images and videos), `idefics3` (images)."""
    torch.manual_seed(seed)
    model, processing = _MAKERS[kind](**processor)
    with torch.no_grad():
        for parameter in model.parameters():  # large enough for the answers to depend on the frames
            parameter.add_(0.6 * torch.randn_like(parameter))
        # Logits of other tokens are 0, below the largest of the words', so that no answer is empty.
        words = processing.tokenizer.convert_tokens_to_ids(WORDS)
        others = [number for number in range(len(processing.tokenizer)) if number not in words]
        model.get_output_embeddings().weight[others] = 0
    model.save_pretrained(folder)
    processing.save_pretrained(folder)
    return folder


def _tokenizer(*marks: str) -> PreTrainedTokenizerFast:
    names = [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        *marks,
        *WORDS,
        "user",
        "assistant",
        "video",
        "happens",
        "<think>",
        "</think>",
    ]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=list(marks), **special)


def _template(image: str, video: str = "") -> str:
    return _TEMPLATE.replace("IMAGE", image).replace("VIDEO", video)


def _qwen(processors: tuple[Any, Any, Any], make_config: Any, model: Any, **more: Any) -> tuple[Any, Any]:
    processor_class, image_class, video_class = processors
    words = _tokenizer(*_QWEN_MARKS)
    size = {"shortest_edge": 28 * 28, "longest_edge": 16 * 28 * 28}
    template = _template(*(f"<|vision_start|> {pad} <|vision_end|>" for pad in _QWEN_MARKS[:2]))
    parts = image_class(size=size, **more), words, video_class(size=size, **more)
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    marks = {name: words.vocab[mark] for name, mark in zip(names, _QWEN_MARKS, strict=True)}
    return model(make_config(len(words), marks)), processor_class(*parts, chat_template=template)


def _qwen2_5(**processor: Any) -> tuple[Any, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}

    def config(vocabulary: int, marks: dict[str, Any]) -> Qwen2_5_VLConfig:
        return Qwen2_5_VLConfig(
            text_config={**_TEXT, "vocab_size": vocabulary, "rope_parameters": rope},
            vision_config={**vision, "window_size": 56, "fullatt_block_indexes": [1]},
            **marks,
        )

    classes = (Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor)
    return _qwen(classes, config, Qwen2_5_VLForConditionalGeneration, **processor)


def _qwen3(**processor: Any) -> tuple[Any, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}

    def config(vocabulary: int, marks: dict[str, Any]) -> Qwen3VLConfig:
        return Qwen3VLConfig(
            text_config={**_TEXT, "vocab_size": vocabulary, "rope_parameters": rope, "head_dim": 16},
            vision_config={**vision, "patch_size": 14, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
            **marks,
        )

    classes = (Qwen3VLProcessor, Qwen2VLImageProcessor, Qwen3VLVideoProcessor)
    return _qwen(classes, config, Qwen3VLForConditionalGeneration, patch_size=14, **processor)


def _onevision(**processor: Any) -> tuple[Any, Any]:
    words = _tokenizer("<image>", "<video>")
    size, grid = {"height": 32, "width": 32}, [[32, 32], [32, 64], [64, 32]]
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**_LAYERS, image_size=32, patch_size=8),
        text_config=Qwen2Config(**_TEXT, vocab_size=len(words)),
        image_token_index=words.vocab["<image>"],
        video_token_index=words.vocab["<video>"],
        image_grid_pinpoints=grid,
    )
    parts = (
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=grid, **processor),
        words,
        LlavaOnevisionVideoProcessor(size=size, **processor),
    )
    processing = LlavaOnevisionProcessor(
        *parts,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=_template("<image>", "<video>"),
    )
    return LlavaOnevisionForConditionalGeneration(config), processing


def _idefics3(**processor: Any) -> tuple[Any, Any]:
    words = _tokenizer("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<row_1_col_1>")
    image = words.vocab["<image>"]
    config = Idefics3Config(
        vision_config={**_LAYERS, "image_size": 32, "patch_size": 8},
        text_config=LlamaConfig(**_TEXT, vocab_size=len(words)),
        scale_factor=2,
        image_token_id=image,
    )
    settings: dict[str, Any] = {
        "size": {"longest_edge": 64},
        "max_image_size": {"longest_edge": 32},
        "do_image_splitting": False,
    }
    processing = Idefics3Processor(
        Idefics3ImageProcessor(**settings | processor), words, image_seq_len=4, chat_template=_template("<image>")
    )
    return Idefics3ForConditionalGeneration(config), processing


_MAKERS = {"qwen2_5_vl": _qwen2_5, "qwen3_vl": _qwen3, "llava_onevision": _onevision, "idefics3": _idefics3}
