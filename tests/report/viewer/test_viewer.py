"""The mask viewer: what the page's script looks up and draws is what the strategies hide."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from browser import run_in_browser
from report_study import make_study

from stm.config import Config, Mask
from stm.data.geometry import Geometry
from stm.layout import Layout
from stm.masking import strategy_names
from stm.report.clips.cuts import Cut, cut_clips, hidden_share, mask_cut
from stm.report.clips.select import choose_clips
from stm.report.results.collect import collect, find_shards
from stm.report.results.records import Results
from stm.report.viewer.fragment import ViewerParts, make_parts, to_json
from stm.report.viewer.masks import GRID, MaskViewer, cut_per_caption, draw_masks, draw_study_masks

SLOTS, SIDE = 2, 4


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Read-only."""
    return make_study(tmp_path_factory.mktemp("viewer"))


@pytest.fixture(scope="module")
def viewer(config: Config) -> MaskViewer:
    layout = Layout.of(config)
    return draw_study_masks(config, layout, collect(config, layout))


@pytest.fixture(scope="module")
def parts(viewer: MaskViewer) -> ViewerParts:
    return make_parts({"made": viewer})


@pytest.fixture(scope="module")
def data(parts: ViewerParts) -> dict[str, Any]:
    """What the page's script reads from the page's HTML."""
    (text,) = re.findall(r'<script type="application/json">(.*?)</script>', parts.viewers["made"], re.S)
    values: dict[str, Any] = json.loads(text)
    return values


@pytest.fixture(scope="module")
def cuts(config: Config) -> list[Cut]:
    layout = Layout.of(config)
    clips = choose_clips(config, layout, find_shards(layout))
    return cut_clips(clips, Geometry.of(next(iter(config.runs.values()))), config.seed)


def make_page(parts: ViewerParts) -> str:
    head = f'<meta http-equiv="Content-Security-Policy" content="{parts.policy}"><style>{parts.style}</style>'
    body = f"{parts.viewers['made']}<script>{parts.script}</script>"
    return f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">{head}</head><body>{body}</body></html>'


def unpack(entry: dict[str, Any]) -> np.ndarray:
    """A mask as the page has it, bool [slots, side, side]."""
    bits = np.unpackbits(np.frombuffer(base64.b64decode(entry["bits"]), np.uint8))[: SLOTS * SIDE**2]
    return bits.astype(bool).reshape(SLOTS, SIDE, SIDE)


def hide_largest(scores: np.ndarray, noise: np.ndarray, ratio: float) -> np.ndarray:
    """The tokens with the highest (score, noise) per slot, sorted by numpy: bool [slots, side, side]."""
    hidden = np.zeros(noise.shape, dtype=bool)
    for slot in range(len(noise)):
        order = np.lexsort((noise[slot], scores[slot]))
        hidden[slot, order[len(order) - int(ratio * len(order)) :]] = True
    return hidden.reshape(-1, SIDE, SIDE)


# -------------------------------------------------------------------------------------------------------------- masks


def test_all_strategies_are_on_all_clips_over_the_whole_grid(data: dict[str, Any], viewer: MaskViewer) -> None:
    assert list(viewer.missing) == ["spatiotemporal"] and "learned" in viewer.missing["spatiotemporal"]
    names = [strategy["name"] for strategy in data["strategies"]]
    assert sorted(names) == sorted({*strategy_names()} - {"spatiotemporal"})
    assert len(data["clips"]) == 2 and len(GRID) == 19 and (GRID[0], GRID[11], GRID[-1]) == (0.05, 0.6, 0.95)
    for strategy in data["strategies"]:
        assert {*GRID} <= {*strategy["ratios"]} and strategy["ratios"] == sorted(strategy["ratios"])
        captions = 2 if strategy["name"] in ("text_top", "text_bottom") else 1
        for clip in data["clips"]:
            assert [len(entries) for entries in clip["masks"][strategy["name"]]] == [len(strategy["ratios"])] * captions
    assert data["start"] == "text_top" and data["strategies"][0]["ratios"][data["strategies"][0]["usual"]] == 0.9


@pytest.mark.parametrize("ratio", [0.05, 0.35, 0.6, 0.95])
def test_masks_are_those_that_numpy_ranks(ratio: float, data: dict[str, Any], cuts: list[Cut]) -> None:
    for cut, clip in zip(cuts, data["clips"], strict=True):
        guides = {name: guide[0].numpy() for name, guide in cut.batch["guides"].items()}
        scores = {"motion": guides["motion"], "random": np.zeros_like(guides["noise"])}
        for strategy in data["strategies"]:
            if strategy["name"] in scores:
                entry = clip["masks"][strategy["name"]][0][strategy["ratios"].index(ratio)]
                expected = hide_largest(scores[strategy["name"]], guides["noise"], ratio)
                assert np.array_equal(unpack(entry), expected)


@pytest.mark.parametrize("strategy", sorted({*strategy_names()} - {"spatiotemporal"}))
def test_masks_are_the_strategies_own(strategy: str, data: dict[str, Any], cuts: list[Cut], config: Config) -> None:
    teacher = config.pretrain["attentive"].teacher
    (described,) = (one for one in data["strategies"] if one["name"] == strategy)
    for cut, clip in zip(cuts, data["clips"], strict=True):
        caption = clip["captions"].index(cut.caption) if described["perCaption"] else 0
        for ratio in (0.2, described["ratios"][described["usual"]], 0.8):
            entry = clip["masks"][strategy][caption][described["ratios"].index(ratio)]
            expected = mask_cut(cut, strategy, ratio, teacher)
            assert expected is not None and cut.boxes is not None
            assert np.array_equal(unpack(entry), expected)
            assert entry["box"] == pytest.approx(hidden_share(cut.boxes, expected, cut.geometry.tubelet))


def test_each_caption_has_its_own_similarity(cuts: list[Cut]) -> None:
    """In the made shards, the second caption's similarity is the first's upside down."""
    first, second = cut_per_caption(cuts[0])
    maps = [cut.batch["guides"]["similarity"][0].numpy().reshape(-1, SIDE, SIDE) for cut in (first, second)]
    assert maps[0].std() > 0 and np.array_equal(maps[0], maps[1][:, ::-1])
    sampled = maps[[first.caption, second.caption].index(cuts[0].caption)]
    assert np.array_equal(sampled.reshape(-1), cuts[0].batch["guides"]["similarity"][0].numpy().reshape(-1))
    assert np.array_equal(first.batch["guides"]["noise"], second.batch["guides"]["noise"])


def test_frames_and_boxes_are_those_of_the_cut(data: dict[str, Any], cuts: list[Cut]) -> None:
    for cut, clip in zip(cuts, data["clips"], strict=True):
        decoded = [simplejpeg.decode_jpeg(base64.b64decode(frame), colorspace="RGB") for frame in clip["frames"]]
        original = cut.batch["video"][0].permute(0, 2, 3, 1).numpy()
        assert np.abs(np.stack(decoded).astype(int) - original).mean() < 12  # JPEG artefacts at the square's edges
        known = [box for box in clip["boxes"] if box is not None]
        assert cut.boxes is not None and np.allclose(known, cut.boxes[np.isfinite(cut.boxes[:, 0])], atol=1e-4)


def test_what_cannot_be_drawn_is_named_and_stops_no_other(cuts: list[Cut], tmp_path: Path) -> None:
    code = "from stm.masking import get_strategy, register\n\n"
    code += "@register('fine')\ndef fine(guides, ratio):\n    return get_strategy('tube')(guides, ratio)\n\n"
    code += "@register('failing')\ndef failing(guides, ratio):\n    raise RuntimeError('of its own')\n"
    (tmp_path / "own.py").write_text(code)
    fine, failing = (f"{tmp_path / 'own.py'}:{name}" for name in ("fine", "failing"))
    viewer = draw_masks(cuts, [failing, fine, "attention", "nowhere", "tube"], lambda needs: f"no {', '.join(needs)}")
    assert [strategy.strategy for strategy in viewer.strategies] == [fine, "tube"]
    own, tube = (strategy.masks for strategy in viewer.strategies)
    assert np.array_equal(np.stack([m[0] for m in own]), np.stack([m[0] for m in tube]))
    assert viewer.missing[failing] == "RuntimeError: of its own" and viewer.missing["attention"] == "no attention"
    assert "no masking strategy 'nowhere'" in viewer.missing["nowhere"]
    html = make_parts({"made": viewer}).viewers["made"]
    assert "attention (no attention)" in html


def test_a_study_without_clips_has_no_viewer(config: Config, tmp_path: Path) -> None:
    empty = draw_study_masks(config, Layout(tmp_path), Results())
    parts = make_parts({"made": empty})
    assert parts.viewers == {} and parts.script == parts.style == "" and "script" not in parts.policy


def test_the_strategies_of_the_configs_runs_are_drawn(config: Config, tmp_path: Path) -> None:
    code = "from stm.masking import get_strategy, register\n\n"
    code += "@register('own')\ndef own(guides, ratio):\n    return get_strategy('tube')(guides, ratio)\n"
    (tmp_path / "own.py").write_text(code)
    own = f"{tmp_path / 'own.py'}:own"
    run = config.pretrain["tube"].model_copy(update={"mask": Mask(strategy=own, ratio=0.5)})
    changed = config.model_copy(update={"pretrain": {"own": run}})
    viewer = draw_study_masks(changed, Layout.of(config), Results(shards=find_shards(Layout.of(config))))
    assert own in [strategy.strategy for strategy in viewer.strategies]
    assert {"attention", "cluster"} <= {*viewer.missing}


# --------------------------------------------------------------------------------------------------------------- page


def test_no_text_closes_the_block_of_data() -> None:
    values = {"caption": "</script><script>alert(1)</script> <!-- & \u2028 ü"}
    text = to_json(values)
    assert not {*"<>&"} & {*text} and text.isascii() and json.loads(text) == values


SAYS = re.compile(r"(\w+) at ([\d.]+) hides ([\d.]+) % of the tokens \((\d+) of (\d+)\) and (\d+) % of the box\.")

# Chooses as a reader would, by events; reports the texts, which tokens are grey, and whether the page is too wide.
PLAY = """
const part = (name) => document.querySelector(`[data-part="${name}"]`);
const wait = (time) => new Promise((done) => setTimeout(done, time));
const choose = (name, value) => {
  part(name).value = value;
  part(name).dispatchEvent(new Event(part(name).type === "range" ? "input" : "change"));
};
const grey = () => {
  const canvas = part("canvas"), cell = canvas.width / SIDE, context = canvas.getContext("2d"), found = [];
  for (let token = 0; token < SIDE * SIDE; token++) {
    const place = [(token % SIDE + 0.3) * cell, (Math.floor(token / SIDE) + 0.3) * cell];
    found.push(context.getImageData(...place, 1, 1).data.slice(0, 3).every((value) => value === 140));
  }
  return found;
};
const states = [];
const report = async (more) => {
  await wait(300);
  const root = document.scrollingElement;
  states.push({says: part("says").textContent, ratio: part("ratio-value").textContent, grey: grey(),
    frame: part("frame-number").textContent, caption: document.querySelector('[data-row="caption"]').hidden,
    wide: root.scrollWidth - root.clientWidth, ...more});
};
await report({hidden: document.querySelector(".viewer").hidden});
choose("ratio", 3);
await report();
part("switch").querySelector('input[value="text_bottom"]').click();
choose("caption", 1);
choose("frame", 3);
await report();
choose("clip", 1);
choose("choice", "tube");
await report();
part("play").click();
await wait(500);
const playing = part("play").textContent;
part("play").click();
await report({playing, paused: part("play").textContent});
choose("map", "motion");
part("faint").click();
await report();
return states;
"""


@pytest.mark.parametrize("width", [1440, 390])
def test_a_browser_shows_and_says_what_is_hidden(
    width: int, parts: ViewerParts, cuts: list[Cut], tmp_path: Path
) -> None:
    script = PLAY.replace("SIDE", str(SIDE))
    first, low, bottom, tube, played, faint = run_in_browser(make_page(parts), script, tmp_path, width)
    captions = [cut_per_caption(cut) for cut in cuts]
    assert first["hidden"] is False and first["ratio"] == "0.60 (usual)" and low["ratio"] == "0.20 (usual: 0.60)"
    assert tube["ratio"] == "0.20 (usual: 0.90)"  # the ratio stays when the strategy changes
    for state, cut, strategy, ratio, slot in (
        (first, captions[0][0], "text_top", 0.6, 0),
        (low, captions[0][0], "text_top", 0.2, 0),
        (bottom, captions[0][1], "text_bottom", 0.2, 1),
        (tube, captions[1][0], "tube", 0.2, 1),
    ):
        masked = mask_cut(cut, strategy, ratio)
        assert masked is not None and cut.boxes is not None
        said = SAYS.fullmatch(state["says"])
        assert said is not None, state["says"]
        assert said[1] == strategy and float(said[2]) == ratio
        assert (int(said[4]), int(said[5])) == (masked.sum(), masked.size)
        assert float(said[3]) == pytest.approx(100 * masked.mean(), abs=0.0501)  # rounded
        assert int(said[6]) == pytest.approx(100 * hidden_share(cut.boxes, masked, 2), abs=0.501)
        # The outline of the box may cross the pixel that is looked at.
        assert np.array_equal(np.array(state["grey"]), masked[slot].reshape(-1))
    assert [first["caption"], tube["caption"]] == [False, True]
    assert bottom["frame"] == "4 of 4" and played["frame"] != "4 of 4"
    assert (played["playing"], played["paused"]) == ("Pause", "Play")
    assert not any(faint["grey"])
    assert [state["wide"] for state in (first, low, bottom, tube, played, faint)] == [0] * 6


def test_the_policy_stops_every_other_script(parts: ViewerParts, tmp_path: Path) -> None:
    page = make_page(parts).replace("</body>", "<script>document.title = 'attacked'</script></body>")
    page = page.replace("<body>", "<body><img src=x onerror=\"document.title = 'attacked'\">")
    title, hidden = run_in_browser(
        page, "return [document.title, document.querySelector('.viewer').hidden];", tmp_path, 800
    )
    assert (title, hidden) == ("", False)
