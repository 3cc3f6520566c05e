"""open_clip models of the kinds that are not OpenAI's, with a few thousand random weights, as folders for `local-dir:`."""

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from small_models import CLIP_CONFIG, NORMALISATION, WORDS
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


@register_model
def vit_test_patch8_siglip_24(pretrained: bool = False, **more: Any) -> VisionTransformer:
    """SigLIP's image tower in timm, small; registered so that open_clip's factory builds it by its name."""
    more = {name: value for name, value in more.items() if name in ("num_classes", "global_pool")}
    shape: dict[str, Any] = {"img_size": 24, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return VisionTransformer(**shape, class_token=False, **{"global_pool": "map", **more})


SIGLIP: dict[str, Any] = {
    "embed_dim": 32,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 24,
        "timm_model_name": "vit_test_patch8_siglip_24",
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    },
    # As of SigLIP 2, but for the sizes.
    "text_cfg": {
        "context_length": 12,
        "vocab_size": 4 + len(WORDS),
        "hf_tokenizer_name": "timm/ViT-B-16-SigLIP2",
        "tokenizer_kwargs": {"clean": "canonicalize"},
        "width": 32,
        "heads": 2,
        "layers": 2,
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
        "act_kwargs": {"approximate": "tanh"},
    },
}
_VISION, _TEXT = CLIP_CONFIG["vision_cfg"], CLIP_CONFIG["text_cfg"]
CONFIGS: dict[str, dict[str, Any]] = {
    "siglip": SIGLIP,
    "average": {**CLIP_CONFIG, "vision_cfg": {**_VISION, "pool_type": "avg", "no_ln_pre": True}},
    "coca": {
        "embed_dim": 16,
        "vision_cfg": {**_VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": {**_TEXT, "context_length": 15, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**_TEXT, "attn_pooler_heads": 2},
        "custom_text": True,
    },
    "resnet": {**CLIP_CONFIG, "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16}},
    "convnext": {
        **CLIP_CONFIG,
        "vision_cfg": {
            "image_size": 64,
            "timm_model_name": "test_convnext",
            "timm_pool": "",
            "timm_proj": "linear",
        },
    },
}


def save_open_clip(folder: Path, kind: str, seed: int = 0, **changes: Any) -> Path:
    """Save a model of a kind of `CONFIGS`, whose parts `changes` replaces, with its tokenizer if it has one of its own."""
    torch.manual_seed(seed)
    config = json.loads(json.dumps(CONFIGS[kind] | changes))
    arguments = {key: value for key, value in config.items() if key != "custom_text"}
    classes = {"siglip": open_clip.CustomTextCLIP, "coca": open_clip.CoCa}
    model = classes.get(kind, open_clip.CLIP)(**arguments)
    with torch.no_grad():
        for parameter in model.visual.parameters():  # otherwise patches differ by little more than rounding
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder.mkdir(parents=True)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": NORMALISATION}))
    if "hf_tokenizer_name" in config["text_cfg"]:
        _make_tokenizer().save_pretrained(folder)
    return folder


def _make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words that ends texts with </s>, as SigLIP's do."""
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    )
