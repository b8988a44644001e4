"""freqseg.work.sweep_processes: shares of the machine."""

import os

import pytest

from freqseg.work.sweep_design import Run
from freqseg.work.sweep_processes import RunProcess, environments


@pytest.mark.parametrize(("cores", "jobs", "given", "threads"), [(8, 2, None, "4"), (8, 3, None, "2"), (2, 4, None, "1"), (8, 2, "1", "1"), (8, 4, "6", "2")])
def test_the_cores_are_dealt_out(monkeypatch: pytest.MonkeyPatch, cores: int, jobs: int, given: str | None, threads: str) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS") if given is None else monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert environments(jobs) == [{"OMP_NUM_THREADS": threads}] * jobs


@pytest.mark.parametrize(("visible", "wanted"), [("0,1", ["0", "1", "0"]), ("3, 5", ["3", "5", "3"]), ("0", [None] * 3), ("", [None] * 3)])
def test_several_gpus_go_round(monkeypatch: pytest.MonkeyPatch, visible: str, wanted: list) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [place.get("CUDA_VISIBLE_DEVICES") for place in environments(3)] == wanted


def test_the_last_line_of_a_process_that_died_is_its_complaint() -> None:
    process = RunProcess(Run({}, 0), {}, {})  # a task without a notebook
    process.process.wait(60)
    verdict = process.verdict()
    assert verdict.startswith("the process ended with status 1: TypeError: run_notebook() missing")
    assert process.words.closed and process.process.stdout.closed
