"""Weights that a run starts from: what identifies them, and which of them are taken."""

import hashlib
import struct
from pathlib import Path

import torch
from training_shards import make_run

from stm.models.weights import zoo
from stm.training.initialise import hash_tensors, start_from

TENSORS = {"b": torch.tensor([[1.5], [-2.0]]), "a": torch.tensor([3], dtype=torch.int64)}


def test_the_hash_is_that_of_names_kinds_shapes_and_values_in_the_order_of_names() -> None:
    written = b"a torch.int64 (1,)\n" + struct.pack("<q", 3) + b"b torch.float32 (2, 1)\n" + struct.pack("<2f", 1.5, -2)
    assert hash_tensors(TENSORS) == hashlib.sha256(written).hexdigest()
    assert hash_tensors(dict(sorted(TENSORS.items()))) == hash_tensors(TENSORS)


def test_every_change_changes_the_hash() -> None:
    changed = [
        {**TENSORS, "b": torch.tensor([[1.5], [-2.0000002]])},
        {**TENSORS, "b": torch.tensor([[1.5, -2.0]])},
        {**TENSORS, "a": torch.tensor([3], dtype=torch.int32)},
        {"b": TENSORS["b"], "c": TENSORS["a"]},
        {"b": TENSORS["b"]},
    ]
    assert len({hash_tensors(tensors) for tensors in [TENSORS, *changed]}) == 1 + len(changed)


def test_what_is_taken_over_is_in_the_model_and_in_the_hash(tmp_path: Path) -> None:
    source = zoo.build(make_run())
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(3))
    zoo.save(source, tmp_path / "source.safetensors")
    found = {}
    for depth in (1, 2):  # the source's decoder has one block
        model = zoo.build(make_run(decoder_depth=depth))
        found[depth] = start_from(model, str(tmp_path / "source.safetensors"))
        taken = {
            name: value for name, value in source.state_dict().items() if depth == 1 or name.startswith("encoder.")
        }
        own = model.state_dict()
        assert all(torch.equal(own[name], value) for name, value in taken.items())
        saved = {name: value for name, value in taken.items() if name in dict(source.named_parameters())}
        assert found[depth].sha256 == hash_tensors(saved)
    assert (found[1].decoder, found[2].decoder) == (True, False)
    encoder = zoo.build(make_run(decoder_depth=2)).encoder
    assert start_from(encoder, str(tmp_path / "source.safetensors")) == found[2]
