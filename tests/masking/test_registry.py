"""How strategies are found."""

from pathlib import Path

import pytest
import torch

import stm.masking
from stm.masking import get_strategy, register, strategy_names

CHECKERBOARD = '''
"""Keeps every second token."""
import torch
from stm.masking import register

@register("checkerboard", needs=("motion",))
def checkerboard(guides, ratio):
    batch, slots, tokens = guides["noise"].shape
    return torch.arange(0, slots * tokens, 2).expand(batch, -1)
'''


def test_an_unknown_strategy_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'tubes'.*motion, .*random, .*text_bottom, text_top, tube"):
        get_strategy("tubes")


def test_a_new_file_is_a_new_strategy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkerboard_for_tests.py").write_text(CHECKERBOARD)
    monkeypatch.setattr(stm.masking, "__path__", [*stm.masking.__path__, str(tmp_path)])
    monkeypatch.setattr(stm.masking, "_strategies", dict(stm.masking._strategies))
    assert "checkerboard" in strategy_names()
    strategy = get_strategy("checkerboard")
    assert strategy.needs == ("motion",)
    assert strategy({"noise": torch.rand(1, 1, 4)}, 0.5).tolist() == [[0, 2]]


def test_two_files_may_not_claim_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    strategy_names()
    monkeypatch.setattr(stm.masking, "_strategies", dict(stm.masking._strategies))
    with pytest.raises(ValueError, match=r"two masking strategies are called 'tube'.*stm\.masking\.tube"):
        register("tube")(lambda guides, ratio: guides["noise"])
