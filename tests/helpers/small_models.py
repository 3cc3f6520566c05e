"""Models with a few thousand random weights, in the formats of the real ones, for tests without a network."""

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5Model,
)

CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 24, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
# Different from CLIP's own, so that a test notices if they are not used.
NORMALISATION = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
WORDS = ["red", "blue", "circle", "square", "moves", "left", "right", "a", "the", "describe", "what", "is"]


def save_clip(folder: Path, seed: int = 0) -> Path:
    """Save an open_clip model in the format that `local-dir:` expects."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    model = open_clip.CLIP(**CLIP_CONFIG)
    with torch.no_grad():
        for parameter in model.visual.parameters():  # otherwise patches differ by little more than rounding
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    config = {"model_cfg": CLIP_CONFIG, "preprocess_cfg": NORMALISATION}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def make_tokenizer(**more: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words; ids 0 to 3 are special tokens."""
    words = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>", **more
    )


def text_config(vocabulary: int) -> OPTConfig:
    return OPTConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )


def _enlarge_weights(model: torch.nn.Module) -> None:
    """Add random values that are large enough for the outputs to depend on the input."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


def save_language_model(folder: Path, seed: int = 0, **tokenizer: Any) -> Path:
    """Save a causal language model with its tokenizer."""
    torch.manual_seed(seed)
    words = make_tokenizer(**tokenizer)
    model = OPTForCausalLM(text_config(len(words)))
    _enlarge_weights(model)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def save_blip2(folder: Path, seed: int = 0) -> Path:
    """Save a BLIP-2 with its processor."""
    torch.manual_seed(seed)
    image_processor = BlipImageProcessor(size={"height": 16, "width": 16})
    processor = Blip2Processor(image_processor, make_tokenizer(), num_query_tokens=4)
    vocabulary = len(processor.tokenizer)
    vision = Blip2VisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    qformer = Blip2QFormerConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        encoder_hidden_size=16,
    )
    config = Blip2Config(
        vision_config=vision.to_dict(),
        qformer_config=qformer.to_dict(),
        text_config=text_config(vocabulary).to_dict(),
        num_query_tokens=4,
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = Blip2ForConditionalGeneration(config)
    _enlarge_weights(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_text_encoder(folder: Path, kind: str, seed: int = 0) -> Path:
    """Save a text encoder of transformers: `clip` (text tower with projection), `bert`, `t5` or a whole CLIP, `two-towers`."""
    torch.manual_seed(seed)
    words = make_tokenizer()
    size: dict[str, Any] = {
        "vocab_size": len(words),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
    }
    heads: dict[str, Any] = {"num_attention_heads": 2}
    places: dict[str, Any] = {**heads, "max_position_embeddings": 16}
    ends: dict[str, Any] = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    makers: dict[str, Any] = {
        "clip": lambda: CLIPTextModelWithProjection(CLIPTextConfig(**size, **places, **ends, projection_dim=6)),
        "bert": lambda: BertModel(BertConfig(**size, **places, pad_token_id=1), add_pooling_layer=False),
        "t5": lambda: T5Model(
            T5Config(vocab_size=len(words), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, pad_token_id=1)
        ),
        "two-towers": lambda: CLIPModel(
            CLIPConfig(
                text_config={**size, **places, **ends},
                vision_config={"image_size": 16, "patch_size": 8, **size, **heads},
            )
        ),
    }
    model = makers[kind]()
    _enlarge_weights(model)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
