"""`package:NAME` names a model that comes with the package, from any working directory, without paths in receipts."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from stm.config import Language, Text
from stm.models.text.split_bert import SplitBert
from stm.pretrained.clip import embed_texts, load_clip
from stm.pretrained.hub import ModelError, find_model
from stm.pretrained.local_files import find_missing, hash_weights, local_model_files, without_folders
from stm.pretrained.sizes import clip_width
from stm.pretrained.text_encoder import TextEncoder

ASSETS = Path(__file__).parents[2] / "stm/assets"
NAMES = sorted(path.name for path in ASSETS.iterdir() if path.is_dir())


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_model_is_found_from_anywhere_and_keeps_its_name(name: str) -> None:
    model = f"package:{name}"
    assert local_model_files(model) == [p.as_posix() for p in sorted((ASSETS / name).iterdir())]
    assert local_model_files(f"transformers:{model}") == local_model_files(model)
    assert without_folders({"model": model, "grid": 8}) == {"model": model, "grid": 8}
    assert find_missing(model) is find_missing(f"clip:{model}") is None
    assert find_model(model).identify(None) == {"model": model, "weights_sha256": hash_weights(ASSETS / name)}


def test_the_shipped_clip_is_the_same_as_a_copy_of_it() -> None:
    shutil.copytree(ASSETS / "demo-clip", "copy")
    shipped, copied = load_clip("package:demo-clip", device="cpu"), load_clip("local-dir:copy", device="cpu")
    assert shipped.identity == {"model": "package:demo-clip", "weights_sha256": copied.identity["weights_sha256"]}
    np.testing.assert_array_equal(embed_texts(shipped, ["a red ball"]), embed_texts(copied, ["a red ball"]))
    assert clip_width("package:demo-clip") == clip_width("local-dir:copy") == 96


def test_text_encoders_and_berts_take_shipped_models() -> None:
    for name, pooling in (("package:demo-clip", "projected"), ("transformers:package:demo-bert", "cls")):
        encoder = TextEncoder.load(Text.model_validate({"model": name, "pooling": pooling}), device="cpu")
        assert encoder.identity["model"] == name
        assert np.isfinite(encoder.encode(["a red ball"])).all()
    assert SplitBert.load(Language(model="package:demo-bert", fusion_layer=2, max_tokens=6)).width == 128


@pytest.mark.parametrize(
    "name",
    [
        "package:demo-clap",
        "package:",
        "package:demo-clip/other",
        "package:../assets/demo-clip",
        f"package:{ASSETS}/demo-clip",
    ],
)
def test_a_name_that_the_package_does_not_have_is_refused_with_those_that_it_has(name: str) -> None:
    assert find_missing(name) == name and local_model_files(name) == []
    for load in (find_model, load_clip):
        with pytest.raises(ModelError, match="it has package:demo-bert, package:demo-blip2, package:demo-clip"):
            load(name)
