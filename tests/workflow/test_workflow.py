"""The workflow as a whole: what runs, what is rerun, and how bad input is handled, by Snakemake on small real videos."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

CLIPS = 5  # with another one two shards, too
RUN = {
    "model": "tiny",
    "image_size": 32,
    "frames": 4,
    "mask": {"strategy": "text_top", "ratio": 0.5},
    "optimisation": {"epochs": 1, "batch_size": 2, "warmup_epochs": 0},
    "workers": 0,
}
CONFIG = {
    "name": "small",
    "dataset": {"source": "folder", "root": "videos", "annotations": "videos/clips.csv"},
    "shard_size": 3,
    "grid": 4,
    "frames": {"every": 2, "short_side": 64},
    "captions": {"human": {"kind": "human"}, "label": {"kind": "label"}},
    "similarity": {"model": f"local-dir:{ROOT / 'stm/assets/demo-clip'}", "batch_size": 256},
    "pack": {"captions": "human"},
    "pretrain": {"text": RUN},
    "report": {"clips": 1, "split": "train"},
}


def write_config(folder: Path, **changes: object) -> None:
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | changes))


def write_annotations(folder: Path, rows: list[tuple[str, str]]) -> None:
    lines = ["path,caption,label", *(f"{path},{caption},{path[0]}" for path, caption in rows)]
    (folder / "videos/clips.csv").write_text("\n".join(lines) + "\n")


def snakemake(folder: Path, *arguments: str) -> str:
    """Run the workflow in `folder` and return everything that it printed."""
    command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "workflow/Snakefile"), "--directory", str(folder)]
    command += ["--cores", "1", "--configfile", str(folder / "config.yaml"), *arguments]
    finished = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    printed = finished.stdout + finished.stderr
    assert finished.returncode == 0, printed[-6000:]
    return printed


def jobs(printed: str) -> dict[str, int]:
    """Number of jobs by rule, from the output of Snakemake."""
    counts: dict[str, int] = {}
    for rule in re.findall(r"^(?:local)?(?:rule|checkpoint) (\w+):", printed, re.M):
        counts[rule] = counts.get(rule, 0) + 1
    return counts


def content(folder: Path) -> dict[str, str]:
    """Hashes of the results by path, without logs, benchmarks and the page and plan, which depend on the time."""
    skipped = (
        "logs/",
        "benchmarks/",
        "pretrain/text/tensorboard",
        "pretrain/text/checkpoints",
        "report.html",
        "provenance.json",
        "plan.json",
    )
    found = {}
    for path in sorted((folder / "results/small").rglob("*")):
        name = path.relative_to(folder / "results/small").as_posix()
        if path.is_file() and not name.startswith(skipped) and path.name != "metrics.jsonl":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory, encode_video, texture) -> Path:
    """A folder of clips in two shards, on which the workflow has finished."""
    folder = tmp_path_factory.mktemp("finished")
    rows = []
    for number in range(CLIPS):
        encode_video(folder / f"videos/clip{number}.mp4", texture(seed=number))
        rows.append((f"clip{number}.mp4", f"a red circle number {number}"))
    write_annotations(folder, rows)
    write_config(folder)
    ran = jobs(snakemake(folder))
    shards = list((folder / "results/small/slices").iterdir())
    assert ran["frames"] == ran["motion"] == len(shards) == 2
    assert {
        "manifest",
        "split",
        "captions",
        "similarity",
        "motion",
        "shards",
        "pretrain",
        "report",
        "plan",
    } <= set(ran)
    assert (folder / "results/small/report.html").stat().st_size > 10_000
    return folder


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_touching_nothing_reruns_nothing(copy):
    os.utime(ROOT / "workflow/scripts/stage.py")  # as after each installation of the package
    printed = snakemake(copy)
    assert "Nothing to be done" in printed
    assert jobs(printed) == {}


def test_another_caption_source_reruns_captions_and_what_follows_only(copy):
    before = content(copy)
    write_config(copy, pack={"captions": "label"})
    planned = jobs(snakemake(copy, "--dry-run"))
    assert "similarity" in planned
    assert not {"manifest", "split", "frames", "motion"} & set(planned)
    ran = jobs(snakemake(copy))
    assert not {"manifest", "split", "frames", "motion"} & set(ran)
    assert {"similarity", "shards", "pretrain", "report"} <= set(ran)
    after = content(copy)
    assert {
        n: h for n, h in before.items() if n.startswith(("frames/", "motion/", "similarity/human"))
    }.items() <= after.items()
    assert before["pretrain/text/weights.safetensors"] != after["pretrain/text/weights.safetensors"]


def test_changed_settings_of_a_source_rerun_that_source_only(copy):
    captions = {"human": {"kind": "human"}, "label": {"kind": "label", "templates": ["{} is what happens"]}}
    write_config(copy, captions=captions)
    ran = jobs(snakemake(copy))
    assert ran["captions"] == len(list((copy / "results/small/slices").iterdir()))
    assert not {"manifest", "split", "frames", "motion", "similarity", "shards", "pretrain"} & set(ran)


def test_what_changes_no_byte_reruns_nothing(copy):
    changes = {
        "frames": CONFIG["frames"] | {"timeout_seconds": 5},
        "motion": {"timeout_seconds": 5},
        "bad_input": {"max_failure_rate": 0.9},
        "pretrain": {"text": RUN | {"workers": 1, "checkpoint_every": 7, "checkpoints_kept": 1}},
    }
    write_config(copy, **changes)
    assert set(jobs(snakemake(copy, "--dry-run"))) <= {"plan", "report", "all"}
    (copy / "videos").rename(copy / "moved")
    dataset = {"source": "folder", "root": "moved", "annotations": "moved/clips.csv"}
    write_config(copy, **changes, dataset=dataset)
    assert set(jobs(snakemake(copy))) <= {"manifest", "split", "plan", "report", "all"}


def test_a_limit_of_the_manifest_reruns_the_manifest(copy):
    write_config(copy, frames=CONFIG["frames"] | {"max_side": 80})
    assert "manifest" in jobs(snakemake(copy, "--dry-run"))


def test_one_video_added_reruns_one_shard(copy, encode_video, texture):
    encode_video(copy / "videos/new.mp4", texture(seed=99))
    lines = (copy / "videos/clips.csv").read_text()
    (copy / "videos/clips.csv").write_text(lines + "new.mp4,a new clip,n\n")
    before = content(copy)
    ran = jobs(snakemake(copy))
    assert ran["manifest"] == ran["split"] == 1
    assert ran["frames"] == ran["motion"] == ran["shards"] == 1
    assert ran["captions"] == 2  # two sources
    changed = {n for n, h in content(copy).items() if before.get(n) != h}
    assert len([n for n in changed if n.startswith("frames/") and n.endswith(".tar")]) == 1


def test_the_workflow_knows_shards_of_any_number(copy):
    """From 100,000 shards of a split on, names have six digits."""
    results = copy / "results/small"
    shards = ["train-00007", "train-99999", "train-100000", "train-1000000"]
    some_slice = next((results / "slices").iterdir())
    for shard in shards:
        shutil.copy(some_slice, results / f"slices/{shard}.parquet")
    (results / "slices.json").write_text(json.dumps({"shards": {shard: {"split": "train"} for shard in shards}}))
    printed = snakemake(copy, "--dry-run", "--rerun-triggers", "mtime")
    for stage in ("frames", "motion", "similarity", "shards"):
        assert jobs(printed)[stage] == len(shards)
    packed = [f"results/small/shards/train/{shard}.parquet" for shard in shards]
    pretraining = printed[printed.index("rule pretrain:") :]
    assert ", ".join(packed) in pretraining  # in the order of their numbers


def test_the_same_stages_by_hand_give_the_same_bytes(copy, monkeypatch):
    from stm.cli import main

    by_workflow = content(copy)
    shutil.rmtree(copy / "results")
    monkeypatch.chdir(copy)
    stages = [
        "manifest",
        "split",
        "frames",
        "captions",
        "similarity",
        "motion",
        "shards",
        "verify",
        "pretrain",
        "crop-agreement",
        "report",
    ]
    for stage in stages:
        extra = ["--source", "human"] if stage == "similarity" else []
        assert main([stage, "--config", "config.yaml", *extra]) == 0
    assert content(copy) == by_workflow


def test_bad_files_are_listed_with_their_reason_and_nothing_else_is_lost(copy, encode_video, texture):
    videos = copy / "videos"
    good = (videos / "clip0.mp4").read_bytes()
    encode_video(videos / "long.mp4", texture(frames=60), **{"bf": "0"})
    whole = (videos / "long.mp4").read_bytes()
    (videos / "long.mp4").unlink()
    encode_video(videos / "front.mp4", texture(frames=60, seed=5))
    subprocess.run(
        [
            _ffmpeg(),
            "-y",
            "-loglevel",
            "error",
            "-i",
            str(videos / "front.mp4"),
            "-c",
            "copy",
            "-movflags",
            "+faststart",
            str(videos / "truncated.mp4"),
        ],
        check=True,
    )
    (videos / "front.mp4").unlink()
    faststart = (videos / "truncated.mp4").read_bytes()
    (videos / "truncated.mp4").write_bytes(faststart[: len(faststart) * 6 // 10])
    (videos / "headless.mp4").write_bytes(whole[: len(whole) // 2])
    (videos / "empty.mp4").write_bytes(b"")
    (videos / "text.mp4").write_text("this is no video\n" * 50)
    subprocess.run(
        [_ffmpeg(), "-y", "-loglevel", "error", "-f", "lavfi", "-i", "sine=d=1", str(videos / "sound.mp4")],
        check=True,
    )
    encode_video(videos / "one.mp4", texture(frames=1))
    (videos / "silent.mp4").write_bytes(good)
    (copy / "outside.mp4").write_bytes(good)
    bad = ["truncated", "headless", "empty", "text", "sound", "one"]
    rows = [f"{name},{name}.mp4,a caption" for name in bad]
    rows += [
        "silent,silent.mp4,",
        "clip0,clip1.mp4,twice",
        "out,../outside.mp4,out",
        "absolute,/etc/hostname,out",
        "gone,gone.mp4,x",
    ]
    lines = (videos / "clips.csv").read_text().splitlines()[1:]
    known = [f"{line.split('.')[0]},{line.rsplit(',', 1)[0]}" for line in lines]
    (videos / "clips.csv").write_text("\n".join(["video_id,path,caption", *known, *rows]) + "\n")
    write_config(copy, captions={"human": {"kind": "human"}}, shard_size=CLIPS)
    snakemake(copy)
    table = (copy / "results/small/tables/quarantine.csv").read_text()
    reasons = {
        "truncated": "truncated",
        "headless": "open_failed",
        "empty": "empty_file",
        "text": "open_failed",
        "sound": "no_video_stream",
        "one": "too_short",
        "silent": "caption_",
        "clip0": "duplicate_id",
        "out": "path_outside_root",
        "absolute": "path_outside_root",
        "gone": "missing_file",
    }
    for video, reason in reasons.items():
        assert re.search(rf"^[^\n]*\b{video}\b[^\n]*{reason}", table, re.M), f"{video} {reason}\n{table}"
    packed = [
        key
        for path in (copy / "results/small/shards").rglob("*.parquet")
        for key in pq.read_table(path)["key"].to_pylist()
    ]
    assert sorted(packed) == sorted([*(f"clip{n}" for n in range(CLIPS)), "truncated"])
    page = (copy / "results/small/report.html").read_text()
    assert "path_outside_root" in page


def _ffmpeg() -> str:
    import imageio_ffmpeg

    return imageio_ffmpeg.get_ffmpeg_exe()


def test_a_wrong_key_stops_before_anything_runs(copy):
    write_config(copy, frames={"evry": 2})
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "-s",
        str(ROOT / "workflow/Snakefile"),
        "--directory",
        str(copy),
        "--dry-run",
    ]
    finished = subprocess.run(
        [*command, "--configfile", str(copy / "config.yaml")], capture_output=True, text=True, check=False
    )
    assert finished.returncode != 0
    assert "did you mean `every`" in finished.stdout + finished.stderr
    assert "Traceback" not in finished.stderr


def test_every_rule_and_target_is_explained():
    """In a line of `--list-rules`: also the tables, figures and groups of these that a config names."""
    command = [sys.executable, "-m", "snakemake", "--list-rules", "--cores", "1", "--configfile", "config/tgm.yaml"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    parts = [re.fullmatch(r"(\w+)(?: \((.+)\))?", line) for line in listed]
    rules = {part[1]: part[2] for part in parts}
    assert {"all", "pretrain", "report", "tgm_table1", "tgm_figure3", "tgm_figure3a"} <= rules.keys()
    assert [name for name, text in rules.items() if not text] == []
    assert len(set(rules.values())) == len(rules)


def test_the_plan_names_every_stage_that_runs(copy):
    plan = yaml.safe_load((copy / "results/small/plan.json").read_text())
    stages = {stage["stage"].split("/")[0] for stage in plan["stages"]}
    assert {"manifest", "frames", "captions", "similarity", "motion", "shards", "pretrain"} <= stages
    assert plan["datasets"]["small"]["clips"] == {"train": CLIPS}
