"""`stm convert`."""

from pathlib import Path

import pytest
import torch

from stm.cli import main
from stm.models.vit import Architecture, VideoEncoder, VideoMAE
from stm.models.weights import zoo

SMALL = Architecture(32, 8, 2, 4, width=48, depth=1, heads=3, decoder_width=24, decoder_depth=1, decoder_heads=2)


@pytest.mark.parametrize("to", ["stm", "transformers", "timm", "videomae"])
def test_weights_become_a_folder_of_each_format(tmp_path, capsys, to):
    model = VideoMAE(SMALL)
    zoo.save(model, tmp_path / "a.safetensors")
    target = str(tmp_path / "out")
    assert (
        main(["convert", str(tmp_path / "a.safetensors"), target, "--to", to, "--encoder-only", "--license", "mit"])
        == 0
    )
    assert capsys.readouterr().out == f"{target}\n"
    weights = zoo.read(target)
    assert weights.kind == "encoder"
    assert torch.equal(weights.tensors["encoder.norm.weight"], model.encoder.norm.weight)
    assert "license: mit\n" in (tmp_path / "out/README.md").read_text()


def test_the_former_option_still_works_and_says_the_new_one(tmp_path, capsys):
    zoo.save(VideoMAE(SMALL), tmp_path / "a.safetensors")
    assert main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "b.pth"), "--format", "official"]) == 0
    assert "--format official is now --to videomae" in capsys.readouterr().err
    assert zoo.read(tmp_path / "b.pth").kind == "pretraining"


def test_what_cannot_be_converted_is_one_message(tmp_path, capsys):
    zoo.save(VideoEncoder(SMALL), tmp_path / "a.safetensors", extra={"language": {"w": torch.ones(1)}})
    assert main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "out"), "--to", "transformers"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("stm convert: ") and "--encoder-only" in line and "a.safetensors" in line
    assert main(["convert", "absent.safetensors", str(tmp_path / "out")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_a_mistyped_path_is_not_looked_up_on_the_hub(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "results/run/pretrain/a", str(Path("out"))]) == 2
    assert "results/run/pretrain/a" in capsys.readouterr().err and not Path("out").exists()
