"""The log of a run on a full disk."""

from pathlib import Path

import pytest
import torch

from stm.distributed.process import Process
from stm.training.logs import MetricsLog


def test_a_log_on_a_full_disk_is_named(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, 0, Process(0, 1, torch.device("cpu"))) as log:
        assert log._file is not None
        log._file.close()
        log._file = Path("/dev/full").open("w", encoding="utf-8")  # noqa: SIM115
        with pytest.raises(OSError, match=r"No space left.*make room and run again.*metrics\.jsonl"):
            log.write(1, {"loss": 2.0})
        log._file = (tmp_path / "metrics.jsonl").open("a", encoding="utf-8")  # so that the block can end
