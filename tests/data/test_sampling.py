"""Which frames are taken, against VideoMAE's rule spelled out step by step."""

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


def test_views_spread_from_the_first_window_to_the_last() -> None:
    windows = view_windows(5, 16, 1, 75)  # VideoMAE on Kinetics: 5 starts from 0 to T - 16
    assert [int(window[0]) for window in windows] == [0, 15, 30, 44, 59]
    assert windows[-1][-1] == 74
    assert [window.tolist() for window in view_windows(1, 4, 2, 11)] == [[2, 4, 6, 8]]


def test_views_of_a_short_clip_all_show_what_there_is() -> None:
    assert [window.tolist() for window in view_windows(3, 4, 1, 2)] == [[0, 1, 1, 1]] * 3
