"""Small copies of the benchmarks: lists in exactly the official formats, and empty files in the official layouts."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from stm.config import BenchmarkDataset
from stm.datasets.actions import BENCHMARKS

SSV2_LABELS = {
    "Holding something next to something": "0",
    "Something falling like a feather or paper": "1",
    "Stacking number of something": "2",
}
EPIC_HEADER = (
    "uid,participant_id,video_id,narration,start_timestamp,stop_timestamp,start_frame,stop_frame,verb,verb_class,noun,"
    "noun_class,all_nouns,all_noun_classes\n"
)


@dataclass(frozen=True)
class Copy:
    """A benchmark on the disk: `files` are all that its lists name, `listed` the clips of each split."""

    dataset: BenchmarkDataset
    files: tuple[Path, ...]
    listed: Mapping[str, int]

    def with_(self, **changes: Any) -> BenchmarkDataset:
        return self.dataset.model_copy(update=changes)

    @property
    def root(self) -> Path:
        return Path(self.dataset.root)

    @property
    def annotations(self) -> Path:
        return Path(self.dataset.annotations)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())


def kinetics(lists: Path) -> tuple[list[str], dict[str, int]]:
    write(
        lists / "train.csv",
        "label,youtube_id,time_start,time_end,split,is_cc\n"
        '"testifying",---QUuC4vJs,84,94,train,0\n'
        '"massaging person\'s head",--3ouPhoy2A,20,30,train,0\n'
        "eating spaghetti,-0RDtzQ4DwI,1063,1073,train,1\n",
    )
    write(
        lists / "val.csv",
        "label,youtube_id,time_start,time_end,split\r\n"  # as another release writes it
        "javelin throw,--07WQ2iBlw,1.0,11.0,validate\r\n",
    )
    files = ["train/---QUuC4vJs_000084_000094.mp4", "train/--3ouPhoy2A_000020_000030.mp4"]
    files += ["train/-0RDtzQ4DwI_001063_001073.mp4", "val/--07WQ2iBlw_000001_000011.mp4"]
    return files, {"train": 3, "val": 1}


def something_something(lists: Path) -> tuple[list[str], dict[str, int]]:
    write(lists / "labels/labels.json", json.dumps(SSV2_LABELS))
    train = [
        {
            "id": "78687",
            "label": "holding potato next to vicks vaporub bottle",
            "template": "Holding [something] next to [something]",
            "placeholders": ["potato", "vicks vaporub bottle"],
        },
        {
            "id": "8675",
            "label": "stacking 3 \u201ccoins\u201d",
            "template": "Stacking [number of] [something]",
            "placeholders": ["3", "\u201ccoins\u201d"],
        },
    ]
    write(lists / "labels/train.json", json.dumps(train))
    val = {
        "id": "36585",
        "label": "plastic falling like a feather or paper",
        "template": "[Something] falling like a feather or paper",
        "placeholders": ["plastic"],
    }
    write(lists / "labels/validation.json", json.dumps([val]))
    write(lists / "labels/test.json", json.dumps([{"id": "1420"}]))
    files = [f"20bn-something-something-v2/{video}.webm" for video in (78687, 8675, 36585)]
    return files, {"train": 2, "val": 1}


def ucf101(lists: Path) -> tuple[list[str], dict[str, int]]:
    folder = lists / "ucfTrainTestlist"
    write(folder / "classInd.txt", "1 ApplyEyeMakeup\r\n37 HandstandPushups\r\n101 YoYo\r\n")
    train = ["ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1", "YoYo/v_YoYo_g25_c05.avi 101"]
    train += ["HandstandPushups/v_HandStandPushups_g08_c01.avi 37"]
    test = ["ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi"]
    write(folder / "trainlist01.txt", "\r\n".join([*train, ""]))
    write(folder / "testlist01.txt", "\r\n".join([*test, ""]))
    write(folder / "trainlist02.txt", f"{test[0]} 1\n{train[1]}\n{train[2]}\n")
    write(folder / "testlist02.txt", train[0].split()[0] + "\n")
    files = [f"UCF-101/{line.split()[0]}" for line in (*train, *test)]
    return files, {"train": 3, "test": 1}


HMDB51_FILES = {
    "brush_hair": {"April_09_brush_hair_u_nm_np1_ba_goo_0.avi": "1", "Aussie_Brunette_brush_hair_u_nm.avi": "0"},
    "clap": {"#20_Rhythm_clap_u_nm_np5_fr_goo_0.avi": "1", "a (b) [c] & d!;e_clap_u_nm_np1_fr_bad_1.avi": "2"},
    "shoot_bow": {"6arrowswithin30seconds_shoot_bow_f_nm_np1_fr_med_0.avi": "1", "same.avi": "2"},
    "sit": {"same.avi": "1"},
}


def hmdb51(lists: Path) -> tuple[list[str], dict[str, int]]:
    swapped = {"1": "2", "2": "1", "0": "0"}
    for action, lines in HMDB51_FILES.items():
        folder = lists / "testTrainMulti_7030_splits"
        write(folder / f"{action}_test_split1.txt", "".join(f"{name} {flag} \n" for name, flag in lines.items()))
        other = "".join(f"{name} {swapped[flag]} \n" for name, flag in lines.items())
        write(folder / f"{action}_test_split2.txt", other)
    files = [f"{action}/{name}" for action, lines in HMDB51_FILES.items() for name in lines]
    return files, {"train": 4, "test": 2}


def diving48(lists: Path) -> tuple[list[str], dict[str, int]]:
    vocabulary = [["Back", "15som", "05Twis", "FREE"], ["Forward", "Dive", "NoTwis", "STR"]]
    write(lists / "Diving48_vocab.json", json.dumps(vocabulary))
    train = [("-mmq0PT-u8k_00155", 0, 48), ("_8Vy3dlHg2w_00000", 1, 99)]
    for split, rows in (("train", train), ("test", [("2x00lRzlTVQ_00001", 1, 70)])):
        keys = ("vid_name", "label", "end_frame")
        entries = [{**dict(zip(keys, row, strict=True)), "start_frame": 0} for row in rows]
        write(lists / f"Diving48_V2_{split}.json", json.dumps(entries))
    return [f"rgb/{name}.mp4" for name in ("-mmq0PT-u8k_00155", "_8Vy3dlHg2w_00000", "2x00lRzlTVQ_00001")], {
        "train": 2,
        "test": 1,
    }


def epic_kitchens(lists: Path) -> tuple[list[str], dict[str, int]]:
    write(
        lists / "EPIC_train_action_labels.csv",
        EPIC_HEADER + "0,P01,P01_01,open door,00:00:00.14,00:00:03.37,8,202,open,2,door,8,['door'],[8]\n"
        "45,P01,P01_01,pour courgette onto pan,00:04:10.05,00:04:17.87,15003,15472,pour,7,courgette,69,"
        "\"['courgette', 'pan']\",\"[69, 1]\"\n"
        '24001,P22,P22_05,"put board, gently",01:00:59.5,01:01:02.25,1,2,put-down,1,board:cutting,19,'
        "['board:cutting'],[19]\n"
        "39236,P31,P31_14,close door,00:05:10.86,00:05:12.08,18651,18724,close,3,door,8,['door'],[8]\n",
    )
    write(
        lists / "EPIC_verb_classes.csv",
        "verb_id,class_key,verbs\n0,take,\"['take', 'grab']\"\n1,put,\"['put', 'put-down']\"\n2,open,['open']\n"
        "3,close,['close']\n7,pour,['pour']\n12,turn-on,\"['turn-on', 'start']\"\n",
    )
    write(
        lists / "EPIC_noun_classes.csv",
        "noun_id,class_key,nouns\n1,pan,['pan']\n2,pan:dust,\"['pan:dust', 'dustpan']\"\n8,cupboard,\"['cupboard', 'door']\"\n"
        "19,board:chopping,\"['board:chopping', 'board:cutting']\"\n69,courgette,['courgette']\n",
    )
    return ["P01/P01_01.MP4", "P22/P22_05.MP4", "P31/P31_14.MP4"], {"train": 3, "val": 1}


MAKERS = {
    "kinetics-400": kinetics,
    "something-something-v2": something_something,
    "ucf101": ucf101,
    "hmdb51": hmdb51,
    "diving48": diving48,
    "epic-kitchens-55": epic_kitchens,
}


def make_copy(source: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Copy:
    """Writes a whole copy, and makes its small lists the official ones."""
    names, listed = MAKERS[source](folder / "lists")
    files = [folder / "videos" / name for name in names]
    for file in files:
        write(file, "")
    counts = {fold: listed if fold == 1 else dict.fromkeys(listed, 1) for fold in (1, 2, 3)}
    monkeypatch.setitem(BENCHMARKS, source, replace(BENCHMARKS[source], counts=counts))
    data = {"source": source, "root": str(folder / "videos"), "annotations": str(folder / "lists")}
    return Copy(BenchmarkDataset.model_validate(data), tuple(files), listed)
