"""The notebook in docs/: what is committed is what it computes, small, and of no particular machine."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).parents[2] / "docs/notebooks/first-look.ipynb"
PERCENT = re.compile(r" *\d+(?:\.\d+)?%")


def read_outputs(cells: list[Any]) -> list[list[tuple[str, Any]]]:
    """Per code cell, the text of its outputs, and the formats of its images."""
    outputs = []
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        found: list[tuple[str, Any]] = []
        for output in cell["outputs"]:
            assert output["output_type"] != "error"
            data = output.get("data", {"text/plain": output.get("text")})
            found.append(("".join(data["text/plain"]), sorted(data)))
        outputs.append(found)
    return outputs


def test_the_committed_notebook_is_executed_small_and_of_no_machine() -> None:
    text = PATH.read_text()
    cells = json.loads(text)["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(text) < 400_000
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert all(cell["outputs"] for cell in code[1:]) and not code[0]["outputs"]  # making the data is silent
    assert all(cell["metadata"] == {} for cell in cells)  # no times
    without_images = re.sub(r'"image/\w+": "[^"]*"', "", text)
    assert not re.search(r"/(home|root|tmp|work|usr|Users)/|\d\.\d+ ?s\b|0x[0-9a-f]{6}", without_images)


def test_the_committed_numbers_say_what_the_text_says() -> None:
    """Text finds the object under both cameras, motion under a fixed one, random masks as often as chance has it."""
    text = "\n".join(text for output in read_outputs(json.loads(PATH.read_text())["cells"]) for text, _ in output)
    table = {
        name: [int(fixed), int(moving)] for name, fixed, moving in re.findall(r"^(\w+) +(\d+)% +(\d+)%$", text, re.M)
    }
    assert min(table["text_top"]) > 90 and min(table["motion_compensated"]) > 90
    assert table["motion"][0] > 90 and table["motion"][1] < 75
    assert all(abs(share - 59) <= 6 for name in ("random", "tube") for share in table[name])
    found = {name.strip(): int(share) for name, share in re.findall(r"^([a-z ,']+?) +(\d+)%$", text, re.M)}
    assert found["a tenth, the object's"] > 2 * found["all tokens"] > 2 * found["by chance"]


@pytest.mark.slow
def test_the_notebook_computes_what_is_committed(tmp_path: Path) -> None:
    pytest.importorskip("nbclient")
    from execute_notebook import execute

    committed = read_outputs(json.loads(PATH.read_text())["cells"])
    computed = read_outputs(execute(PATH, tmp_path).cells)
    assert len(computed) == len(committed)
    for new, old in zip(computed, committed, strict=True):
        assert [PERCENT.sub("%", text) for text, _ in new] == [PERCENT.sub("%", text) for text, _ in old]
        assert [formats for _, formats in new] == [formats for _, formats in old]
        shares = [[float(each[:-1]) for text, _ in output for each in PERCENT.findall(text)] for output in (new, old)]
        # Other processors round differently: the rank of a token, or a nearest neighbour, may change.
        assert shares[0] == pytest.approx(shares[1], abs=5)
    assert not list(tmp_path.iterdir())  # the notebook works in a temporary folder of its own
