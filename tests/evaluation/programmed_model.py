"""Small splits and a model with text whose cosines and match logits are set by linear algebra, so that results are known."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from clip_metrics import check_clip_values
from language_runs import make_run, make_small_bert
from timm.layers import DropPath
from torch import Tensor, nn
from training_shards import make_shard

from stm.config import LanguageRun, LanguageTask
from stm.evaluation import EvaluationInputs, evaluate
from stm.evaluation.language_clips import open_clips
from stm.models.text.split_bert import SplitBert
from stm.models.video_language import EXTRA, VideoLanguageModel
from stm.models.vit import VideoEncoder
from stm.models.weights import zoo
from stm.storage.files import read_json
from stm.storage.tables import read_receipt, read_table, write_table

COLORS = ("red", "green", "blue")
State = dict[str, Tensor]


@dataclass(frozen=True)
class ClipTexts:
    """What is packed with a clip: (source, caption) pairs and (question, answer, choices) triples."""

    captions: Sequence[tuple[str, str]] = ()
    questions: Sequence[tuple[str, str, Sequence[str] | None]] = ()


def write_split(index: Path, clips: Sequence[ClipTexts], seed: int) -> Path:
    """A shard of such clips, with keys `{split}-000` and so on."""
    numbers = range(len(clips))
    make_shard(index, [COLORS[n % 3] for n in numbers], seed, index.parent.name, without_captions=numbers)
    rows = read_table(index).to_pylist()
    for row, texts in zip(rows, clips, strict=True):
        row["captions"] = [caption for _, caption in texts.captions]
        row["caption_sources"] = [source for source, _ in texts.captions]
        row["questions"] = [dict(zip(("question", "answer", "choices"), own, strict=True)) for own in texts.questions]
    schema = pq.read_schema(index).remove_metadata()
    write_table(index, pa.Table.from_pylist(rows, schema=schema), read_receipt(index))
    return index


@dataclass
class World:
    """A run, its untrained weights, and three splits."""

    folder: Path
    splits: dict[str, Path]
    run: LanguageRun
    weights: Path
    model: VideoLanguageModel  # in eval mode

    def features(self, task: LanguageTask, split: str) -> Tensor:
        """The encoder's tokens of each clip, one clip at a time: [clips, L, W]."""
        clips = open_clips(task, self.run, [self.splits[split]], 0, False)
        assert not clips.train
        videos = [torch.from_numpy(clips[number][0]["video"]) for number in range(len(clips))]
        with torch.inference_mode():
            return torch.cat([self.model.encoder(video[None]) for video in videos])

    def tokens(self, texts: Sequence[str], length: int = 8) -> Tensor:
        return self.model.language.tokenizer.encode(list(texts), length)

    def evaluate(self, task: LanguageTask, output: Path, **more: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """`metrics.json` and the rows of `predictions.parquet`."""
        validation = [self.splits["val"]] if task.validation_split else []
        inputs = EvaluationInputs(
            self.weights,
            [self.splits["test"]],
            output,
            0,
            train=[self.splits["train"]],
            validation=validation,
            device="cpu",
            **more,
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("stm.evaluation.language_clips.CLIPS_PER_BATCH", 2)  # several batches, as of large splits
            evaluate(task, self.run, inputs)
        check_clip_values(output)
        return read_json(output / "metrics.json"), pq.read_table(output / "predictions.parquet").to_pylist()


def make_world(folder: Path, clips: Mapping[str, Sequence[ClipTexts]], gain: float = 1.0) -> World:
    """
    Args:
        clips: what is packed in "train", "val" and "test".
        gain: factor of all weights of the BERT's layers; with more than 1, its outputs depend more on its inputs.
    """
    splits = {
        name: write_split(folder / name / f"{name}-00000.parquet", own, seed)
        for seed, (name, own) in enumerate(clips.items())
    }
    run = make_run("umt", make_small_bert(folder / "bert"), image_size=32, patch_size=8)
    assert run.language is not None
    torch.manual_seed(0)
    model = VideoLanguageModel(VideoEncoder(zoo.describe(run)), SplitBert.load(run.language), run.language.embedding)
    with torch.no_grad():
        for name, parameter in model.language.named_parameters():
            if "layers" in name and parameter.dim() == 2:
                parameter.mul_(gain)
    weights = folder / "weights.safetensors"
    zoo.save(model.encoder, weights, extra={EXTRA: model.language_state()}, header={EXTRA: model.describe()})
    return World(folder, splits, run, weights, model.eval())


@dataclass
class Program:
    """Rows for least squares: what a head is given, and what it should return."""

    model: VideoLanguageModel
    clips: list[Tensor] = field(default_factory=list)
    texts: list[Tensor] = field(default_factory=list)
    pairs: list[Tensor] = field(default_factory=list)
    wanted_clips: list[np.ndarray] = field(default_factory=list)
    wanted_texts: list[np.ndarray] = field(default_factory=list)
    wanted_pairs: list[np.ndarray] = field(default_factory=list)
    axes: int = 0

    @torch.no_grad()
    def add(self, features: Tensor, tokens: Tensor, cosines: np.ndarray, logits: np.ndarray) -> None:
        """
        Args:
            features: [V, L, W], tokens of the clips of a split.
            tokens: int64 [Q, X], its different texts.
            cosines: [Q, V], small enough for texts to be unit vectors.
            logits: [Q, V], of a match (of none: 0).
        """
        model, (texts, clips), width = self.model, cosines.shape, self.model.embedding
        frames = model.encoder.architecture.frames
        pooled = model.pool_norm(features.unflatten(1, (frames, -1)).mean(2)).flatten(0, 1)
        self.clips.append(pooled)
        # A clip's vector is the mean of its frames' unit vectors. Of every other clip, half of the frames lie on an axis of
        # no text: its vector has the length 0.5, which only a mean over frames knows.
        vectors = np.repeat(np.eye(width)[self.axes : self.axes + clips, None], frames, axis=1)
        vectors[1::2, ::2] = np.eye(width)[-2]
        lengths = np.where(np.arange(clips) % 2, 0.5, 1.0)
        self.wanted_clips.append(vectors.reshape(clips * frames, width))
        states = model.encode_text(tokens)
        self.texts.append(states[:, 0])
        wanted = np.zeros((texts, width))
        wanted[:, self.axes : self.axes + clips] = cosines / lengths
        wanted[:, -1] = np.sqrt(
            1 - np.square(cosines / lengths).sum(1)
        )  # the rest of a unit vector, on an axis of no clip
        self.wanted_texts.append(wanted)
        for clip in range(clips):
            self.pairs.append(model.fuse(states, tokens, features[clip : clip + 1])[:, 0])
            self.wanted_pairs.append(np.stack([np.zeros(texts), logits[:, clip]], axis=1))
        self.axes += clips
        assert self.axes < width - 2

    def solve(self) -> State:
        """The weights of the three heads, by name."""
        heads = {
            "video_projection": (self.clips, self.wanted_clips),
            "text_projection": (self.texts, self.wanted_texts),
            "matching_head": (self.pairs, self.wanted_pairs),
        }
        return {
            name: tensor
            for head, (given, wanted) in heads.items()
            for name, tensor in _solve(head, torch.cat(given).double().numpy(), np.concatenate(wanted)).items()
        }


def _solve(head: str, given: np.ndarray, wanted: np.ndarray) -> State:
    inputs = np.concatenate([given, np.ones((len(given), 1))], axis=1)
    solution = np.linalg.lstsq(inputs, wanted, rcond=None)[0]
    weight, bias = torch.from_numpy(solution[:-1].T.copy()).float(), torch.from_numpy(solution[-1]).float()
    error = np.abs(given.astype(np.float32) @ weight.numpy().T + bias.numpy() - wanted).max()
    assert error < 1e-3, f"{head}: {error}"
    return {f"{head}.weight": weight, f"{head}.bias": bias}


class ScriptedTraining:
    """Takes the place of `fit`: after each epoch the module has the next state of the list."""

    def __init__(self, states: Sequence[State]) -> None:
        """
        Args:
            states: by full parameter name of the tuned module; what is absent stays as it is.
        """
        self.states = states
        self.batch: dict[str, Any] = {}
        self.plan: Any = None
        self.drop_rates: list[float] = []
        self.discarded = False

    def __call__(
        self,
        module: nn.Module,
        batches: Callable[[int], Any],
        plan: Any,
        output: Path,
        process: Any,
        after_epoch: Callable[[int], None],
    ) -> "ScriptedTraining":
        self.plan = plan
        self.batch = dict(next(iter(batches(0))))
        self.drop_rates = [part.drop_prob or 0.0 for part in module.modules() if isinstance(part, DropPath)]
        for epoch, state in enumerate(self.states, 1):
            assert module.training
            unknown = module.load_state_dict(state, strict=False).unexpected_keys
            assert not unknown
            after_epoch(epoch)
        return self

    def resumed(self) -> dict[str, Any]:
        return {}

    def discard(self) -> None:
        self.discarded = True
