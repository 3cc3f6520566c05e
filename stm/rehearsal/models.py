"""Small models with random weights in the formats of the published ones, and the demo's where they fit.

Each is of the class that the workflow loads in the full run, and is saved as that one is: a folder of open_clip or of
transformers, or a checkpoint (`checkpoints.py`).
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from stm.pretrained.local_files import local_model_files
from stm.rehearsal.shrink import LAYERS, WIDTH
from stm.rehearsal.videos import KINDS, describe_clip
from stm.storage.files import write_json
from stm.storage.shipped import PACKAGE, model_path

_OWN_BYTES = 64 * 2**20  # local models of up to this size are used as they are
_HEADS = 2
_TOWER = "tower"  # where timm finds the sizes of an image tower, in the folder of its model
_PATCH = 16  # pixels, where the name of a model does not tell


def is_small(model: str) -> bool:
    """Whether a model is local and small enough to be rehearsed with as it is, such as the demo's."""
    files = [Path(file) for file in local_model_files(model)]
    return bool(files) and sum(file.stat().st_size for file in files) <= _OWN_BYTES


def copy_model(source: str, target: Path) -> None:
    """Copy a local model, a folder or a file."""
    path = Path(source).expanduser()
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.copytree(path, target, dirs_exist_ok=True)
    else:
        shutil.copyfile(path, target)


def words() -> list[str]:
    """The captions and questions of all generated clips, which contain every word of the stand-ins' vocabularies."""
    described = [describe_clip(kind) for kind in range(KINDS)]
    return [text for caption, questions in described for text in (caption, *_texts(questions))]


def _texts(questions: list[dict[str, str]]) -> Iterator[str]:
    for question in questions:
        yield from (question["question"], question["answer"])


# --------------------------------------------------------------------------------------------------- open_clip


def write_clip(model: str, folder: Path, place: str) -> None:
    """Save a small CLIP or SigLIP in the place of an open_clip model, with its patch size, activation and tokenizer.

    Args:
        model: as in `similarity.model`; one whose architecture is unknown is taken for ViT-B-32.
        place: the path of `folder` from the working directory of those who load it.
    """
    import open_clip
    from safetensors.torch import save_file

    architecture, tag = _find_architecture(model)
    config = _shrink_clip(open_clip.get_model_config(architecture))
    tower = _shrink_tower(config["vision_cfg"])
    if tower is not None:
        write_json(folder / _TOWER / "config.json", tower)
        side = tower["model_args"]["img_size"]
        given = {"timm_model_name": f"local-dir:{folder / _TOWER}", "image_size": side}
        config |= {"embed_dim": WIDTH, "vision_cfg": config["vision_cfg"] | given}
    arguments = {key: value for key, value in config.items() if key != "custom_text"}
    kind = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
    torch.manual_seed(0)
    network = kind(**arguments)
    if tower is not None:
        config["vision_cfg"]["timm_model_name"] = f"local-dir:{place}/{_TOWER}"
    folder.mkdir(parents=True, exist_ok=True)
    # In half precision, because some image towers of timm keep their size.
    state = {name: _half(tensor) for name, tensor in network.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    known = open_clip.get_pretrained_cfg(architecture, tag) or {}
    statistics = {key: known[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in known}
    content = {"model_cfg": config, "preprocess_cfg": statistics}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    if "hf_tokenizer_name" in config["text_cfg"]:
        for file in model_path(f"{PACKAGE}demo-clip").glob("tokenizer*.json"):
            shutil.copyfile(file, folder / file.name)


def _find_architecture(model: str) -> tuple[str, str]:
    """The architecture and the pretrained tag in a model's name."""
    import open_clip

    name, _, tag = model.rpartition(":")[2].rpartition("/")[2].partition("@")
    return (name, tag) if name in open_clip.list_models() else ("ViT-B-32", "")


def _shrink_clip(config: dict[str, Any]) -> dict[str, Any]:
    """An architecture with small towers; for an image tower of timm, see `_shrink_tower`."""
    vision, text = dict(config["vision_cfg"]), dict(config["text_cfg"])
    width = config["embed_dim"] if "timm_model_name" in vision else WIDTH
    if "timm_model_name" not in vision:
        patch = vision["patch_size"]
        vision |= {"layers": LAYERS, "width": WIDTH, "head_width": WIDTH // _HEADS, "image_size": 2 * patch}
    text |= {"width": WIDTH, "heads": _HEADS, "layers": 2}
    if "hf_tokenizer_name" in text:
        # The tokenizer of the demo's CLIP, which needs no hub.
        demo = json.loads((model_path(f"{PACKAGE}demo-clip") / "open_clip_config.json").read_text())["model_cfg"][
            "text_cfg"
        ]
        text |= {"hf_tokenizer_name": "local", "vocab_size": demo["vocab_size"]}
        text.pop("tokenizer_kwargs", None)
    return {**config, "embed_dim": width, "vision_cfg": vision, "text_cfg": text}


def _shrink_tower(vision: dict[str, Any]) -> dict[str, Any] | None:
    """A folder's config for timm of a small ViT with the same pooling and patches; None for towers of other kinds."""
    import timm
    from timm.models.vision_transformer import VisionTransformer

    if "timm_model_name" not in vision:
        return None
    with torch.device("meta"):
        full = timm.create_model(vision["timm_model_name"])
    if not isinstance(full, VisionTransformer):
        return None
    side = 2 * full.patch_embed.patch_size[0]
    sizes = {"embed_dim": WIDTH, "depth": LAYERS, "num_heads": _HEADS, "img_size": side}
    pretrained = {"input_size": [3, side, side], "num_classes": 0}
    return {"architecture": vision["timm_model_name"], "model_args": sizes, "pretrained_cfg": pretrained}


def _half(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.half().contiguous() if tensor.is_floating_point() else tensor


# ------------------------------------------------------------------------------------------------ transformers


def write_blip2(folder: Path) -> None:
    """Save the demo's BLIP-2, a Blip2ForConditionalGeneration with its processor."""
    shutil.copytree(model_path(f"{PACKAGE}demo-blip2"), folder, dirs_exist_ok=True)


def write_language_model(folder: Path, prompts: tuple[str, ...]) -> None:
    """Save a small causal language model with a tokenizer that has a chat template, as instruction-tuned ones have."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = make_tokenizer([*words(), *prompts, "user assistant"])
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}assistant"
    )
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=_HEADS,
        num_key_value_heads=_HEADS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_text_encoder(folder: Path, pooling: str) -> None:
    """Save a small text encoder of transformers: CLIP's text tower, or a BERT for the other ways of pooling."""
    from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPTextModelWithProjection

    tokenizer = make_tokenizer(words())
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": _HEADS}
    torch.manual_seed(0)
    if pooling == "projected":
        ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        CLIPTextModelWithProjection(CLIPTextConfig(**sizes, **ends, projection_dim=WIDTH)).save_pretrained(folder)
    else:
        BertModel(BertConfig(**sizes), add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_image_text_model(folder: Path, model: str) -> None:
    """Save a small CLIP or, by the model's name, SigLIP of transformers, with its preprocessor's statistics."""
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    size: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": _HEADS}
    vision = {**size, "num_hidden_layers": LAYERS, "image_size": 2 * _PATCH, "patch_size": _PATCH}
    text = {**size, "num_hidden_layers": 2, "vocab_size": 100}
    torch.manual_seed(0)
    if "siglip" in model.lower():
        SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    else:
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)).save_pretrained(folder)
    statistics = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))


def make_tokenizer(texts: list[str], marks: Sequence[str] = ()) -> Any:
    """A fast tokenizer of whole words; `marks` are further special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    splitter = pre_tokenizers.Whitespace()
    pieces = [piece for text in texts for piece, _ in splitter.pre_tokenize_str(text)]
    special = ["<s>", "<pad>", "</s>", "<unk>", *marks]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys([*special, *pieces]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = splitter
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=list(marks), **names)


def write_bert(folder: Path, fusion_layer: int) -> None:
    """Save a small BERT with its tokenizer, as wide as the student, with a third more layers than `fusion_layer`."""
    from stm.models.sizes import SIZES
    from stm.models.text.small_bert import make_bert

    size = SIZES["tiny"]
    make_bert(folder, words(), size.width, layers=fusion_layer + max(1, fusion_layer // 3), heads=size.heads)
