"""Captions per second: the stage's batches across clips, compared with one clip at a time in transformers.

    python -m benchmarks.captions                                     # the repository's small BLIP-2, on the CPU
    python -m benchmarks.captions --model FOLDER --precision bfloat16 --clips 64

Both read the same frames tar, caption three key frames per clip, and generate the same words. The peer works as a script
would: it reads the frames of a clip, prepares them and generates. With a model of a few megabytes most of the time is Python
overhead; use a real model on a GPU.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import median

import torch

from benchmarks._table import compare, report, take_turns, wall_seconds
from benchmarks.similarity import write_frames
from stm.config import Blip2Captions
from stm.jobs.journal import Journal
from stm.preprocess.captions.blip2 import Blip2Captioner, choose_key_frames
from stm.preprocess.frames.table import load_frame

SMALL = Path(__file__).parents[1] / "stm/assets/demo-blip2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SMALL), help="hub id or folder of a BLIP-2")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=32, help="key frames per forward pass")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    source = Blip2Captions(
        kind="blip2", model=arguments.model, batch_size=arguments.batch_size, precision=arguments.precision
    )
    captioner = Blip2Captioner(source)
    with tempfile.TemporaryDirectory() as folder:
        tar = Path(folder) / "frames.tar"
        rows = write_frames(tar, arguments.clips)
        key_frames = choose_key_frames(4, source.key_frames)
        captions: dict[str, list[list[str]]] = {}

        def stage() -> None:
            journal = Journal(Path(folder) / "captions.parquet", {})
            by_key = captioner.caption_clips(rows, tar, journal)
            journal.close()
            captions["stage"] = [[text for _, text in by_key[row["key"]].texts] for row in rows]

        def one_by_one() -> None:
            captions["peer"] = []
            for row in rows:
                pixels = captioner.prepare([load_frame(tar, row, number) for number in key_frames])
                captions["peer"].append([text.strip() for text in captioner.caption(pixels)])

        work = {"stage": lambda: wall_seconds(stage), "one by one": lambda: wall_seconds(one_by_one)}
        seconds = take_turns(work, arguments.rounds)
    count = len(key_frames) * len(rows)
    same = sum(
        a == b
        for ours, theirs in zip(captions["stage"], captions["peer"], strict=True)
        for a, b in zip(ours, theirs, strict=False)
    )
    print(f"{same} of {count} captions are identical; {torch.get_num_threads()} threads")
    rates = {name: [count / value for value in values] for name, values in seconds.items()}
    against = f"one clip at a time: {median(rates['one by one']):.1f} captions/s"
    speed = f"{median(rates['stage']):.1f} captions/s"
    report([compare(f"captions, batches of {source.batch_size}", speed, rates["stage"], rates["one by one"], against)])


if __name__ == "__main__":
    main()
