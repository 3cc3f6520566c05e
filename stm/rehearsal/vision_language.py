"""A small vision-language model of transformers in the place of those that `captions` names."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stm.rehearsal.models import make_tokenizer, words
from stm.rehearsal.shrink import LAYERS, WIDTH

_HEADS = 2
_PATCH = 14  # pixels
_MARKS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")


def write_vision_language_model(folder: Path, prompts: Sequence[str], variables: Sequence[str]) -> None:
    """Save a small Qwen2.5-VL, which takes images and videos, with its processor.

    Args:
        prompts: whose words its tokenizer knows.
        variables: of the chat template, which the config sets.
    """
    import torch
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = make_tokenizer([*words(), *prompts, "user assistant"], _MARKS)
    size = {
        "shortest_edge": (2 * _PATCH) ** 2,
        "longest_edge": 4 * (2 * _PATCH) ** 2,
    }  # pixels: at most four tokens per frame
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=size),
        tokenizer,
        Qwen2VLVideoProcessor(size=size, cap_pixels_per_frame=True),
        chat_template=_chat_template(variables),
    )
    torch.manual_seed(0)
    network = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**_shape(tokenizer)))
    network.save_pretrained(folder)
    processor.save_pretrained(folder)


def _shape(tokenizer: Any) -> dict[str, Any]:
    """The sizes of both parts of the model, and the tokens that mark images and videos."""
    image, video, start, end = tokenizer.convert_tokens_to_ids(list(_MARKS))
    text: dict[str, Any] = {"vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH}
    text |= {"num_hidden_layers": 2, "num_attention_heads": _HEADS, "num_key_value_heads": _HEADS}
    text |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    half = WIDTH // _HEADS // 2  # pairs of rotated features per head, for times, rows and columns
    sections = [half - 2 * (half // 3), half // 3, half // 3]
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections}
    vision: dict[str, Any] = {
        "depth": LAYERS,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_heads": _HEADS,
    }
    vision |= {
        "out_hidden_size": WIDTH,
        "patch_size": _PATCH,
        "window_size": 4 * _PATCH,
        "fullatt_block_indexes": [LAYERS - 1],
    }
    marks = {
        "image_token_id": image,
        "video_token_id": video,
        "vision_start_token_id": start,
        "vision_end_token_id": end,
    }
    return {"text_config": text, "vision_config": vision, **marks}


def _chat_template(variables: Sequence[str]) -> str:
    image, video, start, end = _MARKS
    ignored = "".join(f"{{% if {variable} %}}{{% endif %}}" for variable in variables)
    return (
        f"{ignored}{{% for message in messages %}}{{{{ message['role'] }}}} {{% for part in message['content'] %}}"
        f"{{% if part['type'] == 'image' %}}{start} {image} {end} {{% elif part['type'] == 'video' %}}{start} {video} {end} "
        "{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}assistant"
    )
