"""The official lists of the action benchmarks, with generated names and labels, at their official length."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any

from stm.config import BenchmarkDataset
from stm.datasets.actions import official_counts
from stm.storage.files import write_bytes

# Where the official archives put a video below the root; elsewhere the list's path is the place.
_FOLDERS = {
    "kinetics-400": "{split}",
    "something-something-v2": "20bn-something-something-v2",
    "ucf101": "UCF-101",
    "diving48": "rgb",
}


def write_lists(dataset: BenchmarkDataset, folder: Path) -> None:
    """Write the annotation files of a benchmark below `folder`."""
    _WRITERS[dataset.source](dataset, folder, official_counts(dataset.source, dataset.fold))


def place_of(source: str, path: str, split: str) -> PurePosixPath:
    """Return where a listed file lies below the root of an official copy."""
    return PurePosixPath(_FOLDERS.get(source, "").format(split=split)) / path


def _kinetics(dataset: BenchmarkDataset, folder: Path, counts: Mapping[str, int]) -> None:
    """As CVDF hosts them: `label,youtube_id,time_start,time_end,split,is_cc`."""
    number = 0
    for split, count in counts.items():
        lines = ["label,youtube_id,time_start,time_end,split,is_cc"]
        for index in range(count):
            # Eleven characters, as on YouTube, of which the first may be a dash.
            start = index % 290
            lines.append(f"action number {index % 400},-{number:010d},{start},{start + 10},{split},0")
            number += 1
        _write(folder / f"{split}.csv", "\n".join([*lines, ""]))


def _something(dataset: BenchmarkDataset, folder: Path, counts: Mapping[str, int]) -> None:
    """As in Qualcomm's archive of labels: a template with placeholders, and the label with them filled in."""
    templates = [f"Moving [something] in way {number}" for number in range(174)]
    plain = {template.replace("[", "").replace("]", ""): str(n) for n, template in enumerate(templates)}
    _write_json(folder / "labels/labels.json", plain)
    number = 0
    for split, name in (("train", "train"), ("val", "validation")):
        rows = []
        for index in range(counts[split]):
            template, number = templates[index % 174], number + 1
            label = template.replace("[something]", "a red circle").lower()
            rows.append({"id": str(number), "label": label, "template": template, "placeholders": ["a red circle"]})
        _write_json(folder / f"labels/{name}.json", rows)
    _write_json(folder / "labels/test.json", [{"id": str(number + 1)}])


def _ucf101(dataset: BenchmarkDataset, folder: Path, counts: Mapping[str, int]) -> None:
    classes = [f"ActionNumber{chr(65 + number // 26)}{chr(97 + number % 26)}" for number in range(101)]
    lists = folder / "ucfTrainTestlist"
    _write(lists / "classInd.txt", "".join(f"{n} {name}\r\n" for n, name in enumerate(classes, 1)))
    group = 0
    for split in ("train", "test"):
        lines = []
        for index in range(counts[split]):
            name = classes[index % 101]
            group += index % 101 == 0
            number = f" {index % 101 + 1}" if split == "train" else ""
            lines.append(f"{name}/v_{name}_g{group:02d}_c01.avi{number}\r\n")
        _write(lists / f"{split}list{dataset.fold:02d}.txt", "".join(lines))


def _hmdb51(dataset: BenchmarkDataset, folder: Path, counts: Mapping[str, int]) -> None:
    lists = folder / "testTrainMulti_7030_splits"
    for number in range(51):
        name = f"action_number_{number}"
        flags = ["1"] * (counts["train"] // 51) + ["2"] * (counts["test"] // 51) + ["0"] * 3
        # Real names have such characters.
        lines = [f"#{n}_a_(b)_[c]_&_d!_{name}_f_nm_np1_fr_med_0.avi {flag} \n" for n, flag in enumerate(flags)]
        _write(lists / f"{name}_test_split{dataset.fold}.txt", "".join(lines))


def _diving48(dataset: BenchmarkDataset, folder: Path, counts: Mapping[str, int]) -> None:
    takeoffs, turns = ("Back", "Forward", "Inward", "Reverse"), ("15som", "25som", "Dive")
    dives = product(takeoffs, turns, ("NoTwis", "05Twis"), ("FREE", "PIKE"))
    _write_json(folder / "Diving48_vocab.json", [list(dive) for dive in dives])
    for split in ("train", "test"):
        rows = [
            {"vid_name": f"-{split}_{index:05d}", "label": index % 48, "start_frame": 0, "end_frame": 96}
            for index in range(counts[split])
        ]
        _write_json(folder / f"Diving48_V2_{split}.json", rows)


def _epic_kitchens(dataset: BenchmarkDataset, folder: Path, counts: Mapping[str, int]) -> None:
    """Segments of one to four seconds, eight to a video."""
    lists = folder / "epic-kitchens-55-annotations"
    columns = ["uid", "participant_id", "video_id", "narration", "start_timestamp", "stop_timestamp", "start_frame"]
    columns += ["stop_frame", "verb", "verb_class", "noun", "noun_class", "all_nouns", "all_noun_classes"]
    rows = _epic_segments(counts)
    _write(lists / "EPIC_train_action_labels.csv", _table(columns, rows))
    verbs = [[number, f"verb-{number}", f"['verb-{number}']"] for number in range(125)]
    nouns = [[number, f"noun:{number}", f"['noun:{number}']"] for number in range(352)]
    _write(lists / "EPIC_verb_classes.csv", _table(["verb_id", "class_key", "verbs"], verbs))
    _write(lists / "EPIC_noun_classes.csv", _table(["noun_id", "class_key", "nouns"], nouns))


def _epic_segments(counts: Mapping[str, int]) -> Iterator[list[Any]]:
    number = 0
    for split, first, participants in (("train", 1, 25), ("val", 26, 6)):
        for index in range(counts[split]):
            video, place = divmod(index, 8)
            participant = f"P{first + video % participants:02d}"
            start, kind = place * 0.5, index % 64
            times = [f"00:00:{second:05.2f}" for second in (start, start + 3)]
            labels = [f"verb-{kind}", kind, f"noun:{kind}", kind, f"['noun:{kind}']", f"[{kind}]"]
            name = f"{participant}_{video // participants + 1:02d}"
            yield [number, participant, name, f"verb {kind} the noun", *times, 1, 180, *labels]
            number += 1


def _table(columns: list[str], rows: Iterator[list[Any]] | list[list[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([columns, *rows])
    return text.getvalue()


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, text.encode())


def _write_json(path: Path, value: Any) -> None:
    _write(path, json.dumps(value))


_WRITERS: dict[str, Callable[[BenchmarkDataset, Path, Mapping[str, int]], None]] = {
    "kinetics-400": _kinetics,
    "something-something-v2": _something,
    "ucf101": _ucf101,
    "hmdb51": _hmdb51,
    "diving48": _diving48,
    "epic-kitchens-55": _epic_kitchens,
}
