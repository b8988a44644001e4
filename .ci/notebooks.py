"""Are the committed notebooks clean, and is the package what they export? `python .ci/notebooks.py clean|sync`.

Both work on a copy, so a check never changes the files it checks, inside git or outside.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def notebooks(root: Path) -> list[Path]:
    "The notebooks under `root`/nbs, relative to `root`, hidden folders left out."
    found = (path.relative_to(root) for path in (root / "nbs").rglob("*.ipynb"))
    return sorted(path for path in found if not any(part.startswith((".", "_")) for part in path.parts))


def modules(root: Path) -> set[Path]:
    "The Python files under `root`/freqseg, relative to `root`."
    return {path.relative_to(root) for path in (root / "freqseg").rglob("*.py")}


def copy_of_sources(folder: Path) -> None:
    "Copy into `folder` what nbdev needs to clean and export: its settings, the notebooks, the modules that no notebook exports."
    by_hand = (path.relative_to(ROOT) for path in (ROOT / "freqseg").glob("_*.py") if path.name != "_modidx.py")
    for name in [Path("pyproject.toml"), *by_hand, *notebooks(ROOT)]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)


def run(folder: Path, program: str) -> None:
    "Run an nbdev program of this environment in `folder`; its output is shown only where it fails."
    environment = {name: value for name, value in os.environ.items() if name != "IN_TEST"}
    environment["PYTHONPATH"] = str(ROOT)  # the step of the export that writes sections of docstrings lies in the package
    done = subprocess.run([Path(sys.executable).parent / program], cwd=folder, env=environment, text=True,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{program} failed:\n{done.stdout}")


def changed(folder: Path, names: list[Path]) -> list[str]:
    "Which of the files `names` differ between the repository and `folder`."
    return [str(name) for name in names if (ROOT / name).read_bytes() != (folder / name).read_bytes()]


def not_clean(folder: Path) -> list[str]:
    "The notebooks that nbdev-clean would change."
    run(folder, "nbdev-clean")
    return changed(folder, notebooks(ROOT))


def out_of_sync(folder: Path) -> list[str]:
    "The modules that differ from what the notebooks export, with what is wrong about each."
    run(folder, "nbdev-export")
    here, exported = modules(ROOT), modules(folder)
    return [*(f"{name}  (no notebook exports it)" for name in sorted(here - exported)),
            *(f"{name}  (missing: its notebook was never exported)" for name in sorted(exported - here)),
            *(f"{name}  (differs)" for name in changed(folder, sorted(here & exported)))]


def main(check: str) -> int:
    question, verdict = {"clean": (not_clean, "not clean"), "sync": (out_of_sync, "out of sync")}[check]
    with tempfile.TemporaryDirectory() as folder:
        copy_of_sources(Path(folder))
        problems = question(Path(folder))
    for problem in problems:
        print(f"{verdict}: {problem}")
    if not problems:
        print(f"{len(notebooks(ROOT))} notebooks looked at")
    return int(bool(problems))


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in ("clean", "sync"):
        sys.exit("usage: python .ci/notebooks.py clean|sync")
    sys.exit(main(sys.argv[1]))
