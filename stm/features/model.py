"""Loads weights of any source as a function from clips to features, and says how their run sampled clips."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from stm.config import Sampling
from stm.distributed.process import choose_device
from stm.features.settings import ClipSettings, FeatureError, Protocol
from stm.models.architecture import Architecture
from stm.models.weights import zoo
from stm.models.weights.checks import Weights, adapt, build_encoder
from stm.models.weights.classifier import VideoClassifier
from stm.models.weights.provenance import own_file
from stm.pretrained.local_files import hash_weights
from stm.storage.files import read_json, sha256_file

Pool = Literal["mean", "none"]


@dataclass(frozen=True)
class ClipModel:
    """A network from clips, uint8 [B, T, 3, S, S], to a value per clip, [B, *shape]."""

    module: nn.Module  # to be moved to a device; in eval mode
    function: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]
    architecture: Architecture
    sha256: str  # of the weights
    kind: str  # what the weights are, for receipts
    labels: tuple[str, ...] | None = None  # of a classifier's classes, in the order of its logits

    @property
    def identity(self) -> dict[str, Any]:
        """The model in a receipt."""
        return {"sha256": self.sha256, "kind": self.kind, "architecture": asdict(self.architecture)}


def find_device(settings: ClipSettings) -> torch.device:
    """Return the device of the settings; by default CUDA if available.

    Raises:
        FeatureError: there is no such device.
    """
    try:
        device = choose_device(settings.device)
        torch.zeros(1, device=device).cpu()  # `cuda:7` and `meta` can be named, too
    except (ValueError, RuntimeError, AssertionError) as error:
        raise FeatureError(f"device: {str(error).splitlines()[0]}") from error  # torch lists all its kernels below
    return device


def read_weights(source: str | Path, settings: ClipSettings) -> Weights:
    """Read weights, for windows of the length that the settings ask for.

    Raises:
        WeightsError: they cannot be read.
        FeatureError: the length does not fit.
    """
    weights = zoo.read(source)
    a = weights.architecture
    frames = settings.frames or a.frames
    if frames % a.tubelet:
        raise FeatureError(f"frames must be divisible by the weights' tubelets of {a.tubelet} frames, is {frames}")
    return adapt(weights, replace(a, frames=frames), str(source))


def load_features(source: str | Path, settings: ClipSettings, pool: Pool) -> ClipModel:
    """Load an encoder as a function to features.

    Pooled features are the mean of all tokens after the encoder's last norm, [width]; those of a fine-tuned classifier are what
    its last layer sees: the mean without that norm, which it does not have, after its own. Per token: [slots, N, width].
    """
    weights = read_weights(source, settings)
    a, kind, sha256 = weights.architecture, weights.kind, hash_source(source, weights)
    if pool == "mean":
        module = VideoClassifier(weights).eval() if kind == "classifier" else build_encoder(weights).eval()
        return ClipModel(module, module.forward_features, (a.width,), a, sha256, kind)
    encoder = build_encoder(weights).eval()

    def function(video: Tensor) -> Tensor:
        return encoder(video, None, kind != "classifier").unflatten(1, (a.slots, a.slot_tokens))

    return ClipModel(encoder, function, (a.slots, a.slot_tokens, a.width), a, sha256, kind)


def load_classifier(source: str | Path, settings: ClipSettings, classes: Path | None) -> ClipModel:
    """Load a fine-tuned classifier as a function to logits.

    Args:
        classes: a file with one class name per line, in the order of the logits; None: those in the weights.

    Raises:
        FeatureError: the weights are no classifier, or the number of names is not that of its classes.
    """
    weights = read_weights(source, settings)
    if weights.kind != "classifier":
        what = "an encoder alone" if weights.kind == "encoder" else "a pretrained encoder and decoder"
        raise FeatureError(
            f"{source}: these weights are {what}, not a fine-tuned classifier. Fine-tune it (task: finetune), which writes "
            "evaluate/RUN/TASK/classifier.safetensors, or take a published one; `stm features` works with any weights"
        )
    labels = weights.labels if classes is None else tuple(_read_names(classes))
    if labels is not None and len(labels) != weights.classes:
        raise FeatureError(
            f"{classes}: {len(labels)} names for the {weights.classes} classes of {source}: one name per line"
        )
    model, sha256 = VideoClassifier(weights).eval(), hash_source(source, weights)
    return ClipModel(model, model, (weights.classes,), weights.architecture, sha256, "classifier", labels)


def _read_names(path: Path) -> list[str]:
    try:
        lines = path.expanduser().read_text(encoding="utf-8").splitlines()
    except UnicodeError as error:
        raise FeatureError(f"{path}: not a text file in UTF-8 ({error})") from None
    return [line.strip() for line in lines if line.strip()]


def hash_source(source: str | Path, weights: Weights) -> str:
    """Return the SHA-256 of a weights file, or of a run's in its folder; of a model from elsewhere, that of its tensors."""
    path = Path(source).expanduser()
    file = path if path.is_file() else own_file(path)
    if file is not None:
        return sha256_file(file)
    if path.is_dir():
        return hash_weights(path)
    return digest_tensors(weights.tensors)


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the tensors' names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy(force=True).data)
    return digest.hexdigest()


def find_protocol(source: str | Path) -> Protocol:
    """Read how clips were sampled, from beside the weights: a run's from `config.json`, a classifier's test from `metrics.json`.

    Other weights have neither: then clips are dense, as VideoMAE's on Kinetics.
    """
    run = read_config(source)
    if run:
        return Protocol(_sampling(run.get("sampling")), _positive(run.get("stride")) or 1)
    path = Path(source).expanduser()
    metrics = _read_if_ours((path if path.is_dir() else path.parent) / "metrics.json")
    try:
        task, run = metrics["settings"], metrics["receipt"]["settings"]["run"]
        sampling, stride = task["sampling"] or run["sampling"], task["stride"] or run["stride"]
        return Protocol(_sampling(sampling), _positive(stride) or 1, _positive(task["views"]), _positive(task["crops"]))
    except (KeyError, TypeError):
        return Protocol()


def read_config(source: str | Path) -> dict[str, Any]:
    """Return the settings of the run whose weights these are, from `config.json` beside them; empty if there is none."""
    path = Path(source).expanduser()
    run = _read_if_ours((path if path.is_dir() else path.parent) / "config.json").get("run")
    return run if isinstance(run, dict) else {}


def _read_if_ours(path: Path) -> dict[str, Any]:
    try:
        values = read_json(path) if path.is_file() else {}
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _sampling(value: Any) -> Sampling:
    return value if value in get_args(Sampling) else "dense"


def _positive(value: Any) -> int | None:
    return value if isinstance(value, int) and 1 <= value <= 1000 else None
