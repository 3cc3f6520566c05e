"""The loop with a small module: what it computes, what it writes, and that breaks leave no trace."""

import json
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from timm.layers import DropPath
from torch import nn
from twin_process import Twin

from stm.config import Optimisation
from stm.data.loader import Batch
from stm.distributed.process import Process
from stm.training.interruption import Interrupted
from stm.training.logs import Meter, cut_lines
from stm.training.loop import TrainingPlan, clip_gradient, fit

CPU = Process(0, 1, torch.device("cpu"))
STEPS = 12


class Regression(nn.Module):
    """Has all that draws random numbers in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 1)
        self.dropout, self.path = nn.Dropout(0.2), DropPath(0.3)
        self.calls = 0

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        self.calls += 1
        hidden = self.path(self.dropout(self.first(batch["video"]).relu()))
        error = self.second(hidden).squeeze(1) - batch["guides"]["target"]
        return {"loss": error.square().mean(), "absolute": error.abs().mean()}


def make_module(seed: int = 5) -> Regression:
    torch.manual_seed(seed)
    return Regression()


def make_plan(accumulate: int = 1, **changes: object) -> TrainingPlan:
    optimisation = Optimisation(
        epochs=3, batch_size=8, accumulate=accumulate, learning_rate=0.3, warmup_epochs=1, clip_grad=1.0
    )
    values = {"checkpoint_every": 5, "log_every": 3, "seed": 1, **changes}
    return TrainingPlan("test", optimisation, STEPS // 3, **values)  # type: ignore[arg-type]


def make_batches(accumulate: int, stop_at: int | None = None, signal_at: int | None = None, sent: int = signal.SIGTERM):
    """Batches that are a function of their number. A crash or a signal can be built in."""

    def batches(step: int) -> Iterator[Batch]:
        for number in range(step * accumulate, STEPS * accumulate):
            if number == stop_at:
                raise KeyboardInterrupt
            if number == signal_at:
                os.kill(os.getpid(), sent)
            generator = torch.Generator().manual_seed(number)
            video = torch.randn(8 // accumulate, 6, generator=generator)
            yield {"video": video, "guides": {"target": video.sum(1)}, "key": ["a"] * len(video)}

    return batches


def lines_without_time(path: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "clips_per_second"} for line in lines]


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_one_step_is_adamw_on_the_clipped_gradient(tmp_path: Path) -> None:
    module, plan = make_module().eval(), make_plan()
    expected = make_module().eval()
    peer = torch.optim.AdamW(
        [
            {"params": [expected.first.weight, expected.second.weight], "weight_decay": 0.05},
            {"params": [expected.first.bias, expected.second.bias], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    for step, batch in enumerate(make_batches(1)(0)):
        # Warm-up over 4 steps from 0 to 0.3, then half a cosine over 8 to 1e-5; all for 8 of 256 clips.
        decaying = 1e-5 + (0.3 - 1e-5) * (1 + math.cos(math.pi * (step - 4) / 8)) / 2
        rate = 0.3 * step / 3 if step < 4 else decaying
        for group in peer.param_groups:
            group["lr"] = rate * 8 / 256
        peer.zero_grad()
        expected(batch)["loss"].backward()
        nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
        peer.step()
    fit(module, make_batches(1), plan, tmp_path, CPU)
    for a, b in zip(module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_accumulation_changes_the_result_by_rounding_only(tmp_path: Path) -> None:
    whole, parts = make_module().eval(), make_module().eval()

    def halves(step: int) -> Iterator[Batch]:
        for batch in make_batches(1)(step):
            for half in (slice(0, 4), slice(4, 8)):
                yield {"video": batch["video"][half], "guides": {"target": batch["guides"]["target"][half]}}

    fit(whole, make_batches(1), make_plan(1), tmp_path / "whole", CPU)
    fit(parts, halves, make_plan(2), tmp_path / "parts", CPU)
    assert parts.calls == 2 * whole.calls
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stop_at", [1, 5, 7, 11])
def test_a_run_that_broke_off_ends_as_one_that_did_not(tmp_path: Path, accumulate: int, stop_at: int) -> None:
    straight, broken, resumed = make_module().train(), make_module().train(), make_module(seed=99).train()
    plan = make_plan(accumulate)
    fit(straight, make_batches(accumulate), plan, tmp_path / "straight", CPU)
    with pytest.raises(KeyboardInterrupt):
        fit(broken, make_batches(accumulate, stop_at * accumulate), plan, tmp_path / "broken", CPU)
    torch.rand(17)  # whatever the new process does first
    if stop_at < 5:  # no checkpoint yet: from the beginning, with the same initial weights
        resumed = make_module().train()
    fit(resumed, make_batches(accumulate), plan, tmp_path / "broken", CPU)
    assert same_weights(straight, resumed)
    logs = [lines_without_time(tmp_path / name / "metrics.jsonl") for name in ("straight", "broken")]
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[0]] == [3, 6, 9, 12]


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_at_the_end_of_the_step_and_leaves_with_a_code(tmp_path: Path, sent: signal.Signals) -> None:
    straight, module = make_module().train(), make_module().train()
    fit(straight, make_batches(1), make_plan(), tmp_path / "straight", CPU)
    before = signal.getsignal(sent)
    with pytest.raises(Interrupted) as stopped:
        fit(module, make_batches(1, signal_at=6, sent=sent), make_plan(), tmp_path / "run", CPU)
    assert stopped.value.code == 128 + sent
    assert signal.getsignal(sent) == before
    assert module.calls == 7
    resumed = make_module().train()
    fit(resumed, make_batches(1), make_plan(), tmp_path / "run", CPU)
    assert resumed.calls == STEPS - 7
    assert same_weights(straight, resumed)


def stuck_at(number: int, accumulate: int = 1):
    """Batches of which one brings a signal and does not arrive."""

    def batches(step: int) -> Iterator[Batch]:
        for at, batch in enumerate(make_batches(accumulate)(step), step * accumulate):
            if at == number:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(600)
            yield batch

    return batches


def test_a_signal_while_a_batch_is_waited_for_saves_the_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stm.training.loop._PATIENCE_BETWEEN_STEPS", 0.05)
    straight, resumed = make_module().train(), make_module().train()
    fit(straight, make_batches(2), make_plan(2), tmp_path / "straight", CPU)
    with pytest.raises(Interrupted) as stopped:
        fit(make_module().train(), stuck_at(14, 2), make_plan(2), tmp_path / "run", CPU)
    assert stopped.value.code == 128 + signal.SIGTERM
    fit(resumed, make_batches(2), make_plan(2), tmp_path / "run", CPU)
    assert resumed.calls == 2 * (STEPS - 7) and same_weights(straight, resumed)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize(("number", "count", "step"), [(15, 1, 5), (14, 2, 5), (0, 1, 0)])
def test_in_the_middle_of_a_step_the_last_checkpoint_must_do(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
    count: int,
    step: int,
) -> None:
    """Also where other processes would have to save together with this one, and before the first step."""
    monkeypatch.setattr("stm.training.loop._PATIENCE", 0.05)
    process = CPU if count == 1 else Twin(0, 2, torch.device("cpu"))
    with pytest.raises(Interrupted):
        fit(make_module().train(), stuck_at(number, 2), make_plan(2), tmp_path, process)
    assert f"stopped while waiting for data; the same command resumes from step {step}\n" in capsys.readouterr().err
    assert len(list(tmp_path.glob("checkpoints/step-*.pt"))) == (step > 0)


@pytest.mark.parametrize("process", [CPU, Twin(0, 2, torch.device("cpu"))])
def test_a_signal_after_an_epoch_is_not_held_up_and_loses_neither_call_nor_step(
    process: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation takes minutes; its score decides which weights are tested."""
    for patience in ("_PATIENCE_BETWEEN_STEPS", "_PATIENCE"):
        monkeypatch.setattr(f"stm.training.loop.{patience}", 0.05)
    calls: list[int] = []

    def after_epoch(epoch: int) -> None:
        calls.append(epoch)
        if calls == [1, 2]:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(600)

    with pytest.raises(Interrupted):
        fit(make_module(), make_batches(1), make_plan(checkpoint_every=1000), tmp_path, process, after_epoch)
    resumed = make_module()
    fit(resumed, make_batches(1), make_plan(checkpoint_every=1000), tmp_path, process, after_epoch)
    assert calls == [1, 2, 2, 3] and resumed.calls == 4


def test_a_run_with_the_largest_seed_resumes_with_another_number_of_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan(seed=2**31 - 1)
    with pytest.raises(Interrupted):
        fit(make_module(), make_batches(1, signal_at=6), plan, tmp_path, Twin(0, 2, torch.device("cpu")))
    fit(make_module(), make_batches(1), plan, tmp_path, CPU)
    assert "with 1 processes instead of 2" in capsys.readouterr().err


# The seventh step's batch brings the signal; the log has a line every third step.
@pytest.mark.parametrize(("long_step", "done"), [(0.0, 7), (60.0, 9)])
def test_processes_agree_to_stop_after_a_long_step_or_with_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, long_step: float, done: int
) -> None:
    monkeypatch.setattr("stm.training.loop._LONG_STEP", long_step)
    module = make_module().train()
    with pytest.raises(Interrupted):
        fit(module, make_batches(1, signal_at=6), make_plan(), tmp_path, Twin(0, 2, torch.device("cpu")))
    assert module.calls == done


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    first, second = make_module(), make_module(seed=9)
    fit(first, make_batches(1), make_plan(), tmp_path, CPU)
    fit(second, make_batches(1), make_plan(), tmp_path, CPU).discard()
    assert second.calls == 0 and same_weights(first, second)
    assert not (tmp_path / "checkpoints").exists()


def test_other_settings_start_anew(tmp_path: Path) -> None:
    fit(make_module(), make_batches(1), make_plan(origin={"seed": 1}), tmp_path, CPU)
    again = make_module()
    fit(again, make_batches(1), make_plan(origin={"seed": 2}), tmp_path, CPU)
    assert again.calls == STEPS
    assert len(lines_without_time(tmp_path / "metrics.jsonl")) == 4


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path: Path) -> None:
    def batches(step: int) -> Iterator[Batch]:
        for number, batch in enumerate(make_batches(1)(step), step):
            target = batch["guides"]["target"] * (math.nan if number == 6 else 1)
            yield {"video": batch["video"], "guides": {"target": target}}

    with pytest.raises(FloatingPointError, match=r"not finite shortly before step 9.*learning_rate"):
        fit(make_module(), batches, make_plan(), tmp_path, CPU)
    assert [p.name for p in (tmp_path / "checkpoints").glob("*.pt")] == ["step-000000005.pt"]


def test_no_epochs_leave_the_weights_alone(tmp_path: Path) -> None:
    module, untouched = make_module(), make_module()
    plan = TrainingPlan("test", Optimisation(epochs=0, batch_size=8), 0, seed=1)
    fit(module, lambda step: iter(()), plan, tmp_path, CPU)
    assert same_weights(module, untouched)


def test_the_log_holds_means_over_all_passes_since_the_last_line(tmp_path: Path) -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.calls = nn.Parameter(torch.zeros(())), 0

        def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
            self.calls += 1
            return {"loss": self.weight * 0 + self.calls}

    fit(Counter(), make_batches(2), make_plan(2), tmp_path, CPU)
    lines = lines_without_time(tmp_path / "metrics.jsonl")
    assert [line["loss"] for line in lines] == [3.5, 9.5, 15.5, 21.5]
    assert [line["epoch"] for line in lines] == [0.75, 1.5, 2.25, 3.0]
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_bf16_keeps_the_weights_in_float32(tmp_path: Path) -> None:
    module, exact = make_module().eval(), make_module().eval()
    fit(module, make_batches(1), make_plan(precision="bf16"), tmp_path / "bf16", CPU)
    fit(exact, make_batches(1), make_plan(), tmp_path / "exact", CPU)
    assert all(p.dtype == torch.float32 for p in module.parameters())
    assert not same_weights(module, exact)
    for a, b in zip(module.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.02)


def test_the_gradient_norm_is_torchs(tmp_path: Path) -> None:
    first, second = make_module().eval(), make_module().eval()
    batch = next(make_batches(1)(0))
    for module in (first, second):
        module(batch)["loss"].backward()
    norm = clip_gradient(first, 0.1)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(second.parameters(), 0.1))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_observers_are_clipped_by_themselves() -> None:
    watched, alone = make_module().eval(), make_module().eval()
    watched.watcher = nn.Linear(6, 1)
    watched.observers = lambda: list(watched.watcher.parameters())  # type: ignore[assignment]
    batch = next(make_batches(1)(0))
    for module in (watched, alone):
        module(batch)["loss"].backward()
    (1e3 * watched.watcher(batch["video"]).sum()).backward()
    assert torch.equal(clip_gradient(watched, 0.1), clip_gradient(alone, 0.1))
    assert all(torch.equal(p.grad, dict(watched.named_parameters())[n].grad) for n, p in alone.named_parameters())  # type: ignore[arg-type]
    gradients = [p.grad for p in watched.watcher.parameters()]
    torch.testing.assert_close(nn.utils.get_total_norm(gradients), torch.tensor(0.1), rtol=1e-4, atol=0)  # type: ignore[arg-type]


def test_lines_after_the_checkpoint_and_torn_ones_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10, "loss": 1}\n{"step": 20, "loss": 2}\n{"step": 30, "loss": 3}\n{"step": 4')
    cut_lines(path, 20)
    assert path.read_text() == '{"step": 10, "loss": 1}\n{"step": 20, "loss": 2}\n'
    cut_lines(path, 0)
    assert path.read_text() == ""


def test_a_meter_goes_on_from_its_state() -> None:
    whole, before, after = Meter(CPU), Meter(CPU), Meter(CPU)
    for meter in (whole, before):
        meter.add({"loss": torch.tensor(1.0)})
    after.restore(before.state(), CPU.device)
    for meter in (whole, after):
        meter.add({"loss": torch.tensor(4.0)})
    assert whole.read() == after.read() == {"loss": 2.5}
    assert whole.read() == {}


class Neighbour(Twin):
    """One of two processes; the other one's values are all 8."""

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        return (values + 8) / 2


def test_the_log_holds_means_over_the_processes(tmp_path: Path) -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
            return {"loss": self.weight * 0 + 2, "other": torch.tensor(4.0)}

    fit(Constant(), make_batches(1), make_plan(), tmp_path, Neighbour(0, 2, torch.device("cpu")))
    lines = lines_without_time(tmp_path / "metrics.jsonl")
    assert [(line["loss"], line["other"]) for line in lines] == [(5.0, 6.0)] * 4


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_the_gradient_of_several_passes_is_that_of_the_whole_batch(tmp_path: Path, accumulate: int) -> None:
    """AdamW and clipping hide the gradient's scale; its norm, which the log holds, does not."""
    module, alone = make_module().eval(), make_module().eval()
    whole = next(make_batches(1)(0))

    def parts(step: int) -> Iterator[Batch]:
        video, target = (x.chunk(accumulate) for x in (whole["video"], whole["guides"]["target"]))
        for one, other in zip(video, target, strict=True):
            yield {"video": one, "guides": {"target": other}}
        yield from make_batches(accumulate)(step + 1)

    alone(whole)["loss"].backward()
    expected = torch.cat([p.grad.flatten() for p in alone.parameters() if p.grad is not None]).norm().item()
    fit(module, parts, make_plan(accumulate, log_every=1), tmp_path, CPU)
    assert lines_without_time(tmp_path / "metrics.jsonl")[0]["gradient_norm"] == pytest.approx(expected, rel=1e-5)


def test_what_follows_an_epoch_is_done_before_its_checkpoint_and_again_after_a_kill(tmp_path: Path) -> None:
    """Otherwise a kill between the two would lose what the callback does, such as choosing the best checkpoint."""
    calls: list[tuple[int, list[str]]] = []

    def after_epoch(epoch: int) -> None:
        calls.append((epoch, sorted(p.name for p in (tmp_path / "checkpoints").glob("*.pt"))))
        if epoch == 2 and len(calls) == 2:
            raise KeyboardInterrupt

    plan = make_plan(checkpoint_every=4)  # at the end of each epoch
    with pytest.raises(KeyboardInterrupt):
        fit(make_module(), make_batches(1), plan, tmp_path, CPU, after_epoch)
    fit(make_module(), make_batches(1), plan, tmp_path, CPU, after_epoch)
    first, second = "step-000000004.pt", "step-000000008.pt"
    assert calls == [(1, []), (2, [first]), (2, [first]), (3, [first, second])]
