"""CLIP embeddings of all cells of a frame in one forward pass: a cheaper deviation from TGM, which scores each patch alone.

MaskCLIP (Zhou et al., Extract Free Dense Labels from CLIP, ECCV 2022, section 3.2) reads a text-aligned feature at every
position from an unchanged CLIP: of the last attention layer only the projection of values and the output projection are
left, applied to each token alone; the final norm and CLIP's projection follow. We do what the paper says. The authors' code
(github.com/chongzhou96/MaskCLIP, mmseg/models/backbones/vit.py) also keeps the residual connections and the MLP of that
block, which makes maps of the demo's CLIP the opposite of what they should be (docs/masking.md has the numbers); later work
leaves both out as well (Lan et al., ClearCLIP, ECCV 2024).

Values alone are what attention returns if each token attends to itself alone, so it is run on sequences of one token. This
holds for every kind of attention in open_clip and needs none of its parts. It also computes queries and keys that have no
effect, about 1 % of the work.

SigLIP pools its tokens by attention with a learned query, after all blocks. Here each token is pooled alone: as before, what is
left of the attention is its value and its projection, and the head's norm and MLP follow, as they do for the image. MaskCLIP
does the same to the pooling head of CLIP's ResNets.

A cell is a token here: the frame is resized so that the tower's patches form the grid of the map, and the position
embedding is interpolated to it. Unlike in `patch_scorer`, a cell's embedding depends on the whole frame, through the blocks
before the last.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import CustomResidualAttentionBlock, ResidualAttentionBlock, VisionTransformer
from timm.layers import AttentionPoolLatent, resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer as TimmTransformer
from torch import Tensor, nn
from torch.nn import functional

from stm.preprocess.similarity.patch_scorer import PatchScorer, Piece, stretch
from stm.pretrained.clip import LoadedClip
from stm.pretrained.hub import ModelError, exact_convolutions
from stm.shards.grid import map_shape


class DenseTower(NamedTuple):
    """An image tower whose tokens can be brought into the space of its image embedding."""

    network: Any  # open_clip's ViT, or a TimmModel
    patch_size: tuple[int, int]  # height and width, in pixels
    positions: Tensor  # [prefix + rows * columns of the grid, width]
    grid: tuple[int, int]
    prefix: int  # tokens before those of patches
    embed: Callable[[Any, Tensor, Tensor], Tensor]  # of the network, pixels and positions; as `embed_dense`


class DenseScorer(PatchScorer):
    """Computes CLIP embeddings of all cells of a frame at once, in batches of frames with maps of one size."""

    def __init__(self, clip: LoadedClip, grid: int, batch_size: int, compile: bool = False) -> None:
        """
        Args:
            grid: cells along the short side of a map.
            batch_size: cells per forward pass; whole frames of at most this many cells, or a single one.
            compile: whether to compile the image tower, once per size of a map.

        Raises:
            ModelError: the image tower is neither a ViT of open_clip's own without an attention pooler nor SigLIP's.
        """
        super().__init__(clip, grid, batch_size)
        self._tower = check_tower(clip.model.visual)
        self._positions: dict[tuple[int, int], Tensor] = {}
        self._embed_dense = torch.compile(self._tower.embed, dynamic=False) if compile else self._tower.embed

    def cut(self, shapes: Sequence[tuple[int, int]]) -> list[list[tuple[int, int, int]]]:
        """Distribute frames over batches, in order; a batch has frames with maps of one size."""
        batches = []
        for (rows, columns), group in groupby(enumerate(shapes), key=itemgetter(1)):
            frames, count = [frame for frame, _ in group], self._count_frames(rows, columns)
            batches += [
                [(frame, 0, rows * columns) for frame in frames[start : start + count]]
                for start in range(0, len(frames), count)
            ]
        return batches

    def prepare(self, pieces: Sequence[Piece]) -> Tensor:
        """Return the tower's input for whole frames of one size: [frames per batch, 3, height, width], padded with zeros."""
        rows, columns = map_shape(pieces[0].frame.shape[1], pieces[0].frame.shape[0], self.grid)
        patch_height, patch_width = self._tower.patch_size
        height, width = rows * patch_height, columns * patch_width
        shape = (self._count_frames(rows, columns), 3, height, width)
        batch = torch.zeros(shape, dtype=self.clip.precision, device=self.clip.device)
        for number, (frame, _, _) in enumerate(pieces):
            pixels = torch.from_numpy(frame).to(self.clip.device, non_blocking=True).permute(2, 0, 1).float()
            normal = stretch((pixels - self._mean) / self._std, height, width)
            torch.clamp(normal, self._black, self._white, out=batch[number])
        return batch

    def encode(self, batch: Tensor) -> Tensor:
        """Return unit-length embeddings of a prepared batch: float16 [frames * rows * columns, D] on the device."""
        patch_height, patch_width = self._tower.patch_size
        positions = self._resize_positions(batch.shape[2] // patch_height, batch.shape[3] // patch_width)
        with exact_convolutions(self.clip.device):
            features = self._embed_dense(self._tower.network, batch, positions).flatten(0, 1)
        return functional.normalize(features.float(), dim=-1).half()

    def _count_frames(self, rows: int, columns: int) -> int:
        return max(1, self.batch_size // (rows * columns))

    def _resize_positions(self, rows: int, columns: int) -> Tensor:
        """The position embedding for a grid of tokens, bicubic without antialiasing, as MaskCLIP: [prefix + N, width]."""
        if (rows, columns) not in self._positions:
            table, grid, prefix = self._tower.positions, list(self._tower.grid), self._tower.prefix
            resized = resample_abs_pos_embed(
                table[None], [rows, columns], grid, num_prefix_tokens=prefix, antialias=False
            )
            self._positions[rows, columns] = resized[0]
        return self._positions[rows, columns]


def embed_dense(tower: VisionTransformer, pixels: Tensor, positions: Tensor) -> Tensor:
    """Return the embedding of each patch of images, from its value in the last block.

    Args:
        pixels: float [F, 3, height, width], normalised.
        positions: [1 + N, width of the tower], of the class token and of N patches.

    Returns:
        [F, N, D], not normalised.
    """
    patches = tower.conv1(pixels).flatten(2).transpose(1, 2)
    classes = tower.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
    states = tower.ln_pre(torch.cat([classes, patches], dim=1) + positions.to(patches.dtype))
    *blocks, last = tower.transformer.resblocks
    for block in blocks:
        states = block(states)
    alone = states[:, 1:].flatten(0, 1)[:, None]  # sequences of one token, which attends to itself
    tokens = tower.ln_post(attend(last, alone)[:, 0]) @ tower.proj
    return tokens.unflatten(0, (len(patches), -1))


def attend(block: ResidualAttentionBlock | CustomResidualAttentionBlock, states: Tensor) -> Tensor:
    """Return what the attention of a block adds to its input: [B, M, width] -> the same shape."""
    normal = block.ln_1(states)
    custom = isinstance(block, CustomResidualAttentionBlock)
    return block.ls_1(block.ln_attn(block.attn(normal)) if custom else block.attention(normal))


def embed_dense_by_head(model: TimmModel, pixels: Tensor, positions: Tensor) -> Tensor:
    """Return the embedding of each patch of images by SigLIP's pooling head, to which each token is shown alone.

    Arguments and result as for `embed_dense`; there is no class token.
    """
    trunk: Any = model.trunk
    patches = trunk.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
    states = trunk.norm(trunk.blocks(trunk.norm_pre(patches + positions.to(patches.dtype))))
    tokens = model.head(trunk.forward_head(states.flatten(0, 1)[:, None]))
    return tokens.unflatten(0, (len(patches), -1))


def check_tower(tower: nn.Module) -> DenseTower:
    """Return an image tower whose tokens share the space of its image embedding.

    Raises:
        ModelError: it is of another kind; the message says of which.
    """
    if isinstance(tower, VisionTransformer) and tower.attn_pool is None:
        return DenseTower(tower, tower.patch_size, tower.positional_embedding, tower.grid_size, 1, embed_dense)
    if isinstance(tower, TimmModel) and _has_head(tower.trunk):
        embedding: Any = tower.trunk.patch_embed
        positions: Any = tower.trunk.pos_embed
        return DenseTower(tower, embedding.patch_size, positions[0], embedding.grid_size, 0, embed_dense_by_head)
    kind = "a ViT with an attention pooler" if isinstance(tower, VisionTransformer) else f"a {type(tower).__name__}"
    if isinstance(tower, TimmModel):
        kind = f"timm's {type(tower.trunk).__name__}, without SigLIP's pooling head,"
    raise ModelError(
        f"similarity.model has {kind} as its image tower; `method: dense` needs a ViT of open_clip's own with a class token or "
        "average pooling, for instance ViT-B-16-quickgelu@openai, or a SigLIP. `method: patches` takes any model"
    )


def _has_head(trunk: nn.Module) -> bool:
    """Whether a network of timm is SigLIP's: a ViT without class token whose tokens a learned query pools."""
    if not isinstance(trunk, TimmTransformer) or not isinstance(trunk.attn_pool, AttentionPoolLatent):
        return False
    plain = trunk.attn_pool.pos_embed is None and isinstance(trunk.patch_embed.norm, nn.Identity)
    return plain and trunk.pos_embed is not None and not trunk.num_prefix_tokens
