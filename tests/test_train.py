"""The trainer: schedule, data order, checkpoints that survive anything, folders that refuse strangers, and errors that help."""

import contextlib
import dataclasses
import errno
import functools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset
from toy_training import Toy

from freqseg.work import train as room
from freqseg.data import open_folder
from freqseg.transforms import TrainTransform
from freqseg.files import InputError, locked
from freqseg.work.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from freqseg.metrics import ConfusionMeter, iou_scores
from freqseg.work.train import (
    DataPlan,
    OutOfMemory,
    TrainingDiverged,
    TrainSettings,
    describe_run,
    fit,
    learning_rate,
    mixed_seed,
    read_log,
    require_same_run,
    seeded,
    segmentation_scores,
)
from freqseg.world.scenes import write_world

TESTS = Path(__file__).resolve().parent
SHORT = TrainSettings(iterations=12, batch=4, lr=1e-2, warmup=3, validate_every=6, save_every=4, log_every=1, workers=0)

pytestmark = pytest.mark.filterwarnings("ignore:no training picture shows")


class Interrupted(Exception):
    "Stands for a power cut."


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    "These runs need not survive a power cut."
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A small world on disk."
    folder = tmp_path_factory.mktemp("train") / "world"
    write_world(str(folder), train=14, val=3, test=0, size=48, difficulty="easy", workers=1)
    return folder


@pytest.fixture(scope="module")
def pictures(world: Path) -> object:
    return open_folder(world, "train", TrainTransform(32))


@pytest.fixture(scope="module")
def val(world: Path) -> object:
    return open_folder(world, "val")


@pytest.fixture
def damaged(world: Path, tmp_path: Path) -> tuple[object, str]:
    "The same world with one picture cut short, and that picture's id."
    shutil.copytree(world, tmp_path / "damaged")
    pictures = open_folder(tmp_path / "damaged", "train", TrainTransform(32))
    path = Path(pictures.listing.images[5])
    path.write_bytes(path.read_bytes()[:300])
    return pictures, pictures.ids[5]


def changed(settings: TrainSettings = SHORT, **values: object) -> TrainSettings:
    return dataclasses.replace(settings, **values)


def weights(out: Path, name: str = "last") -> dict[str, Tensor]:
    return read_checkpoint(out / f"{name}.safetensors").weights


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    "Equal to the last bit."
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def log_without_times(out: Path) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in ("seconds", "images_per_second")}
            for row in read_log(out / "metrics.jsonl")]


def toy(pictures: object, **options: object) -> Toy:
    return Toy(pictures.classes, **{"dropout": 0.2, **options})


# ---- schedule and settings ------------------------------------------------------------------------------------------

def test_weclips_schedule_warms_up_for_50_steps_and_falls_in_a_straight_line() -> None:
    its = TrainSettings()
    assert learning_rate(0, its) == pytest.approx(2e-3 * 1e-6)
    assert learning_rate(25, its) == pytest.approx(1e-3, rel=1e-5)
    assert [learning_rate(step, its) for step in (50, 7500, 29_999)] == pytest.approx(
        [2e-3 * (1 - 50 / 30_000), 1.5e-3, 2e-3 / 30_000])


def test_ffrs_schedule_reaches_6e_5_after_2000_steps_and_falls_with_power_nine_tenths() -> None:
    its = TrainSettings(iterations=20_000, lr=6e-5, warmup=2000, lr_power=0.9)
    assert learning_rate(1000, its) == pytest.approx(3e-5, rel=1e-5)
    assert learning_rate(10_000, its) == pytest.approx(6e-5 * 0.5**0.9)


@given(warmup=st.integers(0, 40), extra=st.integers(1, 60), power=st.floats(0.2, 3), start=st.floats(0, 1))
def test_the_rate_rises_to_the_peak_falls_and_stays_positive(warmup: int, extra: int, power: float, start: float) -> None:
    its = TrainSettings(iterations=warmup + extra, warmup=warmup, lr_power=power, warmup_start=start, lr=1.0)
    rates = [learning_rate(step, its) for step in range(its.iterations)]
    assert rates[:warmup] == sorted(rates[:warmup]) and rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert max(rates) <= 1 and rates[-1] > 0


@pytest.mark.parametrize("wrong", [dict(batch=0), dict(lr=-1.0), dict(lr=float("nan")), dict(workers=-1), dict(iterations=2.5),
                                   dict(precision="16-mixed"), dict(strategy="fsdp"), dict(betas=(0.9, 1.0)), dict(seed=-1),
                                   dict(iterations=50, warmup=50), dict(accelerator="gpu"), dict(batch=True)], ids=str)
def test_a_setting_that_cannot_be_meant_is_named(wrong: dict) -> None:
    with pytest.raises(InputError) as caught: TrainSettings(**wrong)
    name, value = list(wrong.items())[-1]
    assert f"{name}={value!r}" in str(caught.value)


# ---- data order and chance ------------------------------------------------------------------------------------------

@given(pictures=st.integers(1, 30), batch=st.integers(1, 5), accumulate=st.integers(1, 3), ranks=st.integers(1, 3), seed=st.integers(0, 2**40))
def test_every_epoch_shows_every_picture_once_however_the_steps_are_cut(
        pictures: int, batch: int, accumulate: int, ranks: int, seed: int) -> None:
    plan = DataPlan(pictures, seed, batch, accumulate, ranks)
    steps = range(-(-2 * pictures // plan.per_step))
    pairs = [pair for step in steps for turn in range(accumulate) for rank in range(ranks) for pair in plan.pairs(step, turn, rank)]
    assert [draw for _, draw in pairs] == list(range(len(pairs)))
    for epoch in range(2): assert sorted(i for i, _ in pairs[epoch * pictures:][:pictures]) == list(range(pictures))


@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 20))
def test_passes_and_processes_share_out_the_pictures_of_one_big_batch(accumulate: int, ranks: int, step: int) -> None:
    parts = DataPlan(17, 3, 2, accumulate, ranks)
    whole = DataPlan(17, 3, parts.per_step)
    assert [pair for turn in range(accumulate) for rank in range(ranks) for pair in parts.pairs(step, turn, rank)] == whole.pairs(step)


def test_batches_from_the_middle_of_a_run_are_those_of_the_whole_run() -> None:
    plan = DataPlan(11, 5, 3, accumulate=2)
    assert list(plan.batches(0, 0, 9))[8:] == list(plan.batches(0, 4, 9))


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    orders = [tuple(room.epoch_order(50, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4


def test_mixed_seeds_fit_a_torch_seed_and_differ() -> None:
    seeds = {mixed_seed(0, kind, draw) for kind in (1, 2) for draw in range(200)}
    assert len(seeds) == 400 and all(0 <= seed < 2**63 for seed in seeds)


def test_chance_goes_on_after_a_seeded_block_as_if_it_had_not_been() -> None:
    def drawn() -> tuple: return torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()
    torch.manual_seed(3); np.random.seed(3); random.seed(3)
    expected = drawn()
    torch.manual_seed(3); np.random.seed(3); random.seed(3)
    with pytest.raises(Interrupted), seeded(7):
        inside = drawn()
        raise Interrupted
    assert drawn() == expected != inside


def test_the_number_of_workers_changes_nothing(pictures: object, tmp_path: Path) -> None:
    for workers in (0, 2): fit(toy(pictures), pictures, tmp_path / str(workers), changed(workers=workers))
    assert same(weights(tmp_path / "0"), weights(tmp_path / "2"))
    assert log_without_times(tmp_path / "0") == log_without_times(tmp_path / "2")


def test_training_leaves_the_callers_random_numbers_alone(pictures: object, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    fit(toy(pictures), pictures, tmp_path / "run", SHORT)
    assert torch.get_rng_state().equal(before)


def test_what_the_caller_drew_before_does_not_matter_but_the_seed_does(pictures: object, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.rand(random.randrange(1, 99))
        fit(toy(pictures), pictures, tmp_path / name, changed(seed=seed))
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b")) and not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


# ---- the loop -------------------------------------------------------------------------------------------------------

def test_the_loop_is_adamw_on_the_summed_losses_with_the_scaled_schedule(pictures: object, tmp_path: Path) -> None:
    system, other = toy(pictures, dropout=0.0), toy(pictures, dropout=0.0)
    result = fit(system, pictures, tmp_path / "run", SHORT)
    plan, losses = DataPlan(len(pictures), SHORT.seed, SHORT.batch), []
    optimiser = torch.optim.AdamW(other.parameter_groups(), lr=1.0, weight_decay=SHORT.weight_decay)
    for step in range(SHORT.iterations):
        loaded = room._stacked([room._Draws(pictures, plan, False)[pair] for pair in plan.pairs(step)])
        for group, scale in zip(optimiser.param_groups, (0.5, 1.0), strict=True): group["lr"] = scale * learning_rate(step, SHORT)
        optimiser.zero_grad()
        loss = sum(other.training_step(loaded.batch, step / SHORT.iterations).values())
        loss.backward(); optimiser.step()
        losses.append(loss.item())
    assert [row["loss"] for row in result.history] == pytest.approx(losses, rel=1e-6)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(system.parameters(), other.parameters(), strict=True))
    assert system.progress == [step / 12 for step in range(12)] and not system.training


def test_accumulated_passes_equal_one_large_batch(pictures: object, tmp_path: Path) -> None:
    results = [fit(toy(pictures, dropout=0.0), pictures, tmp_path / str(batch), changed(batch=batch, accumulate=8 // batch)) for batch in (8, 2)]
    curves = [[row["loss"] for row in result.history] for result in results]
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


def test_clipping_bounds_the_gradient_of_the_whole_model(pictures: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, *args: object) -> object:
        norms.append(torch.nn.utils.get_total_norm([p.grad for group in self.param_groups for p in group["params"]]).item())
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    fit(toy(pictures), pictures, tmp_path / "free", SHORT)
    free, norms[:] = list(norms), []
    fit(toy(pictures), pictures, tmp_path / "clipped", changed(grad_clip=0.05))
    assert max(free) > 0.05 and max(norms) <= 0.05 * 1.001


def test_bfloat16_computes_in_16_bits_on_full_pictures_and_keeps_full_weights(pictures: object, tmp_path: Path) -> None:
    kinds = []

    class Watched(Toy):
        def training_step(self, batch, progress):
            kinds.append((batch.images.dtype, self.predict(batch.images).dtype))
            return super().training_step(batch, progress)

    result = fit(Watched(pictures.classes), pictures, tmp_path / "run", changed(precision="bf16-mixed"))
    assert set(kinds) == {(torch.float32, torch.bfloat16)}
    assert all(value.dtype != torch.bfloat16 for value in weights(tmp_path / "run").values())
    plain = fit(toy(pictures, dropout=0.0), pictures, tmp_path / "plain", SHORT)
    assert result.history[-1]["loss"] == pytest.approx(plain.history[-1]["loss"], rel=0.05)


def test_the_log_averages_the_steps_since_its_last_line(pictures: object, tmp_path: Path) -> None:
    every = fit(toy(pictures), pictures, tmp_path / "1", SHORT).history
    fifth = fit(toy(pictures), pictures, tmp_path / "5", changed(log_every=5)).history
    assert [row["step"] for row in fifth] == [5, 10, 12]
    losses = [row["losses"]["segmentation"] for row in every]
    assert [row["losses"]["segmentation"] for row in fifth] == pytest.approx([np.mean(losses[a:b]) for a, b in ((0, 5), (5, 10), (10, 12))])
    assert all(row["loss"] == pytest.approx(sum(row["losses"].values())) and row["images_per_second"] > 0 for row in fifth)
    assert fifth[0]["lr"] == learning_rate(4, SHORT) and fifth[0]["seconds"] < fifth[2]["seconds"]


def test_a_progress_bar_appears_on_a_terminal_only(pictures: object, tmp_path: Path, capsys: pytest.CaptureFixture,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    fit(toy(pictures), pictures, tmp_path / "quiet", SHORT)
    assert "step" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    fit(toy(pictures), pictures, tmp_path / "shown", SHORT)
    shown = capsys.readouterr().err
    assert "12/12" in shown and "segmentation=" in shown and "images/s=" in shown


def test_validation_shows_how_far_it_is_on_a_terminal_only(pictures: object, val: object, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    bar = room.tqdm
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)   # a test before may have imported it
    monkeypatch.setattr(room, "tqdm", lambda *given, **options: bar(*given, **{**options, "delay": 0}))
    segmentation_scores(toy(pictures).eval(), val)
    assert "validation" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    segmentation_scores(toy(pictures).eval(), val)
    assert re.search(r"validation: +0%.*0/3", capsys.readouterr().err)


def test_snapshots_are_kept_for_later(pictures: object, tmp_path: Path) -> None:
    def snapshot(system: Toy, step: int) -> dict:
        assert not system.training
        return {"weight": system.net[3].weight, "step": step}

    fit(toy(pictures), pictures, tmp_path / "run", changed(snapshot_every=5), snapshot=snapshot)
    assert sorted(path.name for path in (tmp_path / "run" / "snapshots").iterdir()) == [f"step-{n:06d}.npz" for n in (5, 10, 12)]
    with np.load(tmp_path / "run" / "snapshots" / "step-000012.npz") as kept:
        assert kept["step"] == 12 and np.array_equal(kept["weight"], weights(tmp_path / "run")["net.3.weight"])


def test_tensorboard_gets_the_same_numbers(pictures: object, val: object, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = fit(toy(pictures), pictures, tmp_path / "run", changed(tensorboard=True), val)
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("losses/segmentation")] == pytest.approx(
        [row["losses"]["segmentation"] for row in result.history])
    assert [event.step for event in events.Scalars("scores/miou")] == [6, 12]


def test_missing_tensorboard_is_named(pictures: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="pip install tensorboard"):
        fit(toy(pictures), pictures, tmp_path / "run", changed(tensorboard=True))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler, and there is none")
def test_compiled_parts_learn_the_same(pictures: object, tmp_path: Path) -> None:
    curves = [[row["loss"] for row in fit(toy(pictures, dropout=0.0), pictures, tmp_path / str(compiled), changed(compile=compiled)).history]
              for compiled in (False, True)]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert weights(tmp_path / "True").keys() == weights(tmp_path / "False").keys()


@pytest.mark.cuda
def test_a_gpu_learns_what_a_cpu_learns_and_resumes(pictures: object, val: object, tmp_path: Path) -> None:
    curves = [[row["loss"] for row in fit(toy(pictures, dropout=0.0), pictures, tmp_path / name, changed(accelerator=name, workers=2), val).history]
              for name in ("cpu", "cuda")]
    assert curves[0] == pytest.approx(curves[1], rel=1e-2)
    interrupted(pictures, tmp_path / "cut", 7, changed(accelerator="cuda"))
    resumed = fit(toy(pictures, dropout=0.0, seed=1), pictures, tmp_path / "cut", changed(accelerator="cuda"), val)
    assert [row["loss"] for row in resumed.history] == pytest.approx(curves[1], rel=1e-2)


# ---- validation -----------------------------------------------------------------------------------------------------

def test_default_scores_are_those_of_an_independent_loop(pictures: object, val: object) -> None:
    system = toy(pictures).eval()
    meter = ConfusionMeter(system.num_classes)
    for sample in val:
        pixels = torch.from_numpy(np.array(sample.image)).permute(2, 0, 1)[None] / 255
        logits = torch.nn.functional.interpolate(system.predict(pixels), sample.mask.shape, mode="bilinear")
        meter.update(logits.argmax(1)[0], sample.mask)
    expected = iou_scores(meter.total)
    for batch in (1, 2, 8):
        scores = segmentation_scores(system, val, batch)
        assert scores == pytest.approx({"miou": expected.miou, "pixel_accuracy": expected.pixel_accuracy})


def test_pictures_of_any_size_are_scored_on_whole_normalised_patches(pictures: object, world: Path, tmp_path: Path) -> None:
    class Tower:
        patch_size = 16

        def normalise(self, pixels): return pixels - 0.5

    class Patchy(Toy):
        backbone = Tower()

        def predict(self, images):
            seen.append((tuple(images.shape), images.min().item()))
            return super().predict(images)

    seen: list = []
    shutil.copytree(world, tmp_path / "world")
    odd = open_folder(tmp_path / "world", "val")
    for path in (odd.listing.images[0], odd.listing.masks[0]): Image.open(path).resize((70, 37), Image.Resampling.NEAREST).save(path)
    scores = segmentation_scores(Patchy(pictures.classes).eval(), odd)
    assert {shape for shape, _ in seen} == {(1, 3, 32, 64), (2, 3, 48, 48)} and min(low for _, low in seen) < 0
    assert 0 <= scores["miou"] <= 1


def test_best_is_the_checkpoint_of_the_highest_miou(pictures: object, val: object, tmp_path: Path) -> None:
    mious = iter([0.2, 0.7, float("nan"), 0.7, 0.5, 0.6])
    kept = {}

    def evaluate(system: Toy, given: object) -> dict:
        assert given is val and not system.training
        kept[len(kept)] = {name: value.clone() for name, value in system.state_dict().items()}
        return {"miou": next(mious), "note": "not a number", "pixel_accuracy": torch.tensor(0.5)}

    result = fit(toy(pictures), pictures, tmp_path / "run", changed(validate_every=2), val, evaluate)
    assert result.best == {"step": 4, "miou": 0.7} and read_checkpoint(tmp_path / "run" / "best.safetensors").step == 4
    assert same(weights(tmp_path / "run", "best"), kept[1])
    assert [row["scores"]["miou"] for row in result.validation] == [0.2, 0.7, None, 0.7, 0.5, 0.6]
    assert result.validation[0]["scores"] == {"miou": 0.2, "pixel_accuracy": 0.5}
    assert not read_checkpoint(tmp_path / "run" / "best.safetensors").moments


def test_scores_without_miou_are_refused(pictures: object, val: object, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="miou"):
        fit(toy(pictures), pictures, tmp_path / "run", SHORT, val, evaluate=lambda system, val: {"accuracy": 1.0})


def test_without_validation_pictures_nothing_is_validated(pictures: object, tmp_path: Path) -> None:
    result = fit(toy(pictures), pictures, tmp_path / "run", SHORT)
    assert result.best is None and result.validation == [] and not (tmp_path / "run" / "best.safetensors").exists()


# ---- kill and resume ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def whole(pictures: object, val: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    "An uninterrupted run."
    out = tmp_path_factory.mktemp("whole") / "run"
    fit(toy(pictures), pictures, out, SHORT, val)
    return out


def interrupted(pictures: object, out: Path, step: int, settings: TrainSettings = SHORT, val: object = None, **options: object) -> None:
    "Train until just after `step`, as a snapshot is taken, before that step is saved."
    def stop(system: Toy, now: int) -> dict:
        if now == step: raise Interrupted
        return {}

    with pytest.raises(Interrupted):
        fit(toy(pictures, **options), pictures, out, changed(settings, snapshot_every=1), val, snapshot=stop)


@pytest.mark.parametrize("step", [1, 4, 5, 7, 8, 12])
def test_stopped_at_any_step_it_ends_as_if_never_stopped(
        step: int, pictures: object, val: object, whole: Path, tmp_path: Path) -> None:
    interrupted(pictures, tmp_path / "run", step, val=val)
    result = fit(toy(pictures, seed=9), pictures, tmp_path / "run", SHORT, val)
    assert result.resumed == max(saved for saved in (0, 4, 6, 8) if saved < step)
    for name in ("last", "best"): assert same(weights(tmp_path / "run", name), weights(whole, name))
    assert log_without_times(tmp_path / "run") == log_without_times(whole)
    moments = [read_checkpoint(out / "last.safetensors").moments for out in (whole, tmp_path / "run")]
    assert all(same(moments[0][number], moments[1][number]) for number in moments[0]) and len(moments[0]) == 4


def test_the_average_of_a_log_line_survives_an_interruption(pictures: object, tmp_path: Path) -> None:
    expected = fit(toy(pictures), pictures, tmp_path / "whole", changed(log_every=5)).history
    interrupted(pictures, tmp_path / "cut", 9, changed(log_every=5))
    resumed = fit(toy(pictures), pictures, tmp_path / "cut", changed(log_every=5)).history
    assert [row["loss"] for row in resumed] == [row["loss"] for row in expected]


def test_a_finished_run_is_not_trained_again(pictures: object, val: object, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    system = toy(pictures, seed=9)
    result = fit(system, pictures, tmp_path / "run", SHORT, val)
    assert result.resumed == 12 and not system.progress and len(result.history) == 12
    assert same(system.state_dict(), weights(whole)) and result.best is not None


def test_what_a_killed_writer_left_behind_is_swept_away(pictures: object, val: object, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / ".last-x1y2.safetensors").write_bytes(b"half of")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as log: log.write('{"step": 13, "lo')
    fit(toy(pictures), pictures, tmp_path / "run", SHORT, val)
    assert not list((tmp_path / "run").glob(".last-*")) and log_without_times(tmp_path / "run") == log_without_times(whole)


def test_best_is_made_up_for_when_the_kill_came_between_last_and_best(
        pictures: object, val: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = room.write_checkpoint

    def cut_off(path: Path, checkpoint: Checkpoint) -> None:
        if Path(path).name == "best.safetensors": raise Interrupted
        write(path, checkpoint)

    monkeypatch.setattr(room, "write_checkpoint", cut_off)
    with pytest.raises(Interrupted): fit(toy(pictures), pictures, tmp_path / "run", SHORT, val)
    assert not (tmp_path / "run" / "best.safetensors").exists()
    monkeypatch.setattr(room, "write_checkpoint", write)
    scores = iter([0.0])
    result = fit(toy(pictures), pictures, tmp_path / "run", SHORT, val, evaluate=lambda *_: {"miou": next(scores)})
    assert result.best["step"] == 6 == read_checkpoint(tmp_path / "run" / "best.safetensors").step


def program(world: Path, out: Path, settings: TrainSettings, *more: str, launcher: tuple[str, ...] = ()) -> list[str]:
    values = {name: value for name, value in dataclasses.asdict(settings).items()}
    return [sys.executable, *launcher, str(TESTS / "toy_training.py"), "--data", str(world), "--out", str(out), "--settings",
            json.dumps(values), *more]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)}


def killed_after(command: list[str], log: Path, steps: int, delay: float) -> int:
    "SIGKILL the program some time after it made `steps` steps; gives its return code."
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    begin = len(read_log(log))
    while process.poll() is None and len(read_log(log)) < begin + steps and time.monotonic() < deadline: time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), errors[-2000:]
    return process.returncode


@pytest.mark.slow
def test_killed_again_and_again_at_random_moments_it_ends_with_the_same_bits(world: Path, tmp_path: Path) -> None:
    settings = changed(iterations=120, validate_every=40, save_every=7, workers=1)
    subprocess.run(program(world, tmp_path / "whole", settings, "--dropout", "0.2"), env=environment(), check=True)
    chance, killed = random.Random(5), 0
    command = program(world, tmp_path / "killed", settings, "--dropout", "0.2")
    for _ in range(3): killed += killed_after(command, tmp_path / "killed" / "metrics.jsonl", chance.randrange(1, 30), chance.random() / 20) != 0
    subprocess.run(command, env=environment(), check=True)
    assert killed >= 2
    for name in ("last", "best"): assert same(weights(tmp_path / "whole", name), weights(tmp_path / "killed", name))
    assert log_without_times(tmp_path / "whole") == log_without_times(tmp_path / "killed")


@pytest.mark.slow
def test_two_processes_learn_as_one_with_twice_the_batch_and_resume(world: Path, pictures: object, val: object, tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    settings = changed(batch=2)
    alone = fit(toy(pictures, dropout=0.0), pictures, tmp_path / "alone", changed(batch=4), val)
    interrupted(pictures, tmp_path / "continued", 9, changed(batch=4), val, dropout=0.0)
    for name in ("fresh", "continued"):
        done = subprocess.run(program(world, tmp_path / name, settings, launcher=launcher), env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        rows = read_log(tmp_path / name / "metrics.jsonl")
        assert [row["loss"] for row in rows if "loss" in row] == pytest.approx([row["loss"] for row in alone.history], rel=1e-5)
        mine, theirs = weights(tmp_path / "alone"), weights(tmp_path / name)
        assert all(torch.allclose(mine[part], theirs[part], atol=1e-5) for part in mine)
        assert rows[-1]["scores"] == pytest.approx(alone.validation[-1]["scores"], abs=0.02)


# ---- checkpoints ----------------------------------------------------------------------------------------------------

def test_a_checkpoint_comes_back_bit_by_bit(tmp_path: Path) -> None:
    given = Checkpoint({"a.b": torch.randn(3, 4).t(), "count": torch.tensor(7), "flag": torch.tensor([True])},
                       {"step": 3, "seconds": 0.1 + 0.2}, {"mu": 0.4}, ("key", "mug"), {0: {"exp_avg": torch.randn(4, 3)}, 11: {"step": torch.tensor(3.0)}})
    write_checkpoint(tmp_path / "x.safetensors", given)
    back = read_checkpoint(tmp_path / "x.safetensors")
    assert same(back.weights, given.weights) and (back.state, back.config, back.classes) == (given.state, given.config, given.classes)
    assert back.moments.keys() == given.moments.keys() and all(same(back.moments[n], given.moments[n]) for n in given.moments)


def test_weights_that_share_memory_are_saved(tmp_path: Path) -> None:
    tied = torch.randn(3)
    write_checkpoint(tmp_path / "x.safetensors", Checkpoint({"a": tied, "b": tied}, {"step": 0}, {}, ()))
    assert read_checkpoint(tmp_path / "x.safetensors").weights["b"].equal(tied)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", (50).to_bytes(8, "little") + b"{" * 50], ids=["empty", "text", "header"])
def test_a_damaged_checkpoint_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "last.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="last.safetensors.*damaged"): read_checkpoint(tmp_path / "last.safetensors")
    with pytest.raises(InputError, match="no checkpoint"): read_checkpoint(tmp_path / "none.safetensors")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_checkpoint_is_never_half_loaded(share: float, whole: Path, pictures: object, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / "last.safetensors"
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
    system = toy(pictures)
    before = {name: value.clone() for name, value in system.state_dict().items()}
    with pytest.raises(InputError, match="last.safetensors"): fit(system, pictures, tmp_path / "run", SHORT)
    assert same(before, system.state_dict())


@contextlib.contextmanager
def files_up_to(limit: int) -> Iterator[None]:
    "Files of this process, its log as well, may not grow beyond a limit: writes are cut short for real, as by a full disk."
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try: yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_checkpoint_cut_short_by_a_full_disk_leaves_the_one_before(
        pictures: object, val: object, whole: Path, tmp_path: Path) -> None:
    settings = changed(snapshot_every=8)
    with contextlib.ExitStack() as full:
        def fills_up(system: Toy, step: int) -> dict:
            if step == 8: full.enter_context(files_up_to(8000))  # the log is smaller, a checkpoint larger
            return {}

        with pytest.raises(InputError, match="cannot write .*last.safetensors"):
            fit(toy(pictures), pictures, tmp_path / "run", settings, val, snapshot=fills_up)
    assert read_checkpoint(tmp_path / "run" / "last.safetensors").step == 6
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".last-")]
    fit(toy(pictures), pictures, tmp_path / "run", SHORT, val)
    assert same(weights(tmp_path / "run"), weights(whole))


def test_a_disk_that_is_too_small_is_refused_before_the_first_step(
        pictures: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    system = toy(pictures)
    with pytest.raises(InputError, match="MiB free"): fit(system, pictures, tmp_path / "run", SHORT)
    assert not system.progress and {path.name for path in (tmp_path / "run").iterdir()} == {".lock"}


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(
        pictures: object, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    system = toy(pictures)
    with pytest.raises(InputError, match="cannot write into"): fit(system, pictures, tmp_path / "file" / "run", SHORT)
    with files_up_to(0), pytest.raises(InputError, match="cannot write"): fit(system, pictures, tmp_path / "run", SHORT)
    assert not system.progress


def test_a_read_only_folder_is_refused(pictures: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None: raise OSError(errno.EROFS, "Read-only file system")
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(InputError, match="Read-only file system"), locked(tmp_path): pass


# ---- whose folder ---------------------------------------------------------------------------------------------------

def refused(pictures: object, out: Path, system: Toy | None = None, settings: TrainSettings = SHORT, **options: object) -> str:
    with pytest.raises(InputError) as caught: fit(system or toy(pictures), pictures, out, settings, **options)
    return str(caught.value)


def test_a_folder_of_another_run_is_refused_with_everything_that_differs(whole: Path, pictures: object, world: Path) -> None:
    class Other(Toy): pass

    message = refused(pictures, whole, Other(pictures.classes, width=4), changed(lr=0.5, seed=3), identity={"preset": "voc"})
    for part in ('system.kind: "Toy" there, "Other" now', "system.config.width: 8 there, 4 now", "settings.lr: 0.01 there, 0.5 now",
                 "settings.seed: 0 there, 3 now", 'identity.preset: not given there, "voc" now'): assert part in message
    two = [dict(system=dict(kind=kind, config=dict(options={name: 1}))) for kind, name in (("DFA", "mu"), ("FFR", "hidden"))]
    with pytest.raises(InputError, match='system.kind: "DFA" there, "FFR" now') as caught: require_same_run(whole, *two)
    assert "options" not in str(caught.value)
    fewer = open_folder(world, "train", TrainTransform(32), ids=pictures.ids[:-1])
    assert "data.pictures: 14 there, 13 now" in refused(fewer, whole) and "data.ids" in refused(fewer, whole)
    assert "pictures_per_step: 4 there, 8 now" in refused(pictures, whole, settings=changed(accumulate=2))


def test_other_classes_are_refused_and_the_first_that_differs_is_named(pictures: object, whole: Path) -> None:
    described = describe_run(toy(pictures), pictures, SHORT, 4)
    other = json.loads(json.dumps(described))
    other["classes"] = [*described["classes"][:3], "snowman", *described["classes"][4:]]
    with pytest.raises(InputError, match=f'no. 4 "{described["classes"][3]}" there.* no. 4 "snowman" now'):
        require_same_run(whole, described, other)
    message = refused(pictures, whole, Toy(pictures.classes[:-1]))
    assert "other classes" in message and "missing in the system" in message and "in the training data" in message


def test_data_with_the_same_names_but_other_labels_is_other_data(world: Path, pictures: object, tmp_path: Path) -> None:
    write_world(str(tmp_path / "other"), train=14, val=0, test=0, size=48, difficulty="easy", workers=1, seed=1)
    other = open_folder(tmp_path / "other", "train", TrainTransform(32))
    assert other.ids == pictures.ids
    described = [describe_run(toy(its), its, SHORT, 4)["data"] for its in (pictures, other)]
    assert described[0]["labels"] != described[1]["labels"] and described[0]["ids"] == described[1]["ids"]


def test_settings_that_change_nothing_may_change(whole: Path, pictures: object, val: object, tmp_path: Path) -> None:
    interrupted(pictures, tmp_path / "run", 7, val=val, dropout=0.0)
    settings = changed(batch=2, accumulate=2, workers=1, log_every=3, save_every=2, strategy="ddp_find_unused_parameters_true", skip_bad=True)
    result = fit(toy(pictures, dropout=0.0), pictures, tmp_path / "run", settings, val)
    assert result.resumed == 6 and result.history[-1]["step"] == 12


def test_the_run_says_what_it_is_and_where_it_came_from(whole: Path, pictures: object) -> None:
    said = json.loads((whole / "run.json").read_text())
    assert said["system"] == {"kind": "Toy", "config": {"width": 8, "dropout": 0.2}} and said["classes"] == list(pictures.classes)
    assert said["data"]["split"] == "train" and said["data"]["pictures"] == 14 and said["settings"]["pictures_per_step"] == 4
    assert said["origin"]["command"] and said["origin"]["torch"] == torch.__version__


@pytest.mark.parametrize("content", ["", "[1]"])
def test_an_unreadable_run_json_is_named(content: str, whole: Path, pictures: object, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(content)
    assert "run.json" in refused(pictures, tmp_path / "run")


def test_a_checkpoint_of_nobody_knows_what_is_refused(whole: Path, pictures: object, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    assert "no run.json" in refused(pictures, tmp_path / "run")


def test_a_second_run_on_a_folder_is_refused_and_told_who_holds_it(pictures: object, tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        assert f"in use by process {os.getpid()} on " in refused(pictures, tmp_path / "run")
    fit(toy(pictures), pictures, tmp_path / "run", SHORT)
    with locked(tmp_path / "run"): pass


HOLD = "import sys, time; from freqseg.files import locked\nwith locked(sys.argv[1]): print('held', flush=True); time.sleep(60)"


@pytest.mark.slow
def test_another_process_is_refused_and_its_death_frees_the_folder(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True, env=environment())
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=f"process {holder.pid} on "), locked(tmp_path / "run"): pass
    holder.kill(); holder.wait()
    with locked(tmp_path / "run"): pass


@pytest.mark.filterwarnings("ignore:.*use of fork")
def test_a_forked_child_does_not_keep_the_folder(tmp_path: Path) -> None:
    (hears, stop), (born, says) = os.pipe(), os.pipe()
    with locked(tmp_path / "run"):
        if not (child := os.fork()):
            os.close(stop); os.write(says, b"x"); os.read(hears, 1); os._exit(0)  # lives until the parent closes its end
    os.read(born, 1)
    with locked(tmp_path / "run"): pass
    for end in (stop, hears, born, says): os.close(end)
    assert os.waitpid(child, 0)[1] == 0


# ---- faults ---------------------------------------------------------------------------------------------------------

class Explodes(Toy):
    "Its loss is infinite at one step."
    when = 7

    def training_step(self, batch, progress):
        losses = super().training_step(batch, progress)
        if round(progress * SHORT.iterations) == self.when: losses["decay"] = losses["decay"] * torch.inf
        return losses


def test_an_infinite_loss_stops_with_step_pictures_and_last_good_checkpoint(pictures: object, tmp_path: Path) -> None:
    system = Explodes(pictures.classes)
    with pytest.raises(TrainingDiverged) as caught: fit(system, pictures, tmp_path / "run", SHORT)
    error, plan = caught.value, DataPlan(len(pictures), 0, 4)
    assert error.step == 7 and error.ids == tuple(pictures.ids[index] for index, _ in plan.pairs(7))
    for part in ("step 7", "decay inf", "last.safetensors (step 4)", *error.ids): assert part in str(error)
    assert read_checkpoint(tmp_path / "run" / "last.safetensors").step == 4
    assert all(parameter.isfinite().all() for parameter in system.parameters())


def test_a_finite_loss_with_an_infinite_gradient_stops_too(pictures: object, tmp_path: Path) -> None:
    class Steep(Toy):
        def training_step(self, batch, progress):
            losses = super().training_step(batch, progress)
            return losses | {"root": (self.net[3].bias.sum() * 0).sqrt()}

    with pytest.raises(TrainingDiverged, match="root 0; gradient norm nan"): fit(Steep(pictures.classes), pictures, tmp_path / "run", SHORT)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")], ids=repr)
def test_out_of_memory_says_which_knobs_to_turn(error: Exception, pictures: object, tmp_path: Path) -> None:
    class Hungry(Toy):
        def training_step(self, batch, progress):
            if progress > 0.5: raise error
            return super().training_step(batch, progress)

    with pytest.raises(OutOfMemory, match=r"step 7, with batch 4 of 32 x 32 .*batch=2, accumulate=2 .*crop.*bf16-mixed"):
        fit(Hungry(pictures.classes), pictures, tmp_path / "run", SHORT)


def test_other_errors_of_a_system_come_through_unchanged(pictures: object, tmp_path: Path) -> None:
    class Broken(Toy):
        def training_step(self, batch, progress): raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="^shapes do not match$"): fit(Broken(pictures.classes), pictures, tmp_path / "run", SHORT)


@pytest.mark.parametrize("workers", [0, 2])
def test_one_bad_picture_stops_the_run_and_is_named(workers: int, damaged: tuple, tmp_path: Path) -> None:
    pictures, bad = damaged
    with pytest.raises(InputError, match=f"^picture {bad}: .*cannot be decoded.*skip_bad=True .*--skip-bad..$"):
        fit(toy(pictures), pictures, tmp_path / "run", changed(workers=workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_skip_bad_replaces_a_bad_picture_by_the_next_and_counts_it(workers: int, damaged: tuple, tmp_path: Path) -> None:
    pictures, bad = damaged
    settings = changed(skip_bad=True, workers=workers)
    with pytest.warns(UserWarning, match=f"skipped picture {bad}") as caught:
        result = fit(toy(pictures), pictures, tmp_path / "run", settings)
    assert list(result.skipped) == [bad] and "cannot be decoded" in result.skipped[bad]
    assert sum("skipped picture" in str(warning.message) for warning in caught) == 1
    plan, drawer = DataPlan(14, 0, 4), room._Draws(pictures, DataPlan(14, 0, 4), True)
    draw = next(draw for step in range(4) for index, draw in plan.pairs(step) if index == 5)
    assert drawer[5, draw].sample.id == pictures.ids[plan.index(draw + 1)]
    again = fit(toy(pictures), pictures, tmp_path / "run", settings)
    assert list(again.skipped) == [bad]


def test_a_bad_validation_picture_is_named_or_left_out(pictures: object, world: Path, tmp_path: Path) -> None:
    shutil.copytree(world, tmp_path / "world")
    val = open_folder(tmp_path / "world", "val")
    Path(val.listing.images[1]).write_bytes(b"broken")
    system = toy(pictures).eval()
    with pytest.raises(InputError, match=f"^picture {val.ids[1]}.*skip_bad"): segmentation_scores(system, val)
    with pytest.warns(UserWarning, match=val.ids[1]): scores = segmentation_scores(system, val, skip_bad=True)
    assert scores == segmentation_scores(system, Subset(val, [0, 2]))


def test_a_bad_first_validation_picture_does_not_stop_who_skips_bad_ones(pictures: object, world: Path, tmp_path: Path) -> None:
    shutil.copytree(world, tmp_path / "world")
    val = open_folder(tmp_path / "world", "val")
    Path(val.listing.images[0]).write_bytes(b"broken")
    with pytest.raises(InputError, match=f"^picture {val.ids[0]}.*skip_bad"): fit(toy(pictures), pictures, tmp_path / "run", SHORT, val)
    with pytest.warns(UserWarning, match=val.ids[0]): result = fit(toy(pictures), pictures, tmp_path / "run", changed(skip_bad=True), val)
    assert result.best["step"] > 0


def test_a_folder_where_nothing_can_be_read_is_given_up(damaged: tuple, tmp_path: Path) -> None:
    pictures, _ = damaged
    for path in pictures.listing.images: Path(path).write_bytes(b"broken")
    with pytest.raises(InputError, match="pictures in a row cannot be read"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(toy(pictures), pictures, tmp_path / "run", changed(skip_bad=True))


def test_pictures_that_do_not_stack_are_refused(world: Path, tmp_path: Path) -> None:
    def uneven(sample: object) -> object: return TrainTransform(32 + 8 * (sample.id[-1] in "02468"))(sample)
    with pytest.raises(InputError, match="do not stack"):
        fit(Toy(open_folder(world).classes), open_folder(world, "train", uneven), tmp_path / "run", SHORT)


@pytest.mark.parametrize("empty", ["training", "validation"])
def test_an_empty_split_is_refused(empty: str, world: Path, pictures: object, tmp_path: Path) -> None:
    nothing = open_folder(world, "train", TrainTransform(32), ids=())
    with pytest.raises(InputError, match=f"the {empty} split is empty"):
        if empty == "training": fit(toy(pictures), nothing, tmp_path / "run", SHORT)
        else: fit(toy(pictures), pictures, tmp_path / "run", SHORT, nothing)
    assert not (tmp_path / "run").exists()


def test_validation_pictures_need_masks_unless_the_caller_scores(world: Path, pictures: object, tmp_path: Path) -> None:
    unmasked = open_folder(world, "val", masks=False)
    with pytest.raises(InputError, match="no mask"): fit(toy(pictures), pictures, tmp_path / "run", SHORT, unmasked)
    result = fit(toy(pictures), pictures, tmp_path / "run", SHORT, unmasked, evaluate=lambda *_: {"miou": 0.5})
    assert result.best == {"step": 6, "miou": 0.5}


def test_classes_that_no_training_picture_shows_are_named_once(pictures: object, tmp_path: Path) -> None:
    absent = [name for name, there in zip(pictures.classes, pictures.labels.any(0).tolist(), strict=True) if not there]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(toy(pictures), pictures, tmp_path / "run", SHORT)
        fit(toy(pictures), pictures, tmp_path / "run", SHORT)
    told = [str(warning.message) for warning in caught if "no training picture shows" in str(warning.message)]
    assert absent and len(told) == 1 and all(name in told[0] for name in absent)


def test_a_system_with_nothing_to_train_is_refused(pictures: object, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no parameters to train"): fit(toy(pictures).requires_grad_(False), pictures, tmp_path / "run", SHORT)


def test_frozen_parameters_stay_as_they_are(pictures: object, tmp_path: Path) -> None:
    system = toy(pictures)
    system.net[0].requires_grad_(False)
    before = system.net[0].weight.clone()
    fit(system, pictures, tmp_path / "run", changed(weight_decay=0.5))
    assert system.net[0].weight.equal(before) and system.net[0].weight.grad is None


def test_more_devices_than_processes_is_refused_with_the_command(pictures: object, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="torchrun --nnodes 1 --nproc-per-node 2"): fit(toy(pictures), pictures, tmp_path / "run", changed(devices=2))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_named(pictures: object, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there are 0"): fit(toy(pictures), pictures, tmp_path / "run", changed(accelerator="cuda"))


def test_a_batch_systems_idea_of_the_job_does_not_come_in_between(
        pictures: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "night", "SLURM_LOCALID": "0", "SLURM_PROCID": "0"}.items(): monkeypatch.setenv(name, value)
    assert fit(toy(pictures), pictures, tmp_path / "run", SHORT).history[-1]["step"] == 12


def test_moments_of_other_parameters_are_refused(whole: Path, pictures: object) -> None:
    saved = read_checkpoint(whole / "last.safetensors")
    optimiser = room._optimiser(Toy(pictures.classes, width=5), SHORT)
    with pytest.raises(InputError, match="other parameters"): room._restore_moments(optimiser, saved)
    assert functools.reduce(lambda total, its: total + len(its), saved.moments.values(), 0) == 12
