"""Windows lie where VideoMAE's test and sliding windows would, on the frames that packing stores."""

import numpy as np

from stm.features.windows import Grid, WindowPlan


def grid(frames: int, every: int = 1, rate: float = 10.0) -> Grid:
    return Grid.every([number / rate for number in range(frames)], every)


def videomae_views(frames: int, length: int, step: int, views: int) -> list[list[int]]:
    """VideoMAE's Kinetics test (kinetics.py): every `step`-th frame, padded by the last one, then `length` from each start."""
    taken = list(range(0, frames, step))
    taken += [taken[-1]] * max(0, length - len(taken))
    stride = max(0, len(taken) - length) / (views - 1)
    return [taken[int(view * stride) : int(view * stride) + length] for view in range(views)]


def as_frames(windows: list[np.ndarray], on: Grid) -> list[list[int]]:
    return [[on.indices[position] for position in window] for window in windows]


def test_spread_windows_are_those_of_videomaes_test_also_in_short_videos() -> None:
    for frames in (1, 5, 63, 64, 65, 300):
        on = grid(frames, 4)
        windows = WindowPlan(16, 4, count=5).cut(on)
        assert as_frames(windows, on) == videomae_views(frames, 16, 4, 5), frames


def test_a_single_window_is_in_the_middle() -> None:
    on = grid(101, 2)  # 51 frames on the grid
    (window,) = WindowPlan(5, 2).cut(on)
    assert as_frames([window], on) == [[46, 48, 50, 52, 54]]


def test_sliding_windows_are_whole_and_start_at_multiples_of_the_stride() -> None:
    on = grid(50, 2)  # 10 frames per second: every 0.2 s on the grid
    windows = as_frames(WindowPlan(4, 2, stride_seconds=1.0).cut(on), on)
    assert [window[0] for window in windows] == [0, 10, 20, 30, 40]
    assert windows[-1] == [40, 42, 44, 46]
    assert [w[0] for w in as_frames(WindowPlan(4, 2, stride_frames=15).cut(on), on)] == [0, 16, 30]
    # A stride below the step of the grid cannot be met.
    assert len(WindowPlan(4, 2, stride_frames=1).cut(on)) == 25 - 4 + 1
    assert as_frames(WindowPlan(4, 2, stride_seconds=1.0).cut(grid(3, 2)), on) == [[0, 2, 2, 2]]


def test_a_wrong_time_far_away_costs_no_memory() -> None:
    assert len(WindowPlan(2, stride_seconds=1.0).cut(Grid([0, 4, 8], [0.0, 1e14, 2e14]))) == 2


def test_damaged_frames_are_not_on_the_grid_and_no_frames_are_no_windows() -> None:
    assert Grid.every([0.0, 0.1, 0.2, 0.3, 0.4], 2, frozenset({2})).indices == [0, 4]
    assert WindowPlan(4).cut(grid(0)) == []


def test_windows_of_segments_cover_the_whole_video() -> None:
    (window,) = WindowPlan(4, 1, sampling="tsn").cut(grid(100))
    assert window.tolist() == [12, 37, 62, 87]
