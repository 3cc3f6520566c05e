"""ActionCLIP's temporal transformer over the frames of a clip, applied to the features of STM's teacher.

The features of the T frames at the same image position form a sequence (as in STM's released code): a learned position
embedding per frame is added, residual blocks follow, and the sequence is added again at the end.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from stm.models.weights.checks import WeightsError, check_tensors
from stm.models.weights.videomae import load_checkpoint

POSITIONS = "frame_position_embeddings.weight"
NEST = "fusion_model_state_dict"  # the key in ActionCLIP's checkpoints, which also contain the CLIP
HEAD_WIDTH = 64  # ActionCLIP's
FOLDER_FILE = "model.safetensors"  # the weights of a model that is a folder, such as the demo's
HEADS_KEY = "heads"  # metadata of a safetensors file: heads per block, which the shapes of the tensors do not tell


class TemporalFusion(nn.Module):
    """Attention between the frames of a clip, separately at each image position."""

    def __init__(self, width: int, frames: int, heads: int | None = None, layers: int = 6) -> None:
        """
        Args:
            width: C, width of the features.
            frames: rows of the position table, the maximum clip length; ActionCLIP has 77, its text context length.
            heads: heads per block; by default one per 64 features, as in ActionCLIP.
            layers: number of blocks; the default is ActionCLIP's.
        """
        from open_clip.transformer import QuickGELU, Transformer  # slow to import, and few runs use fusion

        super().__init__()
        self.width = width
        self.frame_position_embeddings = nn.Embedding(frames, width)
        # CLIP's blocks, with the parameter names of ActionCLIP's files and ActionCLIP's epsilon.
        norm = partial(nn.LayerNorm, eps=1e-12)
        self.transformer = Transformer(
            width, layers, heads or max(1, width // HEAD_WIDTH), act_layer=QuickGELU, norm_layer=norm
        )

    def forward(self, features: Tensor, frames: int) -> Tensor:
        """Fuses the features of clips.

        Args:
            features: float [layers, B, T * N, C], at index frame * N + position.
            frames: T; a clip shorter than the table uses its first rows.

        Returns:
            The same shape and dtype; each layer is fused separately.

        Raises:
            ValueError: there are more frames than rows in the table.
        """
        table = self.frame_position_embeddings.weight
        if frames > len(table):
            raise ValueError(f"clips of {frames} frames: the temporal fusion has positions for {len(table)} frames")
        # Layer by layer: all six at once would need six times the activation memory.
        return torch.stack([self._fuse(layer, frames, table[:frames]) for layer in features])

    def _fuse(self, layer: Tensor, frames: int, positions: Tensor) -> Tensor:
        """[B, T * N, C] -> the same."""
        batch = len(layer)
        sequences = layer.unflatten(1, (frames, -1)).transpose(1, 2).flatten(0, 1)  # [B * N, T, C]
        fused = self.transformer(sequences + positions.to(layer.dtype)).to(layer.dtype) + sequences
        return fused.unflatten(0, (batch, -1)).transpose(1, 2).flatten(1, 2)

    @classmethod
    def load(cls, path: Path) -> "TemporalFusion":
        """Reads ActionCLIP's weights: its checkpoint, only the fusion's state dict (.pth, .pt), or that as safetensors.

        Blocks have ActionCLIP's heads, one per 64 features, unless the metadata of a safetensors file says otherwise.

        Raises:
            WeightsError: the file cannot be read, is not safe to load, or contains no such transformer.
        """
        state = _strip(read_state(path, NEST))
        table, blocks = state.get(POSITIONS), _count_blocks(state)
        if not isinstance(table, Tensor) or table.dim() != 2 or not blocks:
            listed = ", ".join(sorted(state)[:5]) or "nothing"
            raise WeightsError(
                f"{path}: holds no temporal transformer of ActionCLIP: {POSITIONS} and transformer.resblocks are expected, "
                f"and it has {listed}, …. Of ActionCLIP's heads only `Transf` has one"
            )
        frames, width = table.shape
        with torch.device("meta"):
            fusion = cls(width, frames, _read_heads(path, width), blocks)
        check_tensors(state, fusion.state_dict(), f"{path} is a temporal transformer of ActionCLIP")
        fusion.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
        return fusion


def read_state(path: Path, nest: str) -> Mapping[str, Any]:
    """Read one of the state dicts of an ActionCLIP checkpoint, or the whole file if it has no such key.

    Args:
        path: a checkpoint (.pt, .pth) or its tensors as .safetensors.
        nest: the key of the state dict.

    Raises:
        WeightsError: the file cannot be read or is not safe to load.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: cannot be read: there is no such file (from the working directory {Path.cwd()})")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise WeightsError(f"{path}: cannot be read as safetensors ({error})") from error
    content = load_checkpoint(path)
    nested = content.get(nest, content)
    return nested if isinstance(nested, dict) else content


def _read_heads(path: Path, width: int) -> int | None:
    """Read the heads per block from the metadata of a safetensors file; None if it does not say."""
    if path.suffix != ".safetensors":
        return None
    with safe_open(path, "pt") as file:
        heads = (file.metadata() or {}).get(HEADS_KEY)
    if heads is None:
        return None
    if not heads.isdecimal() or not int(heads) or width % int(heads):
        raise WeightsError(f"{path}: the metadata says {heads!r} heads, which must divide the width of {width}")
    return int(heads)


def _strip(state: Mapping[str, Any]) -> dict[str, Any]:
    """Strip the prefix of ActionCLIP's files from the names: `module.`, or the key of a joint checkpoint."""
    before = next((name.removesuffix(POSITIONS) for name in map(str, state) if name.endswith(POSITIONS)), "")
    return {str(name).removeprefix(before): tensor for name, tensor in state.items() if str(name).startswith(before)}


def _count_blocks(state: Mapping[str, Any]) -> int:
    blocks = {name.split(".")[2] for name in state if name.startswith("transformer.resblocks.")}
    return len(blocks)
