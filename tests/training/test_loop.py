"""The loop: one trajectory however it is made up, interrupted or looked at, and errors that name their cause."""

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ttmray.cli import main
from ttmray.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_OK, UserError
from ttmray.storage import Folder
from ttmray.training import loop
from ttmray.training.checkpoint import committed
from ttmray.training.ema import PowerEMA
from ttmray.training.flow_matching import Batch
from ttmray.training.logbook import Logbook
from ttmray.training.loop import validation
from ttmray.training.schedule import learning_rate
from ttmray.training.sft import SftTask, train_sft
from ttmray.training.tally import NotFinite, Tally
from ttmray.training.task import Losses, Ranks

CPU = torch.device("cpu")
ORDER_OF_SUMS = 2e-5
"""Largest difference of any weight after 12 updates of 1e-3 each. Measured: 1.8e-6 (micro-batches of 8 against 4)."""


def assert_close_lines(found: list[dict], expected: list[dict]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        numbers = {"loss", "grad_norm", "validation_loss"} & ours.keys()
        assert numbers
        for name in numbers:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


@pytest.mark.parametrize("device_batch", [1, 2])
def test_micro_batches_of_any_size_make_the_same_updates(finished, make_train_config, look, tmp_path, device_batch):
    train_sft(make_train_config(tmp_path, f"runtime.device_batch={device_batch}"))
    assert look.difference(look.state(tmp_path), look.state(finished)) < ORDER_OF_SUMS
    assert_close_lines(look.metrics(tmp_path), look.metrics(finished))
    keys = [line.get("keys_of_rank_0") for line in look.metrics(finished)]
    assert [line.get("keys_of_rank_0") for line in look.metrics(tmp_path)] == keys


@pytest.mark.parametrize(
    "sets",
    [
        ("runtime.checkpointing=true",),
        ("validation.every=1", "samples.every=5", "samples.steps=1", "runtime.tensorboard=true"),
        ("data.threads=0", "checkpoint.every=3", "ema.snapshot_every=2"),
    ],
)
def test_looking_saving_and_recomputing_change_no_bit(finished, make_train_config, look, tmp_path, sets):
    threads = threading.active_count()
    train_sft(make_train_config(tmp_path, *sets))
    assert look.difference(look.state(tmp_path), look.state(finished)) == 0
    losses = [line for line in look.metrics(tmp_path) if "loss" in line]
    assert losses == [line for line in look.metrics(finished) if "loss" in line]
    deadline = time.monotonic() + 20  # readers end once their last micro-batch is read
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= threads


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_compiled_backbone_makes_the_same_updates(finished, make_train_config, look, tmp_path):
    train_sft(make_train_config(tmp_path, "runtime.compile=true"))
    assert look.difference(look.state(tmp_path), look.state(finished)) < ORDER_OF_SUMS


def start_ranks(folder: Path, configs: list, world: int = 2) -> list[bytes]:
    for i, config in enumerate(configs):
        (folder / f"{i}.json").write_text(config.model_dump_json())
    program = str(Path(__file__).with_name("ranks_program.py"))
    files = [str(folder / f"{i}.json") for i in range(len(configs))]
    ranks = [
        subprocess.Popen([sys.executable, program, str(rank), str(world), str(folder / "group"), *files])
        for rank in range(world)
    ]
    return [rank.wait(timeout=500) for rank in ranks]


def test_two_ranks_train_every_head_as_one_does(finished, make_train_config, look, tmp_path):
    """DDP would hang or fail if a head left a weight without gradient; no, some or all scores are dropped."""
    heads = {
        "v1": [],
        "v3": ["flow.score_dropout_rate=0.5", "model.null=learned"],
        "v5": ["flow.score_dropout_rate=1.0", "model.null=scalar_zero"],
        "none": ["data.sources.0.score_column=null"],
    }
    short = ["steps=3", "validation.clips=0", "runtime.log_every=1"]
    runs = {
        head: make_train_config(tmp_path / head, f"model.head={head}", *(sets if head == "v1" else short + sets))
        for head, sets in heads.items()
    }
    assert start_ranks(tmp_path, list(runs.values())) == [0, 0]
    assert look.difference(look.state(tmp_path / "v1"), look.state(finished)) < ORDER_OF_SUMS
    assert_close_lines(look.metrics(tmp_path / "v1"), look.metrics(finished))
    train_sft(make_train_config(tmp_path / "alone", "model.head=v3", *short, *heads["v3"]))
    assert look.difference(look.state(tmp_path / "v3"), look.state(tmp_path / "alone")) < ORDER_OF_SUMS
    for head in ("v5", "none"):
        assert len({line["loss"] for line in look.metrics(tmp_path / head)}) == 3


def interrupt_after(monkeypatch: pytest.MonkeyPatch, steps: int, number: int = signal.SIGTERM) -> None:
    """Send a signal while update `steps` is in flight."""
    made, update = [], PowerEMA.update

    def updated(self: PowerEMA, model: torch.nn.Module) -> None:
        update(self, model)
        made.append(1)
        if len(made) == steps:
            signal.raise_signal(number)

    monkeypatch.setattr(PowerEMA, "update", updated)


@pytest.mark.parametrize(("steps", "number"), [(2, signal.SIGTERM), (7, signal.SIGINT)])
def test_an_interrupted_run_is_saved_and_goes_on_as_if_nothing_had_happened(
    finished, make_sets, look, tmp_path, monkeypatch, capsys, steps, number
):
    command = ["train-sft", *(f"--set={text}" for text in make_sets(tmp_path / "run"))]
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        interrupt_after(patch, steps, number)
        assert main(command) == EXIT_INTERRUPTED
    for name, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(name, handler)  # an interrupted process keeps its own until its end
    assert look.state(tmp_path / "run").step == steps
    assert f"interrupted after update {steps}, which is saved" in capsys.readouterr().out
    assert not (tmp_path / "run/_SUCCESS.json").exists()
    assert main(command) == EXIT_OK
    assert f"resuming after update {steps}" in capsys.readouterr().out
    assert look.difference(look.state(tmp_path / "run"), look.state(finished)) == 0
    assert look.metrics(tmp_path / "run") == look.metrics(finished)  # also the line that was half collected
    assert main(command) == EXIT_OK
    assert "nothing to do" in capsys.readouterr().out
    assert look.metrics(tmp_path / "run") == look.metrics(finished)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_second_signal_ends_a_run_at_once(make_train_config, tmp_path, monkeypatch):
    losses = SftTask.losses

    def twice(self, samples, forward):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return losses(self, samples, forward)

    monkeypatch.setattr(SftTask, "losses", twice)
    with pytest.raises(KeyboardInterrupt):
        train_sft(make_train_config(tmp_path))
    assert committed(Folder.at(str(tmp_path / "checkpoints"))) == []


def test_global_generators_of_a_task_go_on_where_they_were(make_train_config, look, tmp_path, monkeypatch):
    losses = SftTask.losses

    def noisy(self, samples, forward):
        moved = Batch(**{**samples.batch._asdict(), "noise": torch.randn_like(samples.batch.noise)})
        return losses(self, samples._replace(batch=moved), forward)

    monkeypatch.setattr(SftTask, "losses", noisy)
    torch.manual_seed(5)  # of no consequence
    train_sft(make_train_config(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 6)
        with pytest.raises(KeyboardInterrupt):
            train_sft(make_train_config(tmp_path / "parts"))
    torch.manual_seed(6)
    train_sft(make_train_config(tmp_path / "parts"))
    assert look.difference(look.state(tmp_path / "parts"), look.state(tmp_path / "whole")) == 0


def test_more_steps_go_on_and_fewer_are_refused(finished, make_train_config, look, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(UserError, match="has 12 updates already"):
        train_sft(make_train_config(run, "steps=11"))
    train_sft(make_train_config(run, "steps=15"))
    train_sft(make_train_config(tmp_path / "whole", "steps=15"))
    assert look.difference(look.state(run), look.state(tmp_path / "whole")) == 0
    assert json.loads((run / "_SUCCESS.json").read_text())["steps"] == 15
    assert json.loads((run / "run.json").read_text())["config"]["steps"] == 15


def test_another_trajectory_is_refused_with_the_difference_unless_forced(finished, make_sets, look, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    sets = [*make_sets(run), "steps=13", "optimizer.lr=5e-4", "flow.text_dropout=0.2"]
    command = ["train-sft", *(f"--set={text}" for text in sets)]
    assert main(command) == EXIT_BAD_INPUT
    message = " ".join(capsys.readouterr().err.split())
    assert "config.optimizer.lr: 0.001 -> 0.0005" in message
    assert "config.flow.text_dropout: 0.1 -> 0.2" in message
    assert "--force" in message
    assert look.state(run).step == 12
    assert main([*command, "--force"]) == EXIT_OK
    assert look.metrics(run)[-2]["lr"] == 5e-4
    assert main(command) == EXIT_OK  # it is that run now


def test_a_step_schedule_is_followed_and_fixes_the_number_of_steps(make_train_config, look, tmp_path):
    sets = ("steps=10", "optimizer.schedule=step", "runtime.log_every=1", "validation.clips=0")
    train_sft(make_train_config(tmp_path, *sets))
    rates = [line["lr"] for line in look.metrics(tmp_path)]
    assert rates == [learning_rate(step, 1e-3, warmup=3, total=10, schedule="step") for step in range(10)]
    with pytest.raises(UserError, match=r"config\.steps: 10 -> 20"):
        train_sft(make_train_config(tmp_path, *sets, "steps=20"))


def test_an_exploding_run_names_its_clips_and_keeps_its_checkpoint(finished, make_sets, look, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    sets = [*make_sets(run), "steps=30", "optimizer.lr=1e30"]
    assert main(["train-sft", "--force", *(f"--set={text}" for text in sets)]) == EXIT_BAD_INPUT
    message = " ".join(capsys.readouterr().err.split())
    assert "The gradient of update 14 is not finite. Its worst clips: t0000" in message
    assert "lower optimizer.lr" in message
    assert look.difference(look.state(run), look.state(finished)) == 0


def test_no_update_is_applied_from_a_bad_gradient_on_although_the_host_looks_later(
    finished, make_sets, tmp_path, capsys, monkeypatch
):
    """As on a GPU, where the host does not wait for every update."""
    at_the_end: list[dict[str, torch.Tensor]] = []
    require_finite = Tally.require_finite

    def watched(log: Tally, checkpoints) -> None:
        try:
            require_finite(log, checkpoints)
        except NotFinite:
            at_the_end.append({name: tensor.clone() for name, tensor in log.task.model.state_dict().items()})
            raise

    monkeypatch.setattr(Tally, "require_finite", watched)
    for name, looks in (("each", loop.look_now), ("seldom", lambda step, config, device: step % 5 == 0)):
        monkeypatch.setattr(loop, "look_now", looks)
        run = shutil.copytree(finished, tmp_path / name)
        sets = [*make_sets(run), "steps=30", "optimizer.lr=1e30", "runtime.log_every=5", "validation.clips=0"]
        assert main(["train-sft", "--force", *(f"--set={text}" for text in sets)]) == EXIT_BAD_INPUT
        message = " ".join(capsys.readouterr().err.split())
        assert "The gradient of update 14 is not finite. Its worst clips: t0000" in message
    each, seldom = at_the_end
    assert all(torch.isfinite(tensor).all() for tensor in each.values())
    assert all(torch.equal(tensor, seldom[name]) for name, tensor in each.items())


def test_the_worst_clips_are_those_that_are_not_finite(make_train_config, tmp_path):
    task = SftTask(make_train_config(tmp_path), CPU)
    log = Tally(task, task.config, Ranks(), CPU, 0)
    samples = next(task.batches(0, 3, 0, 1, False))
    losses = torch.tensor([5.0, float("nan"), 7.0])
    log.add(samples, Losses(losses, torch.rand(3)))
    first, second, third = samples.keys
    assert log.suspects(log.update) == f"{second} (loss nan), {third} (loss 7), {first} (loss 5)"


def test_a_latent_that_is_not_finite_stops_the_run_and_is_named(make_sets, debug_corpus, look, tmp_path, capsys):
    corpus = shutil.copytree(debug_corpus, tmp_path / "corpus")
    sets = [*make_sets(tmp_path / "run"), f"data.sources.0.corpus={corpus}", "data.prefetch=1", "checkpoint.every=1"]
    command = ["train-sft", *(f"--set={text}" for text in sets)]
    assert main([*command, "--set=steps=1"]) == EXIT_OK
    for shard in (corpus / "shards").iterdir():
        data = bytearray(shard.read_bytes())
        at = data.index(b"latent_mean.npy") + 1024 - data.index(b"latent_mean.npy") % 512
        data[at : at + 2] = np.float16("nan").tobytes()
        shard.write_bytes(data)
    assert main(command) == EXIT_BAD_INPUT
    message = " ".join(capsys.readouterr().err.split())
    assert ".tar is damaged: clip t0000" in message
    assert "mean is not finite" in message
    assert look.state(tmp_path / "run").step >= 1


def test_validation_has_averaged_weights_fixed_draws_and_any_number_of_ranks(make_train_config, tmp_path):
    task = SftTask(make_train_config(tmp_path), CPU)
    next(task.batches(0, 4, 0, 1, False))  # validates in batches of 4, too
    ema = PowerEMA(task.model)
    ema.update(task.model)
    with torch.no_grad():
        for weight in task.model.parameters():
            if weight.requires_grad:
                weight.normal_(std=0.02)
    raw = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    first, again = (validation(task, ema, task.config, Ranks(), CPU, 3) for _ in range(2))
    assert first == again
    assert first["clips"] == 6
    assert task.model.training
    assert all(torch.equal(tensor, raw[name]) for name, tensor in task.model.state_dict().items())
    with torch.inference_mode():
        losses = [task.validate(CPU, rank, 4)[0] for rank in range(4)]
    assert [len(part) for part in losses] == [4, 2, 0, 0]
    own = float(torch.cat(losses).double().mean())
    assert own != pytest.approx(first["validation_loss"], rel=1e-6)  # raw weights
    with torch.inference_mode(), ema.applied(task.model, 0.05):
        parts = torch.cat([task.validate(CPU, rank, 4)[0] for rank in range(4)])
    assert float(parts.double().mean()) == pytest.approx(first["validation_loss"], rel=1e-6)


def test_only_one_line_per_logged_step_even_if_lines_outlive_their_checkpoint(
    finished, make_train_config, look, tmp_path, monkeypatch
):
    """A process that dies after a line, before the checkpoint of that step."""

    class Died(BaseException):
        pass

    write = Logbook.write

    def fatal(self, values):
        write(self, values)
        if values["step"] == 8:
            raise Died

    with monkeypatch.context() as patch:
        patch.setattr(Logbook, "write", fatal)
        with pytest.raises(Died):
            train_sft(make_train_config(tmp_path / "run"))
    assert [line["step"] for line in look.metrics(tmp_path / "run")] == [4, 6, 8]
    assert look.state(tmp_path / "run").step == 5
    train_sft(make_train_config(tmp_path / "run"))
    assert look.metrics(tmp_path / "run") == look.metrics(finished)
