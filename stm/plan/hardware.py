"""The hardware that the plan assumes: published peaks and memory of GPUs, and the rate of a CPU core."""

from dataclasses import dataclass

from stm.config import Config

# Measured on an AMD EPYC (AVX-512) with torch in float32: 11 ViT-B/32 images per second per core, and a ViT-B training
# step, both correspond to 90 GFLOP/s. Small models achieve less.
CORE_FLOPS = 90e9


@dataclass(frozen=True)
class Gpu:
    """A GPU's published values: dense matrix products, without sparsity."""

    bf16_flops: float  # FLOP/s of the tensor cores in bfloat16 and float16, accumulated in float32
    float32_flops: float  # FLOP/s in float32: torch does not use TF32 unless it is told to, and stm does not
    gigabytes: float  # memory, 10^9 bytes


# From NVIDIA's data sheets of each GPU (SXM modules unless named otherwise); where only the rate with sparsity is given, half
# of it. RTX 4090: the Ada whitepaper.
GPUS = {
    "b200": Gpu(2250e12, 75e12, 180),
    "h200": Gpu(989.5e12, 67e12, 141),
    "h100": Gpu(989.5e12, 67e12, 80),
    "h100-pcie": Gpu(756e12, 51e12, 80),
    "a100": Gpu(312e12, 19.5e12, 80),
    "a100-40gb": Gpu(312e12, 19.5e12, 40),
    "l40s": Gpu(362e12, 91.6e12, 48),
    "rtx-4090": Gpu(165.2e12, 82.6e12, 24),
}


@dataclass(frozen=True)
class Hardware:
    """What jobs share.

    The default share of the peak, 0.32, is an assumption: an H200 reaches 790 of its 989.5 TFLOP/s in large bf16 products, and
    training 40 % of that. It has not been measured with these models.
    """

    name: str
    gpu: Gpu
    share: float  # of the published peak
    gpus: int
    cores: int

    @classmethod
    def of(cls, config: Config) -> "Hardware":
        """Return the hardware of `prices`; without `prices.gpus`, the GPUs of the largest run or evaluation."""
        prices = config.prices
        largest = max((work.world_size for work in (*config.runs.values(), *config.evaluate.values())), default=1)
        return cls(prices.gpu, GPUS[prices.gpu], prices.gpu_share, prices.gpus or largest, prices.cores)

    def gpu_rate(self, precision: str) -> float:
        """Return the assumed FLOP/s of one GPU in a precision: `float32`, or any name of a 16-bit type."""
        return self.share * (self.gpu.float32_flops if precision == "float32" else self.gpu.bf16_flops)
