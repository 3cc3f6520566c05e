"""All benchmarks, one after the other, on this machine: `python -m benchmarks [name ...]`.

What they print is kept in `benchmarks/results/`, with the date, the machine and the versions. Compare the ratios: absolute
times are the machine's.
"""

import argparse
import datetime
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_"))
LIBRARIES = ("torch", "transformers", "timm", "open_clip_torch", "av", "simplejpeg", "numpy")


def describe_machine() -> str:
    """Processor or GPU, cores, system and versions."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return f"{device}, {os.cpu_count()} cores, Python {platform.python_version()}, {platform.system()}\n{versions}"


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"which; default: all of {', '.join(NAMES)}")
    chosen = parser.parse_args().names or NAMES
    if unknown := set(chosen) - set(NAMES):
        parser.error(f"no benchmark {', '.join(unknown)}; there are: {', '.join(NAMES)}")
    machine = describe_machine()
    print(machine, flush=True)
    for name in chosen:
        print(f"\n== {name}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}"]
        finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        print(finished.stdout, flush=True)
        if finished.returncode:
            sys.exit(f"benchmark {name} ended with status {finished.returncode}")
        kept = FOLDER / "results" / f"{datetime.date.today()}-{name}.txt"
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(f"{machine}\n\n{finished.stdout}")


if __name__ == "__main__":
    main()
