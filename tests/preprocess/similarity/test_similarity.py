"""The similarity stage: TGM's patch-text similarity, checked against one patch at a time through PIL."""

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from small_models import CLIP_CONFIG, NORMALISATION, save_clip
from stage_outputs import Clip, StageOutputs, make_stage_outputs
from torch._dynamo.utils import counters
from torchvision.transforms.v2 import functional as vision

from stm.config import BadInput, HumanCaptions, LabelCaptions, Similarity
from stm.preprocess.captions.write import write_captions
from stm.preprocess.frames.table import load_frame
from stm.preprocess.similarity.patch_scorer import PatchScorer, Piece, cosine, cut_batches, cut_windows, resize
from stm.preprocess.similarity.score import (
    take_similarity,
    write_embeddings,
    write_joint_similarity,
    write_similarity,
)
from stm.pretrained.clip import load_clip
from stm.pretrained.hub import ModelError
from stm.pretrained.local_files import hash_weights
from stm.shards.grid import map_shape
from stm.storage.tables import DamagedError, read_receipt, read_table

GRID = 4
KEEP_GOING = BadInput(max_failure_rate=1.0)
CLIPS = [
    Clip("a", frames=3, width=40, height=32, captions=["a red circle", "two dogs"]),  # cells of 8 x 8
    Clip("b", frames=2, width=32, height=40, captions=["rain"]),
    Clip("c", frames=1, captions=None),
    Clip("d", frames=4, width=53, height=37, captions=["a red circle"]),  # cells of fractional pixels
    Clip("lost", captions=["never"], kept=False),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> StageOutputs:
    made = make_stage_outputs(tmp_path_factory.mktemp("shard"), CLIPS, GRID)
    source = HumanCaptions(kind="human")
    write_captions(made.slice, made.tar, made.index, made.folder / "captions.parquet", source, KEEP_GOING)
    return made


def settings(model: Path, **more: Any) -> Similarity:
    return Similarity(**{"model": f"local-dir:{model}", "batch_size": 7, **more})


def score(made: StageOutputs, output: Path, settings: Similarity, embeddings: Path | None = None) -> Path:
    captions = made.folder / "captions.parquet"
    write_similarity(
        made.tar, made.index, captions, output, settings, GRID, KEEP_GOING, embeddings=embeddings, device="cpu"
    )
    return output


def maps_of(path: Path) -> dict[str, np.ndarray]:
    """float32 [K, T, R, C] by key."""
    rows = [r for r in read_table(path).to_pylist() if r["similarity"] is not None]
    return {
        r["key"]: np.array(r["similarity"], np.float32).reshape(
            len(r["captions"]), r["frames"], r["rows"], r["columns"]
        )
        for r in rows
    }


# ------------------------------------------------------------------------------------------- against a plain reference


def reference_embedding(model: torch.nn.Module, patch: Image.Image) -> np.ndarray:
    """One patch: PIL's bicubic to the full input, the model's own mean and std, the projected CLS embedding."""
    pixels = np.asarray(patch.resize((24, 24), Image.Resampling.BICUBIC), np.float64) / 255
    normal = (pixels - NORMALISATION["mean"]) / NORMALISATION["std"]
    with torch.no_grad():
        return model.encode_image(torch.tensor(normal.transpose(2, 0, 1)[None], dtype=torch.float32))[0].numpy()


def plain_cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(sum(a * b for a, b in zip(x, y, strict=True)) / (sum(a * a for a in x) * sum(b * b for b in y)) ** 0.5)


def plain_model(folder: Path) -> torch.nn.Module:
    model = open_clip.CLIP(**CLIP_CONFIG).eval()
    model.load_state_dict(load_file(folder / "open_clip_model.safetensors"))
    return model


def test_maps_equal_one_patch_at_a_time_through_pil(made: StageOutputs, model: Path, tmp_path: Path) -> None:
    found = maps_of(score(made, tmp_path / "out.parquet", settings(model)))
    plain, tokenizer = plain_model(model), open_clip.SimpleTokenizer(context_length=16)
    index = {r["key"]: r for r in read_table(made.index).to_pylist()}
    spread = []
    for clip in [c for c in CLIPS if c.key in "ab"]:
        with torch.no_grad():
            texts = [plain.encode_text(tokenizer([text]))[0].numpy() for text in clip.captions or []]
        side = 8
        assert found[clip.key].shape == (len(texts), clip.frames, clip.height // side, clip.width // side)
        for k, t, r, c in np.ndindex(found[clip.key].shape):
            frame = Image.fromarray(load_frame(made.tar, index[clip.key], t))
            box = (c * side, r * side, (c + 1) * side, (r + 1) * side)
            expected = plain_cosine(reference_embedding(plain, frame.crop(box)), texts[k])
            assert found[clip.key][k, t, r, c] == pytest.approx(expected, abs=4e-3)
            spread.append(expected)
    assert np.std(spread) > 0.05  # the tolerance is far below the differences between patches


def test_text_embedding_is_taken_at_the_end_token(model: Path) -> None:
    scorer = PatchScorer(load_clip(f"local-dir:{model}", device="cpu"), GRID, 4)
    plain, tokenizer = plain_model(model), open_clip.SimpleTokenizer(context_length=16)
    tokens = tokenizer(["a red circle"])
    with torch.no_grad():
        hidden = plain.token_embedding(tokens) + plain.positional_embedding
        hidden = plain.ln_final(plain.transformer(hidden, attn_mask=plain.attn_mask))
        at_end = hidden[0, tokens[0].tolist().index(49407)] @ plain.text_projection
    expected = (at_end / at_end.norm()).numpy()
    np.testing.assert_allclose(scorer.embed_texts(["a red circle"])[0], expected, atol=1e-5)


@pytest.mark.parametrize(("source", "target"), [(8, 24), (16, 224), (40, 24), (19, 19)])
def test_resize_is_torchs_antialiased_bicubic(source: int, target: int) -> None:
    image = 255 * torch.rand(2, 3, source, source, generator=torch.Generator().manual_seed(0))
    expected = vision.resize(image, [target, target], vision.InterpolationMode.BICUBIC, antialias=True).clamp(0, 255)
    torch.testing.assert_close(resize(image, target, target), expected, atol=2e-3, rtol=0)


def test_whole_pixel_cells_are_cut_without_resampling() -> None:
    frame = torch.randint(0, 256, (32, 40, 3), dtype=torch.uint8)
    cells = cut_windows(frame, 4, 5)
    for row, column in np.ndindex(4, 5):
        expected = frame[8 * row : 8 * row + 8, 8 * column : 8 * column + 8].permute(2, 0, 1).float()
        assert torch.equal(cells[5 * row + column], expected)


def test_the_towers_input_is_resized_then_clamped_then_normalised(model: Path) -> None:
    """The stage computes it in another order; hard edges make bicubic resizing leave the pixel range."""
    scorer = PatchScorer(load_clip(f"local-dir:{model}", device="cpu"), GRID, 20)
    frame = (255 * np.random.default_rng(0).integers(0, 2, (40, 48, 3))).astype(np.uint8)
    cells = cut_windows(torch.from_numpy(frame), 4, 5)
    large = vision.resize(cells, [24, 24], vision.InterpolationMode.BICUBIC, antialias=True)
    assert large.min() < -10 and large.max() > 265
    mean, std = (torch.tensor(NORMALISATION[name]).view(3, 1, 1) for name in ("mean", "std"))
    expected = (large.clamp(0, 255) / 255 - mean) / std
    torch.testing.assert_close(scorer.prepare([Piece(frame, 0, 20)]), expected, atol=1e-4, rtol=0)


def test_compiling_the_tower_changes_no_embedding_and_makes_one_graph(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: compiled(f, backend="eager", fullgraph=True, **kw))
    frames = list(np.random.default_rng(0).integers(0, 256, (3, 37, 53, 3), dtype=np.uint8))
    plain, fast = (PatchScorer(load_clip(f"local-dir:{model}", device="cpu"), GRID, 7, way) for way in (False, True))
    counters.clear()
    np.testing.assert_allclose(fast.embed_frames(frames), plain.embed_frames(frames), atol=1e-3)
    assert counters["stats"]["unique_graphs"] == 1


@given(st.integers(20, 90), st.integers(20, 90), st.integers(2, 7))
def test_cells_of_any_frame_lie_where_the_map_says(width: int, height: int, grid: int) -> None:
    """On a frame that is a ramp, a cell's mean is the ramp's value at the cell's centre."""
    rows, columns = map_shape(width, height, grid)
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0] = 2 * np.arange(width)
    ramp[..., 1] = 2 * np.arange(height)[:, None]
    cells = cut_windows(torch.from_numpy(ramp), rows, columns)
    assert cells.shape[2] >= max(height / rows, width / columns) > cells.shape[2] - 1  # no pixel is lost
    means = cells.mean((2, 3)).reshape(rows, columns, 3)
    x = 2 * ((np.arange(columns) + 0.5) * width / columns - 0.5)  # pixel i lies at i + 1/2
    y = 2 * ((np.arange(rows) + 0.5) * height / rows - 0.5)
    np.testing.assert_allclose(means[:, :, 0], np.tile(x, (rows, 1)), atol=0.75)
    np.testing.assert_allclose(means[:, :, 1], np.tile(y[:, None], (1, columns)), atol=0.75)


@pytest.mark.parametrize("window", [2, 3])
def test_windows_of_several_cells_overlap(window: int) -> None:
    frame = torch.randint(0, 256, (32, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    windows = cut_windows(frame, 4, 5, window)
    rows, columns = 5 - window, 6 - window
    assert windows.shape == (rows * columns, 3, 8 * window, 8 * window)
    for row, column in np.ndindex(rows, columns):
        expected = frame[8 * row : 8 * (row + window), 8 * column : 8 * (column + window)].permute(2, 0, 1).float()
        assert torch.equal(windows[columns * row + column], expected)


@pytest.mark.parametrize(("window", "starts"), [(1, [0, 1, 2, 3]), (2, [0, 1, 2, 2]), (3, [0, 0, 1, 1])])
def test_a_cells_patch_is_the_window_around_it_moved_inside_the_frame(
    model: Path, window: int, starts: list[int]
) -> None:
    clip = load_clip(f"local-dir:{model}", device="cpu")
    frames = list(np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8))
    found = PatchScorer(clip, 4, 7, window=window).embed_frames(frames)
    alone = PatchScorer(clip, 1, 7)  # a whole image is one patch
    for number, row, column in np.ndindex(2, 4, 4):
        top, left = 8 * starts[row], 8 * starts[column]
        patch = np.ascontiguousarray(frames[number][top : top + 8 * window, left : left + 8 * window])
        np.testing.assert_allclose(found[number, row, column], alone.embed_frames([patch])[0, 0, 0], atol=2e-3)


def test_the_stage_writes_maps_of_windows_with_and_without_embeddings(
    made: StageOutputs, model: Path, tmp_path: Path
) -> None:
    chosen = settings(model, window=2)
    direct = score(made, tmp_path / "direct.parquet", chosen)
    embeddings = tmp_path / "embeddings.parquet"
    write_embeddings(made.tar, made.index, embeddings, chosen, GRID)
    assert score(made, tmp_path / "stored.parquet", chosen, embeddings).read_bytes() == direct.read_bytes()
    cells = maps_of(score(made, tmp_path / "cells.parquet", settings(model)))
    for key, values in maps_of(direct).items():
        assert values.shape == cells[key].shape and not np.array_equal(values, cells[key])
    assert read_receipt(direct)["settings"]["window"] == 2
    assert "window" not in read_receipt(tmp_path / "cells.parquet")["settings"]  # as before the key existed
    with pytest.raises(DamagedError, match="was made with a different window"):
        score(made, tmp_path / "other.parquet", settings(model), embeddings)


# ------------------------------------------------------------------------------------------------------ batches, journal


@given(st.lists(st.integers(1, 40), max_size=12), st.integers(1, 50))
def test_batches_hold_every_cell_once_in_order_and_are_full(cells: list[int], batch_size: int) -> None:
    batches = cut_batches(cells, batch_size)
    dealt = [(frame, cell) for batch in batches for frame, start, stop in batch for cell in range(start, stop)]
    assert dealt == [(frame, cell) for frame, count in enumerate(cells) for cell in range(count)]
    sizes = [sum(stop - start for _, start, stop in batch) for batch in batches]
    assert all(size == batch_size for size in sizes[:-1]) and all(0 < size <= batch_size for size in sizes)


@pytest.mark.parametrize("batch_size", [1, 16, 1000])
def test_maps_do_not_depend_on_the_batch_size(made: StageOutputs, model: Path, tmp_path: Path, batch_size: int) -> None:
    some = maps_of(score(made, tmp_path / "some.parquet", settings(model)))
    other = maps_of(score(made, tmp_path / "other.parquet", settings(model, batch_size=batch_size)))
    assert some.keys() == other.keys()
    for key in some:
        np.testing.assert_allclose(some[key], other[key], atol=1e-3)


def test_a_clips_maps_do_not_depend_on_its_shard(model: Path, tmp_path: Path) -> None:
    """The same clip first and last in a shard."""
    scorer = PatchScorer(load_clip(f"local-dir:{model}", device="cpu"), GRID, 7)
    frames = list(np.random.default_rng(0).integers(0, 256, (5, 37, 53, 3), dtype=np.uint8))
    forward, backward = scorer.embed_frames(frames), scorer.embed_frames(frames[::-1])[::-1]
    assert forward.shape == (5, 4, 6, 16)
    np.testing.assert_allclose(forward.astype(np.float32), backward.astype(np.float32), atol=1e-3)


class Killed(BaseException):
    """Stands in for a kill of the process."""


def test_a_killed_job_continues_with_the_same_bytes(
    made: StageOutputs, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = score(made, tmp_path / "whole.parquet", settings(model)).read_bytes()
    encoded = []
    encode = PatchScorer.encode

    def die_at_the_thirteenth(self: PatchScorer, batch: torch.Tensor) -> torch.Tensor:
        encoded.append(len(batch))
        if len(encoded) == 13:
            raise Killed
        return encode(self, batch)

    monkeypatch.setattr(PatchScorer, "encode", die_at_the_thirteenth)
    output = tmp_path / "killed.parquet"
    with pytest.raises(Killed):
        score(made, output, settings(model))
    assert not output.exists()
    score(made, output, settings(model))
    # a: 60 cells, b: 40, c: none, without captions, d: 96, in batches of 7 of the whole shard. Clip a is not computed again.
    assert 13 < len(encoded) < 13 + 29
    assert set(encoded) == {7}
    assert output.read_bytes() == expected
    assert not list(tmp_path.glob(".*.journal"))


@pytest.mark.parametrize("change", ["frames", "captions"])
def test_a_journal_of_other_inputs_is_not_used(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    def prepare(folder: Path, seed: int, caption: str) -> StageOutputs:
        made = make_stage_outputs(folder, [Clip("a", captions=[caption]), Clip("b", captions=[caption])], GRID, seed)
        source = HumanCaptions(kind="human")
        write_captions(made.slice, made.tar, made.index, folder / "captions.parquet", source, KEEP_GOING)
        return made

    calls = iter(range(1000))
    encode = PatchScorer.encode

    def die_late(self: PatchScorer, batch: torch.Tensor) -> torch.Tensor:
        if next(calls) == 12:  # clip a, 60 cells in batches of 7, is in the journal by then
            raise Killed
        return encode(self, batch)

    monkeypatch.setattr(PatchScorer, "encode", die_late)
    with pytest.raises(Killed):
        score(prepare(tmp_path / "x", 0, "rain"), tmp_path / "out.parquet", settings(model))
    assert list(tmp_path.glob(".out.parquet.journal/*"))
    now = (1, "rain") if change == "frames" else (0, "snow")
    resumed = score(prepare(tmp_path / "x", *now), tmp_path / "out.parquet", settings(model))
    fresh = score(prepare(tmp_path / "y", *now), tmp_path / "fresh.parquet", settings(model))
    assert resumed.read_bytes() == fresh.read_bytes()


def test_repeated_work_gives_the_same_bytes(made: StageOutputs, model: Path, tmp_path: Path) -> None:
    first = score(made, tmp_path / "first.parquet", settings(model)).read_bytes()
    assert score(made, tmp_path / "second.parquet", settings(model)).read_bytes() == first


# -------------------------------------------------------------------------------------------------- several caption sources


@pytest.fixture(scope="module")
def sources(made: StageOutputs) -> dict[str, Path]:
    """Captions of three sources, of which `human` has none of clip c."""
    found = {"human": made.folder / "captions.parquet"}
    wordings: dict[str, tuple[str, ...]] = {"label": ("{}", "someone is {}"), "more": ("a video of {}.",)}
    for name, templates in wordings.items():
        found[name] = made.folder / f"{name}.parquet"
        source = LabelCaptions(kind="label", templates=templates)
        write_captions(made.slice, made.tar, made.index, found[name], source, KEEP_GOING)
    return found


def score_all(made: StageOutputs, sources: dict[str, Path], settings: Similarity, folder: Path) -> dict[str, bytes]:
    """The maps of each source, from one pass for all of them."""
    joint = folder / "joint.parquet"
    write_joint_similarity(made.tar, made.index, sources, joint, settings, GRID, device="cpu")
    return {name: take(made, sources, name, settings, folder).read_bytes() for name in sources}


def take(made: StageOutputs, sources: dict[str, Path], name: str, settings: Similarity, folder: Path) -> Path:
    output = folder / f"taken-{name}.parquet"
    joint = folder / "joint.parquet"
    take_similarity(joint, name, made.index, sources[name], output, settings, GRID, KEEP_GOING)
    return output


def count_passes(monkeypatch: pytest.MonkeyPatch, dies_at: int = 0) -> list[int]:
    """Count the forward passes of the image tower from now on, and die at one of them."""
    passes: list[int] = []
    encode = PatchScorer.encode

    def counted(self: PatchScorer, batch: torch.Tensor) -> torch.Tensor:
        passes.append(len(batch))
        if len(passes) == dies_at:
            raise Killed
        return encode(self, batch)

    monkeypatch.setattr(PatchScorer, "encode", counted)
    return passes


def test_three_sources_take_one_pass_and_have_the_bytes_of_three(
    made: StageOutputs, sources: dict[str, Path], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = {}
    for name, captions in sources.items():
        output = tmp_path / f"{name}.parquet"
        write_similarity(made.tar, made.index, captions, output, settings(model), GRID, KEEP_GOING, device="cpu")
        alone[name] = output.read_bytes()
    assert len(set(alone.values())) == 3
    passes = count_passes(monkeypatch)
    assert score_all(made, sources, settings(model), tmp_path) == alone
    assert len(passes) == -(-(3 * 20 + 2 * 20 + 20 + 4 * 24) // 7)  # all patches of the shard once, in batches of 7
    without = {row["key"] for row in read_table(tmp_path / "taken-human.parquet").to_pylist() if not row["captions"]}
    assert without == {"c"}  # which the other sources describe


def test_a_killed_pass_for_all_sources_continues_with_the_same_bytes(
    made: StageOutputs, sources: dict[str, Path], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "whole").mkdir()
    expected = score_all(made, sources, settings(model), tmp_path / "whole")
    passes = count_passes(monkeypatch, dies_at=13)
    with pytest.raises(Killed):
        score_all(made, sources, settings(model), tmp_path)
    assert score_all(made, sources, settings(model), tmp_path) == expected
    assert 13 < len(passes) < 13 + 31  # clip a is not computed again
    assert not list(tmp_path.glob(".*.journal"))


def test_maps_of_other_captions_or_settings_are_refused(
    made: StageOutputs, sources: dict[str, Path], model: Path, tmp_path: Path
) -> None:
    score_all(made, sources, settings(model), tmp_path)
    with pytest.raises(DamagedError, match=r"joint.parquet: was made with different captions than .*more.parquet"):
        take(made, {"label": sources["more"]}, "label", settings(model), tmp_path)
    with pytest.raises(DamagedError, match="was made with a different precision"):
        take(made, sources, "label", settings(model, precision="bfloat16"), tmp_path)


# ------------------------------------------------------------------------------------------------------ kept embeddings


@pytest.fixture
def embeddings(made: StageOutputs, model: Path, tmp_path: Path) -> Path:
    path = tmp_path / "embeddings.parquet"
    write_embeddings(made.tar, made.index, path, settings(model, keep_embeddings=True), GRID, device="cpu")
    return path


def test_kept_embeddings_give_the_same_bytes_without_the_image_tower(
    made: StageOutputs, model: Path, tmp_path: Path, embeddings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = score(made, tmp_path / "fresh.parquet", settings(model)).read_bytes()
    monkeypatch.setattr(PatchScorer, "encode", None)
    kept = settings(model, keep_embeddings=True)
    assert score(made, tmp_path / "kept.parquet", kept, embeddings).read_bytes() == expected


def test_embeddings_cover_every_patch_and_have_length_one(made: StageOutputs, embeddings: Path) -> None:
    rows = read_table(embeddings).to_pylist()
    assert [r["key"] for r in rows] == ["a", "b", "c", "d"]
    for row in rows:
        array = np.array(row["embeddings"], np.float32).reshape(
            row["frames"], row["rows"], row["columns"], row["width"]
        )
        np.testing.assert_allclose(np.linalg.norm(array, axis=-1), 1, atol=1e-3)


def test_embeddings_of_another_model_or_grid_are_refused(
    made: StageOutputs, model: Path, tmp_path: Path, embeddings: Path
) -> None:
    other = save_clip(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="made with a different model"):
        score(made, tmp_path / "out.parquet", settings(other), embeddings)
    with pytest.raises(ValueError, match="made with a different precision"):
        score(made, tmp_path / "out.parquet", settings(model, precision="bfloat16"), embeddings)
    with pytest.raises(ValueError, match="was made with a different model, grid, frames, precision"):
        score(made, tmp_path / "out.parquet", settings(model), made.index)


# ---------------------------------------------------------------------------------------------------------------- table


def test_table_says_what_it_was_made_of(made: StageOutputs, model: Path, tmp_path: Path) -> None:
    path = score(made, tmp_path / "out.parquet", settings(model))
    rows = {r["key"]: r for r in read_table(path).to_pylist()}
    assert list(rows) == ["a", "b", "c", "d"]
    assert rows["a"]["captions"] == ["a red circle", "two dogs"]
    silent = rows["c"]
    assert (silent["captions"], silent["similarity"]) == ([], None)
    assert (silent["status"], silent["policy"]) == ("caption_missing", "drop")
    values = np.concatenate([m.ravel() for m in maps_of(path).values()])
    assert np.abs(values).max() <= 1 and np.isfinite(values).all()
    receipt = read_receipt(path)
    assert receipt["model"] == {"model": "local-dir:clip", "weights_sha256": hash_weights(model)}
    assert str(model.parent) not in str(receipt)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_stays_close(made: StageOutputs, model: Path, tmp_path: Path, precision: str) -> None:
    full = maps_of(score(made, tmp_path / "full.parquet", settings(model)))
    half = maps_of(score(made, tmp_path / "half.parquet", settings(model, precision=precision)))
    for key in full:
        np.testing.assert_allclose(full[key], half[key], atol=0.05)


def test_captions_of_other_frames_are_refused(made: StageOutputs, model: Path, tmp_path: Path) -> None:
    more = make_stage_outputs(tmp_path / "more", [*CLIPS, Clip("z", captions=["new"])])
    captions = made.folder / "captions.parquet"
    with pytest.raises(ValueError, match=r"'z'.*different frames"):
        write_similarity(more.tar, more.index, captions, tmp_path / "o.parquet", settings(model), GRID, KEEP_GOING)


def test_a_damaged_frame_is_named(made: StageOutputs, model: Path, tmp_path: Path) -> None:
    torn = make_stage_outputs(tmp_path / "torn", CLIPS)
    row = next(r for r in read_table(torn.index).to_pylist() if r["key"] == "b")
    data = bytearray(torn.tar.read_bytes())
    data[row["offsets"][1] : row["offsets"][1] + 20] = bytes(20)
    torn.tar.write_bytes(data)
    with pytest.raises(ValueError, match="stored frame 1 of clip 'b': is not what its index says"):
        score(
            StageOutputs(torn.slice, torn.tar, torn.index, torn.motion, made.folder),
            tmp_path / "o.parquet",
            settings(model),
        )


# ---------------------------------------------------------------------------------------------------------- model names


def test_model_names_lead_to_models_or_to_help(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    relative = load_clip("local-dir:clip", device="cpu")
    assert relative.image_size == (24, 24) and relative.mean == tuple(NORMALISATION["mean"])
    for name, message in {
        "ViT-B32@openai": "no architecture 'ViT-B32'; similar names: .*ViT-B-32",
        "ViT-B-32": "does not name its weights.*Its tags: .*laion2b_s34b_b79k",
        "ViT-B-32@openai": "belong to ViT-B-32-quickgelu; write ViT-B-32-quickgelu@openai",
        "ViT-B-32@laion2b_s34b_b79": "did you mean laion2b_s34b_b79k",
        "ViT-B-32@missing.pt": "neither a file",
        "local-dir:nowhere": "has no open_clip_config.json",
    }.items():
        with pytest.raises(ModelError, match=message):
            load_clip(name, device="cpu")


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_checkpoint_files_load(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "made-clip", CLIP_CONFIG)
    weights = load_file(model / "open_clip_model.safetensors")
    file = tmp_path / f"weights.{ending}"
    if ending == "pt":
        torch.save({"state_dict": weights}, file)
    else:
        file.write_bytes((model / "open_clip_model.safetensors").read_bytes())
    clip = load_clip(f"made-clip@{file}", device="cpu")
    assert clip.identity["model"] == f"made-clip@weights.{ending}"
    for name, value in clip.model.state_dict().items():
        assert torch.equal(value, weights[name])


def test_a_folder_without_weights_is_no_random_model(model: Path, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_bytes((model / "open_clip_config.json").read_bytes())
    with pytest.raises(ModelError, match="weights"):
        load_clip(f"local-dir:{tmp_path}", device="cpu")


def test_a_tags_own_normalisation_is_used(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for SigLIP, whose mean and std are not CLIP's; a checkpoint file alone says nothing and gets CLIP's."""
    file = str(model / "open_clip_model.safetensors")
    tag = {"file": file, "mean": (0.5, 0.5, 0.5), "std": (0.1, 0.2, 0.3)}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "made-clip", CLIP_CONFIG)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "made-clip", {"made": tag})
    clip = load_clip("made-clip@made", device="cpu")
    assert (clip.mean, clip.std) == (tag["mean"], tag["std"])
    assert load_clip(f"made-clip@{file}", device="cpu").mean == open_clip.OPENAI_DATASET_MEAN


def test_cosine_stays_within_one_when_half_precision_rounds_up() -> None:
    longest = np.full((1, 1, 1, 3), np.float16(0.5776))  # 1/sqrt(3), rounded up: the length is a little over 1
    text = np.full((1, 3), 1 / np.sqrt(3), np.float32)
    assert np.linalg.norm(longest.astype(np.float64)) > 1.0003
    assert cosine(longest, text).item() == 1 and cosine(longest, -text).item() == -1


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "made-clip", CLIP_CONFIG)

    class Touches:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": {"x": Touches()}}, tmp_path / "evil.pt")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_clip(f"made-clip@{tmp_path / 'evil.pt'}", device="cpu")
    assert not (tmp_path / "ran").exists()
