"""The report of a dataset's copy: counts against official numbers, for datasets with and without texts."""

import pytest

from stm.config import BenchmarkDataset
from stm.datasets.copies import CopyReport, SplitCounts, check_copy
from stm.datasets.folder import DatasetError

DATASET = BenchmarkDataset(source="ucf101", root="videos", annotations="lists")


def test_a_table_without_texts_has_three_columns() -> None:
    report = CopyReport("Clips", "clips", {"train": SplitCounts(1000, 999, (1000,))}, {"a.mp4": 1})
    assert report.table().splitlines() == [
        "Clips: clips",
        "  split     official       listed      on disk",
        "  train        1,000        1,000          999",
    ]


def test_a_table_with_texts_says_what_is_known_of_them() -> None:
    splits = {
        "train": SplitCounts(8, 8, texts=20, published=10),
        "test": SplitCounts(4, 4, (5, 4), texts=7, official_texts=7),
        "val": SplitCounts(2, 2, texts=3),
    }
    assert CopyReport("Texts", "videos", splits, {}).table().splitlines() == [
        "Texts: videos, and texts about them",
        "  split     official       listed      on disk        texts     official",
        "  train          ~10            8            8           20            ?",
        "  test             4            4            4            7            7",
        "  val              ?            2            2            3            ?",
    ]


@pytest.mark.parametrize(
    ("counts", "official"),
    [
        (SplitCounts(4, 0, (5, 4)), True),
        (SplitCounts(3, 0, (5, 4)), False),
        (SplitCounts(3, 0, (0,)), False),  # a split that the benchmark does not have
        (SplitCounts(3, 0), True),
        (SplitCounts(3, 0, published=10), True),
        (SplitCounts(3, 0, texts=2, official_texts=3), False),
    ],
)
def test_sizes_are_official_as_far_as_they_are_known(counts: SplitCounts, official: bool) -> None:
    assert CopyReport("x", "clips", {"train": counts}, {}).is_official is official


def test_missing_files_come_with_their_clips_and_at_most_ten_are_shown() -> None:
    missing = {f"{number}.mp4": number for number in range(1, 13)}
    report = CopyReport("x", "videos", {"train": SplitCounts(100, 22, (100,))}, missing, linked_folders=("a", "b"))
    lines = report.describe().splitlines()[3:]
    assert lines[0] == "78 videos have no file. The first of 12 missing files:"
    assert lines[1:3] == ["  1.mp4", "  2.mp4 (2 videos)"] and lines[10] == "  10.mp4 (10 videos)"
    assert lines[11] == "Linked folders are not searched: a, b. Set dataset.root to the folder that they point to."


def test_a_line_that_cannot_be_used_makes_a_copy_incomplete() -> None:
    report = CopyReport("x", "clips", {"train": SplitCounts(3, 3, (3,))}, {}, problems=("line 4: bad",))
    assert not report.is_complete
    assert report.describe().endswith("1 lines or files cannot be used. The first:\n  line 4: bad")
    with pytest.raises(DatasetError, match="is not a complete copy of x") as error:
        check_copy(report, DATASET, "https://example.org")
    assert "partial: true" in str(error.value)
    assert check_copy(report, DATASET, "", may_be_partial=True) is report
    assert check_copy(report, DATASET.model_copy(update={"partial": True}), "") is report


def test_lists_of_another_size_are_refused_before_files_are_looked_at() -> None:
    report = CopyReport("x", "clips", {"train": SplitCounts(3, 0, (4,))}, {"a.mp4": 3})
    with pytest.raises(DatasetError, match="not the official ones") as error:
        check_copy(report, DATASET.model_copy(update={"partial": True}), "https://example.org")
    assert "Get them from https://example.org" in str(error.value) and "a.mp4" not in str(error.value)
