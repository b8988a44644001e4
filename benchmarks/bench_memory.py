"""A training step of DFA on the embedded world, with and without `freqseg.memory.keep_memory`, each in a process of its own.

Wall clock, user and system time of a step: what is saved is the system's, which finds and clears pages for every large array.

    python benchmarks/bench_memory.py [threads]    both, and their ratio
    pytest benchmarks/bench_memory.py              the same through pytest-benchmark
"""
import os, statistics, subprocess, sys

import pytest

# A MALLOC_ variable in the environment makes `keep_memory` leave things alone; this one changes nothing else (128 KiB is glibc's own).
FORMS = {"kept": {}, "handed back": {"MALLOC_TOP_PAD_": "131072"}}
STEPS = 15


def steps(threads: int) -> None:
    "Print wall clock, user and system seconds of a step: medians over the later steps of a short training."
    import tempfile, warnings
    import torch
    import freqseg.work.train as room
    from freqseg.work.experiments import experiment
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")   # a few scenes do not show every class
    spent, step = [], room._train_step

    def timed(*arguments: object) -> None:
        before = os.times()
        step(*arguments)
        after = os.times()
        spent.append((after.elapsed - before.elapsed, after.user - before.user, after.system - before.system))

    room._train_step = timed
    with tempfile.TemporaryDirectory() as out:
        run = experiment("dfa", dict(preset="world", scenes=(64, 4, 4), iterations=STEPS, warmup=2, workers=0, validate_every=0, out=out, device="cpu"))
        run.result
    print(*(statistics.median(column) for column in zip(*spent[5:], strict=True)))


def measured(form: str, threads: int) -> list[float]:
    "The figures of a process that keeps its memory, or does not."
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, __file__, "--steps", str(threads)], env={**clean, **FORMS[form], "OMP_NUM_THREADS": str(threads)},
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode: raise RuntimeError(done.stderr[-2000:])
    return [float(word) for word in done.stdout.split()[-3:]]


@pytest.mark.benchmark(group="a step of DFA on the embedded world, in a process")
@pytest.mark.parametrize("form", FORMS)
def test_memory(benchmark, form: str) -> None:
    wall, user, system = benchmark.pedantic(measured, (form, 1), rounds=1)
    assert wall > 0 and user > 0 and system >= 0


def main(threads: int = 2) -> None:
    print(f"a training step of DFA on the embedded world, 8 crops of 128 x 128, {threads} thread(s), medians")
    found = {form: measured(form, threads) for form in FORMS}
    for form, (wall, user, system) in found.items(): print(f"memory {form:<12} {wall:.2f} s   user {user:.2f}   system {system:.2f}")
    print(f"handed back / kept: {found['handed back'][0] / found['kept'][0]:.2f}x")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--steps"]: steps(int(sys.argv[2]))
    else: main(*map(int, sys.argv[1:]))
