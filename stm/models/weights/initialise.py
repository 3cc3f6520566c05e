"""Initial weights for a student from a similar model: UMT, VideoMAE or CLIP.

UMT's student is VideoMAE's encoder with one frame per tubelet. Weights without a counterpart in the student are dropped, and
each omission is returned as a note for the run's log.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from stm.models.sizes import heads_of_width
from stm.models.vit import Architecture
from stm.models.weights import zoo
from stm.models.weights.checks import Weights, WeightsError, adapt
from stm.models.weights.videomae import EMBEDDING, HEADER_KEY, find_state, load_checkpoint, parse_checkpoint
from stm.pretrained.hub import ModelError

CLIP = "clip:"
_ENCODER_PARTS = ("patch_embed", "blocks", "norm", "pos_embed", "cls_token")
_CHECKPOINT_STARTS = (b"PK\x03\x04", b"\x80")  # torch's zip format and its older plain pickle


class InitialWeights(NamedTuple):
    """Weights for a student, and human-readable notes on what was dropped or changed."""

    weights: Weights
    notes: tuple[str, ...] = ()


def read_initial(source: str, architecture: Architecture) -> InitialWeights:
    """Read initial weights for a student.

    Args:
        source: `clip:` and an open_clip model, in the format of similarity.model; a `.pth` of UMT, of which only the
            encoder is used; or any source of `zoo.read`. Weights for tubelets of several frames are converted to single
            frames if the student's tubelets have one frame.
        architecture: the student's architecture. Its clip length and image size may differ from the source's.

    Returns:
        Weights whose encoder has that architecture. They include a decoder if the source has one for the student's tubelet
        length; its architecture may differ from the student's.

    Raises:
        WeightsError: the source cannot be read, or its encoder has a different architecture.
    """
    if source.startswith(CLIP):
        initial = _read_clip(source.removeprefix(CLIP), architecture)
    elif _is_checkpoint(Path(source).expanduser()):
        initial = _read_checkpoint(Path(source).expanduser(), architecture)
    else:
        initial = InitialWeights(zoo.read(source))
    # Only in this direction, because weights for single frames do not determine weights for tubelets.
    if initial.weights.architecture.tubelet > architecture.tubelet == 1:
        initial = _join_frames(initial)
    adapt(initial.weights.encoder(), architecture, f"init: {source}")
    return initial


def _is_checkpoint(path: Path) -> bool:
    if not path.is_file() or path.suffix == ".safetensors":
        return False
    with path.open("rb") as file:
        return file.read(4).startswith(_CHECKPOINT_STARTS)


# ------------------------------------------------------------------------------------------------------------- UMT


def _read_checkpoint(path: Path, architecture: Architecture) -> InitialWeights:
    """Read a VideoMAE checkpoint completely, but only the encoder of any other checkpoint."""
    content = load_checkpoint(path)
    state, kind = find_state(content)
    if kind != "encoder" or HEADER_KEY in content:
        return InitialWeights(parse_checkpoint(content, path))
    encoder, rest = pick_encoder(state, path)
    # The number of heads cannot be inferred from weights: use that of VideoMAE's model of this width, else the student's.
    expected = replace(architecture, heads=heads_of_width(architecture.width) or architecture.heads)
    weights = parse_checkpoint({"model": encoder, "args": content.get("args")}, path, expected)
    notes = []
    if rest:
        parts = sorted({name.split(".")[0] for name in rest})
        notes.append(f"only the encoder's weights are used; left out: {', '.join(parts)}")
    if "encoder.norm.weight" not in encoder:
        notes.append("it has no norm after its blocks; the student's is freshly initialised")
    return InitialWeights(weights, tuple(notes))


def pick_encoder(state: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the encoder's tensors as "encoder.*", and the names of all other tensors.

    The encoder is located by the 3-D convolution that embeds the patches: at the root, under "encoder" in UMT's first stage,
    or under "vision_encoder.encoder" in its second.
    """
    volumes = [name for name, tensor in state.items() if isinstance(tensor, Tensor) and tensor.dim() == 5]
    # A checkpoint may also contain the teacher, which must not be mistaken for the encoder.
    ends = [name for name in volumes if name.endswith(EMBEDDING) and "teacher" not in name]
    if len(ends) != 1:
        listed = ", ".join(sorted(ends or state)[:5]) or "nothing"
        raise WeightsError(
            f"{path}: has {len(ends)} video encoders instead of one (names that end in {EMBEDDING}); it has {listed}, …"
        )
    prefix = ends[0].removesuffix(EMBEDDING)
    inside = {name: name.removeprefix(prefix) for name in state if name.startswith(prefix)}
    taken = {name: short for name, short in inside.items() if short.split(".")[0] in _ENCODER_PARTS}
    return {f"encoder.{short}": state[name] for name, short in taken.items()}, [n for n in state if n not in taken]


# -------------------------------------------------------------------------------------------------------- tubelets


def _join_frames(initial: InitialWeights) -> InitialWeights:
    """Convert weights to single-frame tubelets: a frame gets the same token as a tubelet that repeats it.

    Since the convolution is linear, its weights are summed over the tubelet's frames. The decoder predicts tubelets of the
    old length and is dropped.
    """
    a, name = initial.weights.architecture, "encoder.embedding.projection.weight"
    joint = initial.weights.tensors[name].unflatten(1, (3, a.tubelet, a.patch_size**2))  # colour, frame, pixel
    tensors = {**initial.weights.encoder().tensors, name: joint.sum(dim=2).flatten(1)}
    note = f"its tubelets have {a.tubelet} frames, the student's 1: the embedding's weights are summed over the frames"
    if initial.weights.kind == "pretraining":
        note += "; its decoder predicts tubelets of that length and is left out"
    weights = Weights(replace(a, tubelet=1, frames=a.frames // a.tubelet), tensors)
    return InitialWeights(weights, (*initial.notes, note))


# ------------------------------------------------------------------------------------------------------------ CLIP

_CLIP_NAMES = {
    "ln_1.": "norm1.",
    "attn.in_proj_": "attn.qkv.",
    "attn.out_proj.": "attn.proj.",
    "ln_2.": "norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}


def _read_clip(name: str, architecture: Architecture) -> InitialWeights:
    """Read the blocks, patch embedding and final norm of a CLIP ViT."""
    from open_clip.transformer import QuickGELU, ResidualAttentionBlock, VisionTransformer

    from stm.pretrained.clip import load_clip

    try:
        tower = load_clip(name, device="cpu", setting="init").model.visual
    except ModelError as error:
        raise WeightsError(str(error)) from error
    blocks = list(tower.transformer.resblocks) if isinstance(tower, VisionTransformer) else []
    plain = [isinstance(b, ResidualAttentionBlock) and isinstance(b.ls_1, nn.Identity) for b in blocks]
    if not blocks or not all(plain) or tower.attn_pool is not None:
        raise WeightsError(
            f"init {CLIP}{name}: its image tower is a {type(tower).__name__}, but must be a plain open_clip ViT"
        )
    width, hidden = tower.conv1.out_channels, blocks[0].mlp.c_fc.out_features
    own = replace(
        architecture,
        tubelet=1,
        frames=architecture.slots,
        patch_size=tower.patch_size[0],
        width=width,
        depth=len(blocks),
        heads=blocks[0].attn.num_heads,
        mlp_ratio=hidden / width,
    )
    notes = ["the CLIP's class token, positions, norm before its blocks and projection are left out"]
    if isinstance(blocks[0].mlp.gelu, QuickGELU):
        notes.append("its blocks were trained with QuickGELU, the student's have GELU")
    return InitialWeights(Weights(own, _rename_clip(tower)), tuple(notes))


def _rename_clip(tower: Any) -> dict[str, Tensor]:
    """Rename open_clip's tensors to our names, in float32. Its convolution has no bias, so the student's bias is 0."""
    kernel = tower.conv1.weight.detach().float()
    tensors = {
        "encoder.embedding.projection.weight": kernel.flatten(1),  # colour, row, column: one frame
        "encoder.embedding.projection.bias": kernel.new_zeros(len(kernel)),
        "encoder.norm.weight": tower.ln_post.weight.detach().float(),
        "encoder.norm.bias": tower.ln_post.bias.detach().float(),
    }
    for name, tensor in tower.transformer.resblocks.state_dict().items():
        number, _, inner = name.partition(".")
        start = next(start for start in _CLIP_NAMES if inner.startswith(start))
        tensors[f"encoder.blocks.{number}.{_CLIP_NAMES[start]}{inner.removeprefix(start)}"] = tensor.detach().float()
    return tensors
