"""The prediction head from a video's pooled features to the text embedding space (TGM, section 3.4)."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from stm.distributed.gather import count_processes, gather


class GlobalBatchNorm(nn.BatchNorm1d):
    """Batch norm over the rows of all processes ("global batch norm", as in SimCLR and MoCo v3).

    Equivalent to torch's BatchNorm1d on the concatenated batch: outputs, gradients and running statistics, which are
    identical on all processes and are used in evaluation. torch's own SyncBatchNorm does not work on the CPU. Processes
    may have different numbers of rows, or none. Statistics are computed in float32 or wider.
    """

    def __init__(self, features: int, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True) -> None:
        super().__init__(features, eps, momentum, affine)

    def forward(self, input: Tensor) -> Tensor:
        """[B, features] -> the same shape.

        Raises:
            ValueError: in training, a single process has a single row, whose variance is undefined.
        """
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        if not self.training or count_processes() == 1:
            return super().forward(x)
        self._check_input_dim(x)
        mean, variance = self._global_statistics(x)
        x = (x - mean) * (variance + self.eps).rsqrt()
        return x * self.weight + self.bias if self.affine else x

    def _global_statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance [features] over all processes, with gradients; updates the running ones.

        Each process sums the squared deviations from its own mean, and Chan's formula combines the sums: unlike
        E[x^2] - E[x]^2, this does not lose precision when the mean is large.
        """
        rows = x.shape[0]
        mean = x.sum(dim=0) / max(rows, 1)
        squares = (x - mean).square().sum(dim=0)
        # One collective for all three statistics.
        parts = gather(torch.cat([mean, squares, mean.new_full((1,), rows)])[None])
        means, sums, counts = parts.split([len(mean), len(mean), 1], dim=1)
        counts = counts.detach()
        total = counts.sum()
        mean = (counts * means).sum(dim=0) / total
        variance = (sums + counts * (means - mean).square()).sum(dim=0) / total
        # torch normalises with the biased variance and keeps a running mean of the unbiased one.
        self._update_running(mean.detach(), variance.detach() * total / (total - 1))
        return mean, variance

    @torch.no_grad()
    def _update_running(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)


class PredictionHead(nn.Sequential):
    """Linear layers with global batch norm and ReLU between them; the last one maps to the text embedding width."""

    def __init__(self, in_width: int, hidden: int, out_width: int, layers: int) -> None:
        """
        Args:
            in_width: width of the features.
            hidden: width between the layers.
            out_width: width of the text embeddings.
            layers: number of linear layers; 1 is a plain projection without batch norm.
        """
        widths = [in_width] + [hidden] * (layers - 1)
        modules: list[nn.Module] = []
        for before, after in pairwise(widths):
            # No bias: batch norm would subtract it again.
            modules += [nn.Linear(before, after, bias=False), GlobalBatchNorm(after), nn.ReLU()]
        super().__init__(*modules, nn.Linear(widths[-1], out_width))
