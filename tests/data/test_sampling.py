"""Which frames are taken, against VideoMAE's rules spelled out step by step."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from stm.data.sampling import sample_window, spread_positions, view_windows


def advance_while_inside(start: int, frames: int, stride: int, stored: int) -> list[int]:
    """VideoMAE's rule (notes, 4.2): take the frame, and advance only while the next one is inside the clip."""
    positions, offset = [], start
    for _ in range(frames):
        positions.append(offset)
        if offset + stride < stored:
            offset += stride
    return positions


def test_positions_follow_videomae_s_rule_for_every_length() -> None:
    for stored in range(1, 30):
        for stride in range(1, 6):
            for frames in (1, 2, 4, 8):
                for start in range(0, stored, 3):
                    expected = advance_while_inside(start, frames, stride, stored)
                    assert spread_positions(start, frames, stride, stored).tolist() == expected


@pytest.mark.parametrize(("stored", "starts"), [(20, 13), (8, 1), (9, 2), (5, 1), (1, 1)])
def test_training_windows_start_wherever_frames_times_stride_fit(stored: int, starts: int) -> None:
    generator = np.random.default_rng(0)
    drawn = [sample_window(generator, 4, 2, stored) for _ in range(600)]
    assert {int(window[0]) for window in drawn} == set(range(starts))
    assert all(window.max() < stored and len(window) == 4 for window in drawn)


def test_starts_are_uniform() -> None:
    generator = np.random.default_rng(1)
    starts = [int(sample_window(generator, 4, 1, 13)[0]) for _ in range(10_000)]
    share = np.bincount(starts, minlength=10) / 10_000
    assert np.abs(share - 0.1).max() < 5 * np.sqrt(0.1 * 0.9 / 10_000)


def test_windows_of_every_fourth_frame_are_near_videomae_s_and_fewer() -> None:
    """The numbers of docs/datasets.md: Kinetics' clips have 300 frames, of which every fourth is stored (config/tgm.yaml)."""
    generator = np.random.default_rng(2)
    ours = np.array(sorted({4 * int(sample_window(generator, 16, 1, 75)[0]) for _ in range(3_000)}))
    theirs = np.array(sorted({int(sample_window(generator, 16, 4, 300)[0]) for _ in range(6_000)}))
    assert theirs.tolist() == list(range(300 - 64 + 1)) and len(theirs) == 237
    assert len(ours) == 60
    away = np.abs(theirs[:, None] - ours).min(axis=1)
    assert away.max() == 2 and away.mean() == pytest.approx(1.0, abs=0.01)
    # The views of a test are the same frames.
    stored = [(4 * window).tolist() for window in view_windows(5, 16, 1, 75)]
    assert stored == [window.tolist() for window in view_windows(5, 16, 4, 300)]


def cut_every_stride(view: int, views: int, frames: int, stride: int, stored: int) -> list[int]:
    """VideoMAE's test on Kinetics (notes, 4.3): every stride-th frame of the video, then starts from 0 to T - frames."""
    taken = list(range(0, stored, stride))
    while len(taken) < frames:
        taken.append(taken[-1])
    start = int(Fraction(view * (len(taken) - frames), views - 1))
    return taken[start : start + frames]


@pytest.mark.parametrize("views", [2, 3, 5, 10])
def test_dense_views_are_videomae_s_for_every_length(views: int) -> None:
    for stored in range(1, 401):
        for frames, stride in ((16, 4), (8, 1), (4, 7)):
            expected = [cut_every_stride(view, views, frames, stride, stored) for view in range(views)]
            assert [window.tolist() for window in view_windows(views, frames, stride, stored)] == expected


def test_views_spread_from_the_first_window_to_the_last() -> None:
    windows = view_windows(5, 16, 1, 75)  # VideoMAE on Kinetics: 5 starts from 0 to T - 16
    assert [int(window[0]) for window in windows] == [0, 14, 29, 44, 59]
    assert windows[-1][-1] == 74
    assert [window.tolist() for window in view_windows(1, 4, 2, 11)] == [[2, 4, 6, 8]]


def test_views_of_a_short_clip_all_show_what_there_is() -> None:
    assert [window.tolist() for window in view_windows(3, 4, 1, 2)] == [[0, 1, 1, 1]] * 3


def join_and_sort(views: int, segments: int, stored: int) -> list[list[int]]:
    """VideoMAE's test on Something-Something (notes, 4.3): {tick/2 + tick*x} and {tick*x}, sorted; view k takes k::2."""
    tick = stored / segments
    joined = [int(tick / 2 + tick * x) for x in range(segments)] + [int(tick * x) for x in range(segments)]
    return [sorted(joined)[view::views] for view in range(views)]


@pytest.mark.parametrize("segments", [8, 16])
def test_two_views_of_segments_are_videomae_s_for_every_length(segments: int) -> None:
    for stored in range(1, 401):
        windows = [window.tolist() for window in view_windows(2, segments, 1, stored, "tsn")]
        assert windows == join_and_sort(2, segments, stored)


@pytest.mark.parametrize(("views", "segments"), [(1, 16), (3, 16), (4, 12), (5, 7)])
def test_views_of_segments_are_phases_of_them_for_every_length(views: int, segments: int) -> None:
    phases = [Fraction(1, 2)] if views == 1 else [Fraction(view, views) for view in range(views)]
    for stored in range(1, 401):
        tick = Fraction(stored, segments)
        joined = sorted(int(tick * phase + tick * x) for phase in phases for x in range(segments))
        windows = [window.tolist() for window in view_windows(views, segments, 1, stored, "tsn")]
        assert windows == [joined[view::views] for view in range(views)]


def test_training_takes_one_frame_of_each_segment_for_every_length() -> None:
    generator = np.random.default_rng(0)
    for stored in range(1, 401):
        for segments in (4, 16):
            window = sample_window(generator, segments, 1, stored, "tsn")
            tick = Fraction(stored, segments)
            for x, position in enumerate(
                window.tolist()
            ):  # the frame [position, position + 1) reaches into the segment
                assert 0 <= position < stored
                assert position < tick * (x + 1) and position + 1 > tick * x


def test_frames_are_drawn_by_their_share_in_the_segment() -> None:
    """5 frames in 2 segments: the middle frame belongs to both by halves. VideoMAE's rule on 6 frames: equal thirds."""
    generator = np.random.default_rng(1)
    windows = np.array([sample_window(generator, 2, 9, 5, "tsn") for _ in range(20_000)])
    margin = 5 * np.sqrt(0.4 * 0.6 / 20_000)
    for segment, shares in enumerate([[0.4, 0.4, 0.2, 0, 0], [0, 0, 0.2, 0.4, 0.4]]):
        assert np.abs(np.bincount(windows[:, segment], minlength=5) / 20_000 - shares).max() < margin
    windows = np.array([sample_window(generator, 2, 9, 6, "tsn") for _ in range(20_000)])
    for segment in (0, 1):
        share = np.bincount(windows[:, segment] - 3 * segment, minlength=3) / 20_000
        assert np.abs(share - 1 / 3).max() < margin


def umts_frames(stored: int, frames: int, view: int | None = None, views: int = 1) -> list[tuple[int, int]]:
    """UMT's rule on Kinetics, frame by frame: the first and the last frame that may be drawn; for a view the same frame twice."""
    segment = (stored - 1) / frames
    found = []
    for number in range(frames):
        first, last = round(segment * number), round(segment * (number + 1))  # ties to even, like numpy
        if view is not None:
            first = last = min(first + int(segment / (views + 1) * (view + 1)), stored - 1)
        found.append((first, last))
    return found


def test_sparse_windows_are_umts_for_every_length() -> None:
    for stored in range(1, 401):
        for frames, views in ((8, 4), (8, 1), (16, 3)):
            windows = view_windows(views, frames, 1, stored, "sparse")
            expected = [umts_frames(stored, frames, view, views) for view in range(views)]
            assert [window.tolist() for window in windows] == [[first for first, _ in one] for one in expected]
    # Not at the segments' starts, as with `tsn`: of 300 frames in 8 segments, 7 to 29 frames after them.
    assert [window[0] for window in view_windows(4, 8, 1, 300, "sparse")] == [7, 14, 22, 29]
    assert [window[0] for window in view_windows(4, 8, 1, 300, "tsn")] == [0, 9, 18, 28]


def test_every_fourth_frame_gives_views_near_umts() -> None:
    """docs/datasets.md: of frames 4 apart, the four views are at most 6 frames from UMT's in 300 frames, 7 in 240 to 300."""

    def distances(decoded: int) -> list[int]:
        views = [(umts_frames(decoded, 8, view, 4), umts_frames(-(-decoded // 4), 8, view, 4)) for view in range(4)]
        return [abs(one[0] - 4 * other[0]) for pair in views for one, other in zip(*pair, strict=True)]

    assert max(distances(300)) == 6 and np.mean(distances(300)) == pytest.approx(3.4, abs=0.05)
    assert max(max(distances(decoded)) for decoded in range(240, 301)) == 7


def test_sparse_training_draws_from_all_of_a_segment_and_nothing_else() -> None:
    generator = np.random.default_rng(5)
    for stored in (1, 5, 8, 75, 300):
        windows = np.array([sample_window(generator, 8, 1, stored, "sparse") for _ in range(3_000)])
        bounds = umts_frames(stored, 8)
        for column, (first, last) in zip(windows.T, bounds, strict=True):
            assert set(column.tolist()) == set(range(first, last + 1))


def intervals_of(stored: int, frames: int) -> list[list[int]]:
    """The frames of each of UMT's intervals of a video with texts, in integers."""
    taken = min(frames, stored)
    ends = [stored * number // taken for number in range(taken + 1)]
    return [list(range(*pair)) for pair in pairwise(ends)]


def test_interval_windows_are_the_middle_frames_for_every_length() -> None:
    for frames in (4, 12):
        for stored in range(1, 200):
            middles = [part[(len(part) - 1) // 2] for part in intervals_of(stored, frames)]
            [window] = view_windows(1, frames, 1, stored, "intervals")
            assert window.tolist() == middles + middles[-1:] * (frames - len(middles))
    # Stored as config/base/video-language.yaml does, the middle frames are those of `tsn`; of 48 frames they are not.
    for frames, stored in ((4, 60), (12, 60)):
        assert view_windows(1, frames, 1, stored, "tsn")[0].tolist() == [
            part[len(part) // 2] for part in intervals_of(stored, frames)
        ]
    assert view_windows(1, 12, 1, 48, "intervals")[0].tolist() == list(range(1, 48, 4))
    assert view_windows(1, 12, 1, 48, "tsn")[0].tolist() == list(range(2, 48, 4))
    parts = view_windows(2, 4, 1, 40, "intervals")
    assert [window.tolist() for window in parts] == [[2, 12, 22, 32], [6, 16, 26, 36]]


@pytest.mark.parametrize("stored", [24, 30, 45, 48, 61])
def test_interval_training_never_draws_the_last_frame_of_an_interval(stored: int) -> None:
    generator = np.random.default_rng(6)
    windows = np.array([sample_window(generator, 12, 1, stored, "intervals") for _ in range(300)])
    for column, part in zip(windows.T, intervals_of(stored, 12), strict=True):
        assert set(column.tolist()) == set(part[:-1])


def test_interval_training_draws_from_the_whole_clip_if_an_interval_has_one_frame() -> None:
    generator = np.random.default_rng(7)
    windows = np.array([sample_window(generator, 12, 1, 20, "intervals") for _ in range(600)])
    assert (np.diff(windows, axis=1) > 0).all()
    share = np.bincount(windows.ravel(), minlength=20) / 600
    assert np.abs(share - 12 / 20).max() < 5 * np.sqrt(0.6 * 0.4 / 600)
    for stored in (1, 5, 12):
        whole = [*range(stored), *[stored - 1] * (12 - stored)]
        assert sample_window(generator, 12, 1, stored, "intervals").tolist() == whole


def test_a_clip_shorter_than_its_segments_is_shown_as_a_whole() -> None:
    generator = np.random.default_rng(2)
    window = sample_window(generator, 16, 1, 5, "tsn")
    assert (np.diff(window) >= 0).all() and set(window.tolist()) == set(range(5))
