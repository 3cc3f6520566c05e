"""Pretraining with text from shards to weights: the same bytes twice, and after a stop; what is saved can be loaded."""

import json

import pytest
import torch
from language_runs import make_run, make_small_bert
from training_shards import make_shard

from stm.models.video_language import load_video_language
from stm.models.weights import zoo
from stm.storage.files import read_json
from stm.training.batches import feed_media
from stm.training.pretraining import open_media, pretrain


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language")
    clips = make_shard(folder / "train" / "train-00000.parquet", ["red", "blue"] * 5)
    stills = make_shard(folder / "stills" / "stills-00000.parquet", ["red", "blue"] * 4, prefix="still")
    return folder, [clips], [stills], make_small_bert(folder / "bert")


def run_of(method: str, bert: str):
    images = {"datasets": ["stills"], "batch_size": 4, "mask": {"strategy": "attention", "ratio": 0.5}}
    return make_run(method, bert, image_size=32, patch_size=8, images=images, checkpoint_every=3)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["umt", "stm"])
def test_a_stopped_run_ends_in_the_same_bytes(method, world, tmp_path, monkeypatch):
    _, clips, stills, bert = world
    run = run_of(method, bert)
    pretrain(run, clips, tmp_path / "whole", 0, "cpu", stills)

    class Stopped(Exception):
        pass

    def stopping(*arguments):
        def read(step):
            for number, batch in enumerate(feed_media(*arguments)(step)):
                if number == 5:
                    raise Stopped
                yield batch

        return read

    with monkeypatch.context() as patch:
        patch.setattr("stm.training.pretraining.feed_media", stopping)
        with pytest.raises(Stopped):
            pretrain(run, clips, tmp_path / "stopped", 0, "cpu", stills)
    assert list((tmp_path / "stopped" / "checkpoints").glob("step-*.pt"))
    pretrain(run, clips, tmp_path / "stopped", 0, "cpu", stills)
    names = ("weights.safetensors", "config.json")
    assert all((tmp_path / "whole" / n).read_bytes() == (tmp_path / "stopped" / n).read_bytes() for n in names)


@pytest.mark.slow
def test_what_is_saved_is_the_model_with_its_text_side(world, tmp_path):
    _, clips, stills, bert = world
    pretrain(run_of("umt", bert), clips, tmp_path, 0, "cpu", stills)
    model = load_video_language(tmp_path / "weights.safetensors")
    encoder = zoo.load_encoder(tmp_path / "weights.safetensors").eval()
    video = torch.randint(0, 256, (2, 4, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(model.encoder(video), encoder(video))
        tokens = model.language.tokenizer.encode(["a red circle", "a blue star"], 8)
        assert model.match(model.encode_text(tokens), tokens, model.encoder(video)).shape == (2, 2)
    record = read_json(tmp_path / "config.json")
    assert record["run"]["method"] == "umt" and set(record["receipt"]["data"]) == {"train-00000", "stills-00000"}


@pytest.mark.slow
def test_clips_and_images_are_resized_on_the_device(world, tmp_path):
    _, clips, stills, bert = world
    run = run_of("umt", bert)
    for where in ("loader", "device"):
        run = run.model_copy(update={"resize_on": where})
        samples = [medium.dataset[0][0] for medium in open_media(run, clips, stills, 0)]
        assert ["video" in sample for sample in samples] == [where == "loader"] * 2
        pretrain(run, clips, tmp_path / where, 0, "cpu", stills)
    logs = [(tmp_path / where / "metrics.jsonl").read_text().splitlines() for where in ("loader", "device")]
    first, last = (json.loads(lines[-1]) for lines in logs)
    assert first["step"] == last["step"] and first["loss"] == pytest.approx(last["loss"], rel=0.02)


def test_clips_without_captions_are_refused_before_training(world, tmp_path):
    _, _, stills, bert = world
    mute = make_shard(tmp_path / "train" / "train-00000.parquet", ["red"] * 6, without_captions=(1, 2))
    with pytest.raises(ValueError, match="2 of 6 clips have no caption"):
        pretrain(run_of("umt", bert), [mute], tmp_path / "out", 0, "cpu", stills)
