"""The initial weights of small BERTs: as strong at a small width as BERT-base's at its own, so that matching learns."""

import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig

from stm.models.text.small_bert import make_bert, scaled_range
from stm.models.text.split_bert import SplitBert


@pytest.mark.parametrize(("width", "expected"), [(768, 0.02), (128, 0.02 * 6**0.5), (192, 0.04)])
def test_the_deviation_of_initial_weights_grows_as_the_width_shrinks(
    width: int, expected: float, tmp_path: Path
) -> None:
    assert scaled_range(width) == pytest.approx(expected)
    if width < 768:
        make_bert(tmp_path, [f"w{number}" for number in range(100)], width, layers=2, heads=2)
        # Also of the layers that are not in the file, such as cross-attention.
        assert json.loads((tmp_path / "config.json").read_text())["initializer_range"] == pytest.approx(expected)


def measure_swap(width: int, initial: float) -> float:
    """How much a fresh fusion's [CLS] changes, relative to its variation over captions, if the clip is another one."""
    config = BertConfig(
        vocab_size=50,
        hidden_size=width,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=4 * width,
        initializer_range=initial,
    )
    torch.manual_seed(0)
    model = SplitBert(config, 2).eval()
    tokens, clips = torch.randint(5, 50, (8, 6)), torch.nn.functional.layer_norm(torch.randn(2, 8, 10, width), (width,))
    with torch.no_grad():
        one, other = (model.fuse(model(tokens), tokens, clip)[:, 0] for clip in clips)
    return float((one - other).norm() / one.norm())


def test_a_fresh_fusion_tells_clips_apart_at_a_small_width_too() -> None:
    base = measure_swap(768, 0.02)
    assert measure_swap(128, scaled_range(128)) > 0.7 * base
    assert measure_swap(128, 0.02) < 0.4 * base
