"""A model's shapes, without torch, so that a dry run can reckon with them."""

from dataclasses import dataclass

from stm.config import Run
from stm.models.sizes import SIZES


@dataclass(frozen=True)
class Architecture:
    """Everything that determines a model's shapes and positions; stored in the metadata of its weights."""

    image_size: int  # pixels
    patch_size: int  # pixels
    tubelet: int  # frames
    frames: int
    width: int
    depth: int  # blocks
    heads: int
    decoder_width: int
    decoder_depth: int  # blocks
    decoder_heads: int
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6  # VideoMAE's; 1e-12 in transformers' configs
    decoder_norm_eps: float = 1e-6  # of the decoder's last norm; 1e-5 in transformers
    positions: str = "joint"  # joint: one table over token indices (VideoMAE's); separable: time, row, column
    position_period: float = 10000.0  # VideoMAE's
    position_frames: int | None = None  # clip length that the table is computed for, then interpolated; None: `frames`

    @property
    def slots(self) -> int:
        return self.frames // self.tubelet

    @property
    def slot_tokens(self) -> int:
        """Tokens per time slot, N."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens(self) -> int:
        """Tokens per clip, L = slots x N."""
        return self.slots * self.slot_tokens

    @property
    def token_values(self) -> int:
        """Values per token: 3 colours x frames x pixels of its tubelet."""
        return 3 * self.tubelet * self.patch_size**2


def describe(run: Run) -> Architecture:
    """Return the architecture that a run's config describes."""
    size = SIZES[run.model]
    if run.decoder_depth is not None:
        size = size._replace(decoder_depth=run.decoder_depth)
    return Architecture(
        run.image_size,
        run.patch_size,
        run.tubelet,
        run.frames,
        **size._asdict(),
        positions=run.positions,
        position_period=run.position_period,
        position_frames=run.position_table_frames,
    )
