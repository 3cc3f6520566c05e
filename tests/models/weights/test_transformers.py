"""Folders of transformers: its own three models compute what ours do, both ways."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_parts import TINY, Head, disturb, double, draw, numbers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import avg_pool2d

from stm.models.vit import VideoEncoder, VideoMAE
from stm.models.weights import zoo
from stm.models.weights.export import FILES
from stm.models.weights.transformers import read_transformers
from stm.pretrained.hub import ModelSource
from stm.tubelets import IMAGENET_MEAN, IMAGENET_STD

CLEAN: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}


def open_peer(name: str, folder: Path) -> nn.Module:
    """transformers' model from the folder, which must fit it to the last key."""
    import transformers

    peer, report = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert {key: set(report[key]) for key in CLEAN} == CLEAN
    return peer.double().eval()


def export(model: nn.Module, folder: Path, **options: Any) -> Path:
    zoo.save(model, folder / "weights.safetensors")
    return zoo.convert(folder / "weights.safetensors", folder / "peer", "transformers", **options)


def check_pretraining(model: VideoMAE, peer: nn.Module) -> None:
    video, clip, masked = draw(model.architecture)
    found = model.double()(video.double() / 255, numbers(~masked), numbers(masked))
    logits = peer(clip.transpose(1, 2), masked).logits
    torch.testing.assert_close(found, logits, rtol=1e-5, atol=2e-6)


def test_a_pretraining_model_goes_out_and_computes_the_same(tmp_path: Path) -> None:
    model = disturb(VideoMAE(TINY))
    peer = open_peer("VideoMAEForPreTraining", export(model, tmp_path))
    peer.decoder.norm.eps = TINY.decoder_norm_eps  # fixed at 1e-5 in transformers' code
    check_pretraining(model, peer)


def test_the_epsilon_that_transformers_fixes_changes_little(tmp_path: Path) -> None:
    model = disturb(VideoMAE(TINY))
    peer = open_peer("VideoMAEForPreTraining", export(model, tmp_path))
    video, clip, masked = draw(TINY)
    found = model.double()(video.double() / 255, numbers(~masked), numbers(masked))
    logits = peer(clip.transpose(1, 2), masked).logits
    assert (found - logits).abs().max() < 1e-4 * logits.abs().max()


def test_an_encoder_goes_out_alone_and_computes_the_same(tmp_path: Path) -> None:
    model = disturb(VideoMAE(TINY))
    peer = open_peer("VideoMAEModel", export(model, tmp_path, encoder_only=True))
    video, clip, masked = draw(TINY)
    encoder = model.encoder.double()
    for kept, mask in [(None, None), (numbers(~masked), masked)]:
        expected = peer(clip.transpose(1, 2), mask).last_hidden_state
        torch.testing.assert_close(encoder(video.double() / 255, kept), expected, rtol=1e-5, atol=2e-6)


def test_a_classifier_goes_out_with_its_labels_and_computes_the_same(tmp_path: Path) -> None:
    model = disturb(Head(VideoEncoder(TINY), 3))
    zoo.save(model, tmp_path / "a.safetensors", labels=["run", "jump", "sit"])
    peer = open_peer(
        "VideoMAEForVideoClassification", zoo.convert(tmp_path / "a.safetensors", tmp_path / "peer", "transformers")
    )
    assert peer.config.id2label == {0: "run", 1: "jump", 2: "sit"}
    peer.fc_norm.eps = TINY.norm_eps  # fixed at 1e-5 in transformers' code
    video, clip, _ = draw(TINY)
    found = model.double()(video.double() / 255)
    torch.testing.assert_close(found, peer(clip.transpose(1, 2)).logits, rtol=1e-5, atol=2e-6)


@pytest.mark.slow
def test_a_model_of_base_s_size_computes_the_same(tmp_path: Path) -> None:
    from stm.config import PretrainRun

    torch.manual_seed(0)
    model = zoo.build(PretrainRun(model="base")).eval()
    peer = open_peer("VideoMAEForPreTraining", export(model, tmp_path)).float()
    peer.decoder.norm.eps = 1e-6
    video, clip, masked = draw(model.architecture, batch=1, visible=160)
    with torch.inference_mode():
        found = model(video, numbers(~masked), numbers(masked))
        expected = peer(clip.float().transpose(1, 2), masked).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["VideoMAEForPreTraining", "VideoMAEModel", "VideoMAEForVideoClassification"])
def test_models_that_transformers_saved_come_in_and_go_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    import transformers

    values = zoo.transformers_config(TINY) | {"layer_norm_eps": 1e-12, "num_labels": 5}
    values["use_mean_pooling"] = name == "VideoMAEForVideoClassification"
    peer = disturb(getattr(transformers, name)(transformers.VideoMAEConfig(**values)))
    peer.save_pretrained(tmp_path / "theirs")
    loaded = zoo.load_any(tmp_path / "theirs")
    assert loaded.architecture.norm_eps == 1e-12 and loaded.architecture.heads == TINY.heads
    assert isinstance(loaded, VideoMAE) == (name == "VideoMAEForPreTraining")
    if isinstance(loaded, VideoMAE):
        check_pretraining(loaded.eval(), peer.double())
    zoo.convert(tmp_path / "theirs", tmp_path / "a.safetensors", "stm")
    zoo.convert(tmp_path / "a.safetensors", tmp_path / "back", "transformers")
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "back"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


def test_both_names_of_biases_are_read(tmp_path: Path) -> None:
    model = disturb(VideoMAE(TINY))
    folder = export(model, tmp_path)
    old = load_file(folder / "model.safetensors")
    new = {n.replace("q_bias", "query.bias").replace("v_bias", "value.bias"): t for n, t in old.items()}
    assert old.keys() != new.keys()
    for state in (old, new):
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        query, _, value = zoo.load_any(folder).encoder.blocks[0].attn.qkv.bias.chunk(3)
        assert torch.equal(query, model.encoder.blocks[0].attn.qkv.bias.chunk(3)[0])
        assert torch.equal(value, model.encoder.blocks[0].attn.qkv.bias.chunk(3)[2])


def test_a_folder_has_the_same_bytes_each_time(tmp_path: Path) -> None:
    model = disturb(VideoMAE(TINY))
    for name in ("a", "b"):
        export(model, tmp_path / name)
    files = {path.name for path in (tmp_path / "a/peer").iterdir()}
    assert files == FILES["transformers"]
    for file in files:
        assert (tmp_path / "a/peer" / file).read_bytes() == (tmp_path / "b/peer" / file).read_bytes()


@pytest.mark.parametrize("size", [(32, 32), (45, 32), (32, 57)])
def test_the_folder_s_processors_make_the_pixels_that_the_encoder_sees(tmp_path: Path, size: tuple[int, int]) -> None:
    """Frames whose shorter side is the image size: the centre crop, rescaled and normalised."""
    from transformers import AutoImageProcessor, AutoVideoProcessor, VideoMAEImageProcessor, VideoMAEVideoProcessor

    folder = export(VideoMAE(TINY), tmp_path)
    height, width = size
    video = torch.randint(0, 256, (4, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    top, left = (height - 32) // 2, (width - 32) // 2
    crop = video[:, :, top : top + 32, left : left + 32].double() / 255
    mean, deviation = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    expected = ((crop - mean) / deviation).float()[None]
    images, videos = (auto.from_pretrained(folder) for auto in (AutoImageProcessor, AutoVideoProcessor))
    assert isinstance(images, VideoMAEImageProcessor) and isinstance(videos, VideoMAEVideoProcessor)
    frames = [frame.permute(1, 2, 0).numpy() for frame in video]
    for pixels in (images(frames, return_tensors="pt"), videos(video, return_tensors="pt")):
        torch.testing.assert_close(pixels.pixel_values, expected, atol=1e-5, rtol=1e-5)


def test_the_video_processor_takes_whole_videos_if_asked(tmp_path: Path) -> None:
    from transformers import AutoVideoProcessor

    processor = AutoVideoProcessor.from_pretrained(export(VideoMAE(TINY), tmp_path))
    video = torch.arange(8, dtype=torch.uint8)[:, None, None, None].expand(8, 3, 32, 32)
    pixels = processor(video, do_sample_frames=True, return_tensors="pt").pixel_values
    assert pixels.shape == (1, TINY.frames, 3, 32, 32) and (pixels[0, :, 0, 0, 0].diff() > 0).all()


def test_a_frame_of_another_size_is_nearly_what_ours_is(tmp_path: Path) -> None:
    """transformers resizes with an antialiased linear filter, stm by averaging areas: they agree on smooth frames."""
    from transformers import AutoVideoProcessor

    rows, columns = torch.meshgrid(torch.arange(96.0), torch.arange(128.0), indexing="ij")
    waves = (110 * ((rows / 17).sin() * (columns / 23).cos()) + 128).to(torch.uint8).expand(4, 3, -1, -1)
    pixels = AutoVideoProcessor.from_pretrained(export(VideoMAE(TINY), tmp_path))(
        waves, return_tensors="pt"
    ).pixel_values
    deviation, mean = (torch.tensor(v)[:, None, None] for v in (IMAGENET_STD, IMAGENET_MEAN))
    averaged = avg_pool2d(waves[..., 16:112].float(), 3)
    assert ((pixels[0] * deviation + mean) * 255 - averaged).abs().mean() < 1.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_mean_pooling": True}, "use_mean_pooling True instead of False"),
        ({"hidden_act": "relu"}, "hidden_act relu instead of gelu"),
        ({"qv_bias": False}, "qv_bias False instead of True"),
        ({"architectures": ["VideoMAEForSomething"]}, "a VideoMAEForSomething; stm reads VideoMAEForPreTraining"),
        ({"model_type": "vit"}, "of type vit, not videomae"),
        ({"num_hidden_layers": 3}, "3 missing|16 missing|missing: .*layer.2"),
        ({"patch_size": 16}, "of the wrong shape"),
        ({"num_hidden_layers": "many"}, "cannot be loaded"),
        ({"num_frames": 10**9}, "tokens per clip; the most is|frames 1000000000"),
    ],
)
def test_folders_of_another_network_are_errors_that_say_so(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = export(VideoMAE(TINY), tmp_path)
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(zoo.WeightsError, match=rf"{folder}.*({message})"):
        zoo.load_any(folder)


def test_a_torn_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    folder = export(VideoMAE(TINY), tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(zoo.WeightsError, match=rf"{folder}.*cannot be loaded"):
        zoo.load_any(folder)


def test_only_a_text_that_can_be_no_path_reaches_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def pretend(source: ModelSource) -> Any:
        asked.append(source.name)
        return read_transformers(ModelSource(source.name, folder))

    folder = export(VideoMAE(TINY), tmp_path)
    monkeypatch.setattr(zoo, "read_transformers", pretend)
    assert isinstance(zoo.load_any("owner/name"), VideoMAE)
    for path in ("results/weights.safetensors", "b.pth", "./owner/name", Path("owner/name"), "a/b/c"):
        with pytest.raises(zoo.WeightsError, match="no such"):
            zoo.load_any(path)
    assert asked == ["owner/name"]


def test_shards_come_from_the_folder_and_hold_weights_alone(tmp_path: Path) -> None:
    """No message passes on a library's advice to run a file's code."""
    folder = export(VideoMAE(TINY), tmp_path)
    (folder / "model.safetensors").rename(tmp_path / "all.safetensors")
    names = load_file(tmp_path / "all.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../all.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(zoo.WeightsError, match=r"names '\.\./all\.safetensors', which is not a file of this folder"):
        zoo.read(folder)
    index["weight_map"] = dict.fromkeys(names, "all.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "all.safetensors").rename(folder / "all.safetensors")
    assert zoo.read(folder).kind == "pretraining"
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    torch.save({"mask_token": print}, folder / "pytorch_model.bin")
    with pytest.raises(zoo.WeightsError, match="so stm refuses to") as caught:
        zoo.read(folder)
    assert "weights_only" not in str(caught.value)


def test_transformers_format_needs_a_folder(tmp_path: Path) -> None:
    zoo.save(VideoMAE(TINY), tmp_path / "a.safetensors")
    with pytest.raises(zoo.WeightsError, match=r"a\.safetensors: is a file, but the format transformers is a folder"):
        zoo.convert(tmp_path / "a.safetensors", tmp_path / "a.safetensors", "transformers")


def test_the_official_file_and_the_folder_are_one_network(tmp_path: Path) -> None:
    import official_peer

    state = official_peer.pretraining_state(48, 2, 24, 1, patch=8)
    torch.save({"model": state}, tmp_path / "a.pth")
    peer = open_peer("VideoMAEForPreTraining", zoo.convert(tmp_path / "a.pth", tmp_path / "peer", "transformers", TINY))
    peer.decoder.norm.eps = 1e-6
    _, clip, masked = draw(TINY)
    expected = official_peer.reconstruct(clip, masked, double(state), 3, 2)
    torch.testing.assert_close(peer(clip.transpose(1, 2), masked).logits, expected, rtol=1e-5, atol=2e-6)
