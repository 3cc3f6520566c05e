"""Exported folders: their cards, what is left out of them, and that their code runs as it stands."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pytest
import torch
import yaml
from model_parts import TINY, Head, disturb, draw
from torch import nn

import stm
from stm.config import PretrainRun, parse_config
from stm.models.vit import VideoEncoder, VideoMAE
from stm.models.weights import zoo
from stm.models.weights.card import Format
from stm.models.weights.export import FILES, export
from stm.storage.files import read_json, sha256_file, write_json
from stm.storage.tables import write_table

ROOT = Path(__file__).parents[3]
FORMATS = ("stm", "videomae", "transformers", "timm")
SETTINGS = {
    "method": "mae",
    "mask": {"strategy": "/home/someone/masks/rows.py:top_rows", "ratio": 0.75},
    "reconstruction": {"target": "normalised", "weight": 1.0},
    "contrast": {"weight": 0.5},
    "teacher": {"model": "local-dir:/home/someone/models/clip"},
    "init": None,
    "release": None,
    "split": "train",
    "precision": "bf16",
    "optimisation": {"epochs": 12, "batch_size": 64},
}


def make_run(
    root: Path, model: nn.Module, dataset: str = "moving-shapes", init: str | None = None, **extra: Any
) -> Path:
    """The weights of a run, with all that lies beside them, of which one evaluation is of other weights."""
    weights = root / "pretrain/mine/weights.safetensors"
    zoo.save(model, weights, **extra)
    receipt = {
        "settings": SETTINGS | {"init": init},
        "step": 345,
        "seed": 8,
        "versions": {"stm": "0.1.0", "torch": "2.13.0"},
    }
    write_json(weights.with_name("config.json"), {"receipt": receipt, "run": {"init": "/home/someone"}})
    slices = {"train-00000": {"clips": 1000, "split": "train"}, "train-00001": {"clips": 234, "split": "train"}}
    write_json(root / "slices.json", {"shards": slices | {"test-00000": {"clips": 7, "split": "test"}}})
    write_table(root / "manifest.parquet", pa.table({"key": ["a"]}), {"settings": {"dataset": {"source": dataset}}})
    headline = {"label": "top-1", "scale": 100.0, "unit": "%", "chance": 0.1, "interval": [0.25, 0.5]}
    for task, value, of in [("linear", 0.3456, sha256_file(weights)), ("old", 0.999, "of other weights")]:
        metrics = {"task": "linear", "headline": headline | {"value": value}, "receipt": {"weights": of}}
        write_json(root / f"evaluate/mine/{task}/metrics.json", metrics)
    return weights


def read_card(folder: Path) -> tuple[dict[str, Any], str]:
    _, front, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


def python_blocks(folder: Path) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", read_card(folder)[1], flags=re.DOTALL))


@pytest.mark.parametrize("format", FORMATS)
def test_a_card_tells_how_the_weights_were_made_and_how_good_they_are(tmp_path: Path, format: str) -> None:
    weights = make_run(tmp_path / "results/shapes", VideoMAE(TINY))
    folder = zoo.convert(weights, tmp_path / "my-model", format, license="cc-by-nc-4.0")
    front, text = read_card(folder)
    assert {path.name for path in folder.iterdir()} == FILES[format]
    assert front == {
        "license": "cc-by-nc-4.0",
        "library_name": format,
        "pipeline_tag": "feature-extraction",
        "tags": ["video", "videomae", "stm", "mae"],
        "datasets": ["moving-shapes"],
        "metrics": ["accuracy"],
    }
    for row in [
        "Pretraining data | `moving-shapes` (generated), split `train`, 1,234 clips",
        "Mask | `rows.py:top_rows`, ratio 0.75",
        "Objectives | reconstruction of normalised pixels (weight 1); masked video-text contrast (weight 0.5)",
        "Teacher | `local-dir:clip`",
        "Steps | 345",
        "Epochs | 12",
        "Batch | 64 clips",
        "Seed | 8",
        "Versions | stm 0.1.0, torch 2.13.0",
        "`linear` | linear | top-1 | 34.6 % | 25.0 % to 50.0 % | 10.0 %",
    ]:
        assert f"| {row} |\n" in text
    assert "99.9" not in text and "/home/someone" not in text
    assert "not for real videos" in text and "Pretrained on 1,234 clips only" in text
    assert f"version = {{{stm.__version__}}}" in text
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["title"] in text


@pytest.mark.parametrize("first", ["MCG-NJU/videomae-base", "/home/someone/weights/videomae/b.pth", "umt.pth"])
def test_weights_that_started_from_videomae_s_have_its_licence(tmp_path: Path, first: str) -> None:
    """Also through a run between, and after a conversion to stm's format, which keeps the record."""
    started = make_run(tmp_path / "results/first", VideoMAE(TINY), init=first)
    weights = make_run(tmp_path / "results/second", VideoMAE(TINY), init=str(started))
    own = zoo.convert(weights, tmp_path / "own", "stm")
    front, text = read_card(zoo.convert(own, tmp_path / "peer", "timm", encoder_only=True))
    theirs = "videomae" in first
    assert front["license"] == ("cc-by-nc-4.0" if theirs else "unknown")
    assert ("which are licensed CC BY-NC 4.0, not for commercial use" in text) is theirs
    assert ("The licence of `umt.pth`" in text) is not theirs and "/home/someone" not in text
    assert read_json(tmp_path / "peer/config.json")["pretrained_cfg"].get("license") == (
        "cc-by-nc-4.0" if theirs else None
    )
    given, text = read_card(zoo.convert(weights, tmp_path / "given", "timm", license="apache-2.0"))
    assert given["license"] == "apache-2.0" and ("given as apache-2.0, but VideoMAE's" in text) is theirs


def test_a_half_precision_file_with_shared_tensors_is_exported(tmp_path: Path) -> None:
    state = {name: tensor.bfloat16() for name, tensor in disturb(VideoMAE(TINY)).state_dict().items()}
    zoo.save(VideoMAE(TINY), tmp_path / "a.safetensors")
    weights = replace(zoo.read(tmp_path / "a.safetensors"), tensors=state)
    state["encoder.norm.bias"] = state["encoder.norm.weight"]
    for format in get_args(Format):
        assert export(weights, "elsewhere", tmp_path / format, format) is not None
        read = zoo.read(tmp_path / format).tensors
        assert {tensor.dtype for tensor in read.values()} == {torch.float32}
        torch.testing.assert_close(read["encoder.norm.bias"], state["encoder.norm.weight"].float(), rtol=0, atol=0)


def test_an_export_over_another_leaves_nothing_of_it(tmp_path: Path) -> None:
    zoo.convert(make_run(tmp_path / "results/shapes", VideoMAE(TINY)), tmp_path / "peer", "stm")
    zoo.save(VideoMAE(TINY), tmp_path / "found.safetensors")
    zoo.convert(tmp_path / "found.safetensors", tmp_path / "peer", "stm")
    assert "| Mask | unknown |" in read_card(zoo.convert(tmp_path / "peer", tmp_path / "timm", "timm"))[1]
    record = {"receipt": {"settings": {"objectives": {"matching": "much"}}}, "clips": "many", "dataset": [1]}
    write_json(tmp_path / "peer/config.json", record)
    assert "Pretraining data | unknown" in read_card(zoo.convert(tmp_path / "peer", tmp_path / "timm", "timm"))[1]


def test_a_card_says_what_is_unknown(tmp_path: Path) -> None:
    zoo.save(VideoEncoder(TINY), tmp_path / "found.safetensors")
    front, text = read_card(zoo.convert(tmp_path / "found.safetensors", tmp_path / "peer", "transformers"))
    assert front["license"] == "unknown" and "datasets" not in front and "metrics" not in front
    for row in (
        "Licence of the weights",
        "Pretraining data",
        "Mask",
        "Objectives",
        "Teacher",
        "Initialised from",
        "Steps and batch",
    ):
        assert f"| {row} | unknown |\n" in text
    assert "found beside them: unknown" in text and "converted from `found.safetensors`" in text


def test_a_classifier_s_card_has_its_own_number_and_the_run_s_training(tmp_path: Path) -> None:
    run = make_run(tmp_path / "results/shapes", VideoMAE(TINY))
    folder = tmp_path / "results/shapes/evaluate/mine/actions"
    zoo.save(Head(VideoEncoder(TINY), 2), folder / "classifier.safetensors", labels=["run", "a|\nb"])
    headline = {"label": "top-1", "scale": 100.0, "unit": "%", "value": 0.5, "chance": None, "interval": None}
    settings = {"optimisation": {"epochs": 3, "batch_size": 16}}
    metrics = {"task": "finetune", "headline": headline, "settings": settings, "receipt": {"weights": sha256_file(run)}}
    write_json(folder / "metrics.json", metrics)
    front, text = read_card(zoo.convert(folder / "classifier.safetensors", tmp_path / "peer", "timm"))
    assert front["pipeline_tag"] == "video-classification"
    assert "| Classes | run, a\\| b |\n" in text and "| Steps | 345 |\n" in text
    assert "| Fine-tuning | on the classes below, epochs: 3, batch: 16 clips |\n" in text
    assert "| `actions` | finetune | top-1 | 50.0 % | - | - |\n" in text and "linear" not in text
    zoo.save(disturb(VideoMAE(TINY)), run)  # trained again since, so that the classifier is of other weights
    text = read_card(zoo.convert(folder / "classifier.safetensors", tmp_path / "peer", "timm"))[1]
    assert (
        "345" not in text
        and "| Pretraining data | unknown |\n" in text
        and "| Fine-tuning | on the classes below, epochs: 3" in text
    )


def test_the_hub_s_library_reads_the_card(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    folder = zoo.convert(make_run(tmp_path / "results/shapes", VideoMAE(TINY)), tmp_path / "peer", "transformers")
    data = ModelCard.load(folder / "README.md").data
    assert (data.license, data.library_name, data.pipeline_tag) == ("unknown", "transformers", "feature-extraction")
    assert data.datasets == ["moving-shapes"] and data.metrics == ["accuracy"]


@pytest.mark.parametrize(
    ("change", "data", "row"),
    [
        (
            {"release": "/home/someone/vit_b.pth"},
            "unknown",
            "Training | none here: published weights, taken from `vit_b.pth`",
        ),
        ({"optimisation": {"epochs": 0}}, "none here", "Training | none here: 0 epochs"),
    ],
)
def test_weights_that_were_not_trained_do_not_claim_the_dataset(
    tmp_path: Path, change: dict[str, Any], data: str, row: str
) -> None:
    weights = make_run(tmp_path / "results/shapes", VideoEncoder(TINY))
    record = read_json(weights.with_name("config.json"))
    record["receipt"]["settings"] |= change
    write_json(weights.with_name("config.json"), record)
    front, text = read_card(zoo.convert(weights, tmp_path / "peer", "timm"))
    assert f"| Pretraining data | {data} |\n" in text and f"| {row} |\n" in text
    assert "datasets" not in front and "moving-shapes" not in text and "1,234" not in text


@pytest.mark.parametrize(
    ("model", "shown"),
    [
        ("ViT-B-16-quickgelu@openai", "ViT-B-16-quickgelu@openai"),
        ("local-dir:/home/someone/clip", "local-dir:clip"),
        ("clip:ViT-B-16@/home/someone/b16.pt", "clip:ViT-B-16@b16.pt"),
        ("local-dir:models/clip", "local-dir:clip"),
        ("~/weights/b16.pth", "b16.pth"),
        ("owner/model-v1.5", "owner/model-v1.5"),
        ("clip:hf-hub:owner/model", "clip:hf-hub:owner/model"),
    ],
)
def test_a_card_names_models_without_the_folders_of_this_machine(tmp_path: Path, model: str, shown: str) -> None:
    weights = make_run(tmp_path / "results/shapes", VideoEncoder(TINY))
    record = read_json(weights.with_name("config.json"))
    record["receipt"]["settings"]["init"] = model
    write_json(weights.with_name("config.json"), record)
    text = read_card(zoo.convert(weights, tmp_path / "peer", "timm"))[1]
    assert f"| Initialised from | `{shown}` |\n" in text


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", ["pretraining", "classifier"])
def test_the_card_s_code_runs_and_computes_what_the_model_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, kind: str
) -> None:
    model = disturb(VideoMAE(TINY) if kind == "pretraining" else Head(VideoEncoder(TINY), 3))
    zoo.save(model, tmp_path / "a.safetensors")
    folder = zoo.convert(tmp_path / "a.safetensors", tmp_path / "my-model", format)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(python_blocks(folder), names)
    video = torch.zeros(1, 4, 3, 32, 32, dtype=torch.uint8)
    encoder = zoo.load_encoder(tmp_path / "a.safetensors").eval()
    if "probabilities" in names:
        expected = model(video).softmax(dim=-1)
        torch.testing.assert_close(names["probabilities"], expected, rtol=1e-4, atol=1e-4)
    else:
        torch.testing.assert_close(names["features"], encoder.forward_features(video), rtol=1e-4, atol=1e-4)
    if "classifier" in names:
        kept = [
            p
            for n, p in names["classifier"].named_parameters()
            if n.endswith("1.mlp.fc2.weight") or "layer.1.output" in n
        ]
        assert any(torch.equal(p, encoder.get_parameter("blocks.1.mlp.fc2.weight")) for p in kept)
        assert [p.shape[0] for p in names["classifier"].parameters()][-1] == 10


def test_the_card_s_config_is_of_the_exported_architecture(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"image_size": 32, "patch_size": 4, "tubelet": 4, "frames": 8, "position_period": 50.0}
    architecture = zoo.describe(PretrainRun(model="tiny", positions="separable", **keys))
    zoo.save(VideoEncoder(architecture), tmp_path / "a.safetensors")
    text = read_card(zoo.convert(tmp_path / "a.safetensors", tmp_path / "peer", "stm"))[1]
    (block,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    run = parse_config(yaml.safe_load(block), "the card").runs["given"]
    assert zoo.describe(run) == architecture and run.init == "peer" and run.optimisation.epochs == 0


def test_folders_load_where_stm_is_not_installed(tmp_path: Path) -> None:
    """transformers and timm in a process that cannot import stm compute our features, from a clip's pixels."""
    model = disturb(VideoMAE(TINY))
    zoo.save(model, tmp_path / "a.safetensors")
    video, _, _ = draw(TINY, batch=1)
    torch.save(video[0], tmp_path / "frames.pt")
    code = "import sys\nsys.modules['stm'] = None\n"
    for format in ("transformers", "timm"):
        folder = zoo.convert(tmp_path / "a.safetensors", tmp_path / f"to-{format}", format, encoder_only=True)
        block = re.sub(r"torch\.zeros\(.*?dtype=torch\.uint8\)", "torch.load('frames.pt')", python_blocks(folder))
        code += f"{block}\ntorch.save(features, '{format}.pt')\n"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    expected = model.encoder.forward_features(video)
    for format in ("transformers", "timm"):
        torch.testing.assert_close(torch.load(tmp_path / f"{format}.pt"), expected, rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------------------------------
# what is left out, and what is refused

PARTS: dict[str, Any] = {
    "extra": {"language": {"w": torch.ones(2)}, "branch": {"b": torch.zeros(1)}},
    "header": {"language": {"vocab": 3}},
}


def test_stm_s_own_format_keeps_the_modules_saved_with_a_model(tmp_path: Path) -> None:
    weights = make_run(tmp_path / "results/shapes", VideoEncoder(TINY), **PARTS)
    folder = zoo.convert(weights, tmp_path / "copy", "stm")
    assert (folder / "weights.safetensors").read_bytes() == weights.read_bytes()
    tensors, about = zoo.load_extra(folder / "weights.safetensors", "language")
    assert torch.equal(tensors["w"], torch.ones(2)) and about == {"vocab": 3}
    # The copy knows how it was made, and so does the card of what is converted from it.
    text = read_card(zoo.convert(folder, tmp_path / "peer", "timm", encoder_only=True))[1]
    assert "| Steps | 345 |\n" in text and "`moving-shapes` (generated), split `train`, 1,234 clips" in text
    assert "/home/someone" not in (folder / "config.json").read_text()
    (tmp_path / "snapshot").mkdir()
    for file in folder.iterdir():  # as in the hub's cache
        (tmp_path / "snapshot" / file.name).symlink_to(file.rename(tmp_path / f"blob-{file.name}"))
    again = zoo.convert(tmp_path / "snapshot", tmp_path / "third", "stm")
    assert (again / "config.json").read_bytes() == (tmp_path / "blob-config.json").read_bytes()


@pytest.mark.parametrize("format", ["transformers", "timm", "videomae"])
def test_a_model_of_several_parts_is_exported_as_an_encoder_only_if_asked(
    tmp_path: Path, format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = disturb(VideoEncoder(TINY))
    zoo.save(model, tmp_path / "a.safetensors", **PARTS)
    with pytest.raises(
        zoo.WeightsError, match=r"a\.safetensors: has other parts .*\(branch, language\).*--encoder-only"
    ):
        zoo.convert(tmp_path / "a.safetensors", tmp_path / "peer", format)
    assert not (tmp_path / "peer").exists()
    folder = zoo.convert(tmp_path / "a.safetensors", tmp_path / "peer", format, encoder_only=True)
    note = "Left out, because of --encoder-only: branch, language"
    assert note in capsys.readouterr().err and note in read_card(folder)[1]
    video, _, _ = draw(TINY)
    torch.testing.assert_close(zoo.load_encoder(folder).eval()(video), model(video), rtol=1e-5, atol=1e-5)


def test_what_a_format_cannot_hold_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zoo.save(VideoMAE(TINY), tmp_path / "a.safetensors", extra={"contrast": {"w": torch.ones(2)}})
    zoo.convert(tmp_path / "a.safetensors", tmp_path / "b.pth", "videomae")
    assert "no place for them in the format videomae: contrast" in capsys.readouterr().err
    text = read_card(zoo.convert(tmp_path / "a.safetensors", tmp_path / "peer", "timm"))[1]
    said = capsys.readouterr().err
    for note in ("the decoder of the pretraining", "contrast"):
        assert note in said and note in text


@pytest.mark.parametrize("format", ["transformers", "videomae"])
def test_positions_that_a_format_cannot_compute_are_refused(tmp_path: Path, format: str) -> None:
    zoo.save(VideoMAE(replace(TINY, positions="separable")), tmp_path / "a.safetensors")
    with pytest.raises(zoo.WeightsError, match=r"separable positions.*Export to timm"):
        zoo.convert(tmp_path / "a.safetensors", tmp_path / "peer", format)
    assert not (tmp_path / "peer").exists()


def test_nothing_else_is_written_over_or_uploaded_with_the_weights(tmp_path: Path) -> None:
    weights = make_run(tmp_path / "results/shapes", VideoMAE(TINY))
    with pytest.raises(zoo.WeightsError, match="is the folder of the weights to convert"):
        zoo.convert(weights, weights.parent, "stm")
    (tmp_path / "peer").mkdir()
    (tmp_path / "peer/.gitattributes").touch()  # a clone of the hub's repository
    zoo.convert(weights, tmp_path / "peer", "timm")
    zoo.convert(weights, tmp_path / "peer", "timm")
    with pytest.raises(zoo.WeightsError, match=r"peer: is not empty, but has model\.safetensors; give a new folder"):
        zoo.convert(weights, tmp_path / "peer", "stm")
    with pytest.raises(zoo.WeightsError, match="give the hub's abbreviation"):
        zoo.convert(weights, tmp_path / "other", "timm", license="All rights: reserved")


def test_a_damaged_file_beside_the_weights_is_named(tmp_path: Path) -> None:
    weights = make_run(tmp_path / "results/shapes", VideoMAE(TINY))
    weights.with_name("config.json").write_text("{")
    with pytest.raises(zoo.WeightsError, match=r"config\.json: is not valid JSON"):
        zoo.convert(weights, tmp_path / "peer", "timm")


# -------------------------------------------------------------------------------------------------------
# torch.hub


def test_torch_hub_loads_from_a_clone(tmp_path: Path) -> None:
    def load(entry: str, weights: str) -> Any:
        return torch.hub.load(str(ROOT), entry, weights=str(tmp_path / weights), source="local")

    model, classifier = disturb(VideoMAE(TINY)), disturb(Head(VideoEncoder(TINY), 2))
    zoo.save(model, tmp_path / "a.safetensors")
    zoo.save(classifier, tmp_path / "b.safetensors", labels=["run", "sit"])
    video, clip, masked = draw(TINY)
    assert torch.equal(load("encoder", "a.safetensors")(video), model.encoder(video))
    kept, decoded = (torch.stack([row.nonzero().flatten() for row in m]) for m in (~masked, masked))
    assert torch.equal(load("mae", "a.safetensors")(video, kept, decoded), model(video, kept, decoded))
    peer = load("classifier", "b.safetensors")
    assert torch.equal(peer(video), classifier(video)) and peer.labels == ("run", "sit")
    torch.testing.assert_close(
        load("timm_encoder", "b.safetensors")(clip.float()), classifier(video), rtol=1e-5, atol=1e-5
    )
    for entry, weights in [("mae", "b.safetensors"), ("classifier", "a.safetensors")]:
        with pytest.raises(ValueError, match=f"{weights}: has no"):
            load(entry, weights)


@pytest.mark.slow
def test_torch_hub_needs_nothing_but_what_it_names(tmp_path: Path) -> None:
    """In a process where only the standard library, the named packages and what they import can be imported."""
    zoo.save(VideoMAE(TINY), tmp_path / "a.safetensors")
    code = (
        "import sys\n"
        "for name in ('snakemake', 'transformers', 'cv2', 'av', 'open_clip', 'matplotlib'): sys.modules[name] = None\n"
        "import torch\n"
        f"model = torch.hub.load({str(ROOT)!r}, 'encoder', weights='a.safetensors', source='local')\n"
        "print(type(model).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout == "VideoEncoder\n"
