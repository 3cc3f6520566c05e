"""Small real videos for the tests of several folders."""

import gc
import logging
import os
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from stm.jobs.messages import VARIABLE, configure_messages

# Speed is not asserted in tests: an example may take as long as a busy machine needs.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

# As in the workflow's jobs (stm/stages/journey.py): imports create millions of objects that stay alive, and by default
# Python searches them for garbage again and again.
gc.set_threshold(10_000)


# As the command line and jobs do: tests read what these print.
configure_messages()


@pytest.fixture(autouse=True)
def level_of_messages() -> Iterator[None]:
    """Tests that run a command with `-q` do not silence those after them."""
    yield
    if logging.getLogger("stm").level != logging.INFO or os.environ.get(VARIABLE) != "info":
        configure_messages("info")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=2, help="how often tests/workflow/test_kills.py kills the workflow")


@pytest.hookimpl(trylast=True)  # after `-m` and `-k` have chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In several processes, each begins with files of slow tests, and the run ends with short ones, for which none waits long.

    `--dist worksteal` gives each process an equal part of the list, and whoever is done takes from the end of another's
    part. So files of slow tests, whose fixtures are costly too, are not divided either.
    """
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    if workers == 1:
        return
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    slow = [tests for tests in files.values() if any(test.get_closest_marker("slow") for test in tests)]
    quick = [test for tests in files.values() if tests not in slow for test in tests]
    arranged: list[pytest.Item] = []
    for worker in range(workers):
        arranged += chain.from_iterable(slow[worker::workers])
        end = len(items) * (worker + 1) // workers
        missing = max(0, end - len(arranged)) if worker < workers - 1 else len(quick)
        arranged += quick[:missing]
        del quick[:missing]
    items[:] = arranged


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda"):
        import torch  # not for tests that need none of it: it takes seconds

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA GPU")


def encode(path: Path, frames: np.ndarray, codec: str = "libx264", fps: int = 10, **options: str) -> Path:
    """Write uint8 [F, H, W, 3] frames as a video and return its path; `options` are passed to the encoder."""
    import av  # not for tests without videos: a GPU machine may lack it

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def moving_texture(frames: int = 20, height: int = 64, width: int = 96, seed: int = 0, speed: int = 2) -> np.ndarray:
    """A random texture of 8 x 8 blocks that moves `speed` pixels to the right per frame, uint8 [F, H, W, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8 + 1, (width + frames * speed) // 8 + 2, 3))
    texture = np.kron(coarse, np.ones((8, 8, 1)))[:height].astype(np.uint8)
    return np.stack([texture[:, (frames - 1 - i) * speed :][:, :width] for i in range(frames)])


@pytest.fixture(scope="session")
def encode_video() -> Callable[..., Path]:
    return encode


@pytest.fixture(scope="session")
def texture() -> Callable[..., np.ndarray]:
    return moving_texture
