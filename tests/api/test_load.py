"""Loaded encoders and classifiers: the outputs of the networks that `zoo` reads, from all formats, on clips of any size."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm
from training_shards import make_run

import stm
from stm.api.encoders import Classifier
from stm.data.dataset import ClipDataset
from stm.evaluation.classification.finetune import Classifier as Head
from stm.models.vit import VideoEncoder, VideoMAE
from stm.models.weights import zoo
from stm.models.weights.checks import WeightsError


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run") / "weights.safetensors"
    zoo.save(zoo.build(make_run()), path)
    return path


@pytest.fixture(scope="module")
def video() -> Tensor:
    return torch.randint(0, 256, (2, 4, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def normalise(video: Tensor) -> Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (video / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def test_features_are_those_of_the_saved_encoder(weights: Path, video: Tensor) -> None:
    features = stm.load(weights)(video)
    with torch.no_grad():
        expected = zoo.load_encoder(weights)(video)
    assert torch.equal(features.tokens, expected) and features.tokens.shape == (2, 8, 128)
    assert torch.equal(features.pooled, expected.mean(1)) and not features.pooled.requires_grad


def test_uint8_clips_are_normalised_as_imagenet(weights: Path, video: Tensor) -> None:
    """The first token's embedding, by hand: its pixels, normalised, times the embedding's weights."""
    encoder = stm.load(weights)
    pixels = normalise(video)[0, :2, :, :16, :16]
    embedding = encoder.model.embedding.projection
    with torch.no_grad():
        first = encoder.model.embedding(video, torch.tensor([[0], [0]]))[0, 0]
        # The weights are ordered colour, frame, row, column, as a 3-D convolution's.
        expected = embedding.weight @ pixels.permute(1, 0, 2, 3).flatten() + embedding.bias
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(encoder(video / 255).pooled, encoder(video).pooled)


@pytest.mark.parametrize("format", ["official", "transformers", "stm"])
def test_all_formats_load_alike(weights: Path, video: Tensor, tmp_path: Path, format: zoo.Format) -> None:
    target = tmp_path / ("weights.pth" if format == "official" else "converted")
    zoo.convert(weights, target, format)
    shape = {"frames": 4, "image_size": 32}  # a .pth does not contain them
    torch.testing.assert_close(stm.load(target, **shape)(video).tokens, stm.load(weights)(video).tokens)


def test_the_folder_of_a_run_is_its_weights(weights: Path, video: Tensor) -> None:
    assert torch.equal(stm.load(str(weights.parent))(video).pooled, stm.load(weights)(video).pooled)


def test_kept_tokens_alone_are_encoded(weights: Path, video: Tensor) -> None:
    kept = torch.tensor([[0, 3, 5], [1, 2, 7]])
    with torch.no_grad():
        expected = zoo.load_encoder(weights)(video, kept)
    assert torch.equal(stm.load(weights)(video, kept).tokens, expected)


def test_shards_open_with_the_sizes_of_the_encoder(weights: Path, results: Path) -> None:
    encoder = stm.load(weights)
    assert encoder.geometry == {"frames": 4, "image_size": 32, "patch_size": 16, "tubelet": 2}
    assert encoder(stm.open_shards(results, **encoder.geometry).batch(2)["video"]).pooled.shape == (2, 128)


def test_clips_of_other_sizes_are_cut_as_the_dataset_cuts_them(weights: Path, results: Path) -> None:
    """Whole frames of 40 x 32 pixels give the clips of the dataset, whose crop is enlarged by OpenCV, to one grey level."""
    encoder = stm.load(weights, image_size=64)
    data = stm.open_shards(results, frames=4, image_size=64, patch_size=16)
    dataset: ClipDataset = data.dataset
    window = dataset.samples.windows(dataset.index[0], 0)[0].tolist()
    frames = [frame.copy() for _, frame in dataset._reader.frames(dataset.index[0], window)]
    whole = torch.stack([torch.from_numpy(frame) for frame in frames]).permute(0, 3, 1, 2)[None]
    assert whole.shape == (1, 4, 3, 32, 40)
    cut = encoder._prepare(whole)
    assert (cut.int() - data.batch(1)["video"].int()).abs().max() <= 1
    assert torch.equal(encoder(whole).pooled, encoder(cut).pooled)


def test_other_clip_lengths_and_sizes_get_their_positions(weights: Path) -> None:
    video = torch.zeros(1, 8, 3, 64, 64, dtype=torch.uint8)
    encoder = stm.load(weights, frames=8, image_size=64)
    assert encoder(video).tokens.shape == (1, 4 * 16, 128)
    with pytest.raises(WeightsError, match="frames=5 is not a positive multiple of 2"):
        stm.load(weights, frames=5)


def test_a_classifier_gives_probabilities_with_class_names(video: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(2)
    head = Head(VideoEncoder(zoo.describe(make_run())), 3).eval()
    torch.nn.init.normal_(head.head.weight)
    zoo.save(head, tmp_path / "classifier.safetensors", labels=["red", "green", "blue"])
    classifier = stm.load(tmp_path)  # the folder of a fine-tuning
    assert isinstance(classifier, Classifier) and classifier.labels == ("red", "green", "blue")
    with torch.no_grad():
        logits = head.classify(video)
        tokens = head.encoder(video, final_norm=False)
    torch.testing.assert_close(classifier.probabilities(video), logits.exp() / logits.exp().sum(1, keepdim=True))
    features = classifier(video)
    assert torch.equal(features.tokens, tokens)
    pooled = layer_norm(tokens.mean(1), (128,), head.fc_norm.weight, head.fc_norm.bias, head.fc_norm.eps)
    torch.testing.assert_close(features.pooled, pooled)
    torch.testing.assert_close(features.pooled @ head.head.weight.T + head.head.bias, logits)
    assert "Classifier(tiny: width 128, 4 blocks, 4 heads; 3 classes; clips of 4 frames" in repr(classifier)


def test_repr_says_architecture_and_source(weights: Path) -> None:
    expected = "clips of 4 frames of 32 x 32 pixels, 8 tokens of 2 x 16 x 16"
    assert repr(stm.load(weights)) == f"Encoder(tiny: width 128, 4 blocks, 4 heads; {expected}; from {weights})"


def test_an_encoder_is_a_module_in_eval_mode_with_a_network_to_train(weights: Path, video: Tensor) -> None:
    encoder = stm.load(weights)
    assert not encoder.training and isinstance(encoder.model, VideoEncoder) and not isinstance(encoder.model, VideoMAE)
    moved = encoder.to(torch.float64)
    assert moved is encoder and encoder(video).pooled.shape == (2, 128)
    encoder.model(video).sum().backward()
    assert encoder.model.norm.weight.grad is not None


def test_clips_and_weights_that_do_not_fit_are_explained(weights: Path, video: Tensor, tmp_path: Path) -> None:
    encoder = stm.load(weights)
    for clips, kept, message in (
        (video[0], None, r"\[B, T, 3, H, W\], such as a batch's \"video\"; got \[4, 3, 32, 32\]"),
        (video[:, :2], None, r"takes clips of 4 frames, and these have 2; open shards with \*\*encoder.geometry"),
        (video[..., :16] / 255, None, "only uint8 clips are resized here"),
        (video[..., :16], torch.zeros(2, 1, dtype=torch.int64), "kept tokens belong to clips of 32 x 32"),
        (video.int(), None, "torch.int32 of 32 x 32"),
        (video.float(), None, r"float clips must be in \[0, 1\]"),
        (video, torch.zeros(1, 1, dtype=torch.int64), r"int64 \[1, 1\] is not a mask of this batch"),
    ):
        with pytest.raises(ValueError, match=message):
            encoder(clips, kept)
    with pytest.raises(ValueError, match="got dict"):
        encoder({"video": video})
    with pytest.raises(WeightsError, match="frames=0 is not a positive multiple"):
        stm.load(weights, frames=0)
    with pytest.raises(WeightsError, match="there is no such file"):
        stm.load(tmp_path / "nothing.safetensors")
