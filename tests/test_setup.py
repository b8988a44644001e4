"""Setting up on a machine where something is missing: it says what and how to mend it, and a retry goes on."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ["Makefile", "README.md", "LICENSE", "settings.ini", "setup.py", "pyproject.toml", ".ci/setup.py", "freqseg/__init__.py"]


def load_setup() -> ModuleType:
    "The set-up script as a module."
    spec = importlib.util.spec_from_file_location("freqseg_setup", ROOT / ".ci" / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    "The files that set-up reads, in an empty place."
    for name in NEEDED:
        (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "clone" / name)
    (tmp_path / "clone" / "data").mkdir()
    return tmp_path / "clone"


def make(clone: Path, python: str, **environment: str) -> subprocess.CompletedProcess:
    "`make .venv/.ready` in the clone with the interpreter `python`."
    return subprocess.run(["make", f"PYTHON={python}", ".venv/.ready"], cwd=clone, env={**os.environ, **environment},
                          text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def pretend_python(folder: Path, code: str) -> str:
    "A program that runs the set-up script in this Python after `code`, and fails at `-m venv` as Debian's does."
    program = folder / "pretend-python"
    program.write_text(f"""#!/bin/sh
if [ "$2" = venv ]; then mkdir -p "$3/bin"; echo "ensurepip is not available"; exit 1; fi
if [ "$1" = -c ]; then exec {sys.executable} "$@"; fi
exec {sys.executable} -c "
import runpy, sys
sys.executable, sys.argv = '{program}', sys.argv[1:]
{code}
runpy.run_path(sys.argv[0], run_name='__main__')" "$@"
""")
    program.chmod(0o755)
    return str(program)


def test_a_missing_python_is_named_with_how_to_get_one(clone: Path) -> None:
    done = make(clone, "python-that-is-not-there")
    assert done.returncode != 0
    assert "there is no 'python-that-is-not-there' here" in done.stdout and "apt-get" in done.stdout


def test_an_old_python_is_refused_with_both_versions(clone: Path, tmp_path: Path) -> None:
    python = pretend_python(tmp_path, "import shutil; sys.version_info = (3, 8, 1); shutil.which = lambda name: None")
    done = make(clone, python)
    assert done.returncode != 0
    assert "Python 3.8 is too old: freqseg needs 3.10 to 3.13" in done.stdout
    assert not (clone / ".venv").exists()


def test_without_the_venv_module_it_says_which_package_and_leaves_nothing(clone: Path, tmp_path: Path) -> None:
    done = make(clone, pretend_python(tmp_path, ""))
    assert done.returncode != 0
    assert "sudo apt-get install python3-venv" in done.stdout
    assert not (clone / ".venv").exists()


@pytest.mark.slow
def test_without_a_network_it_says_so_and_a_second_try_goes_on(clone: Path) -> None:
    offline = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_FIND_LINKS": "",
               "PIP_EXTRA_INDEX_URL": "", "PIP_RETRIES": "1", "PIP_NO_CACHE_DIR": "1", "no_proxy": "127.0.0.1"}
    first, second = make(clone, sys.executable, **offline), make(clone, sys.executable, **offline)
    assert first.returncode != 0 and second.returncode != 0
    assert "the package index cannot be reached" in first.stdout
    assert "Making .venv" in first.stdout and "Making .venv" not in second.stdout
    assert not (clone / ".venv" / ".ready").exists()


def test_an_unfinished_environment_is_made_afresh(clone: Path, tmp_path: Path) -> None:
    (clone / ".venv").mkdir()
    (clone / ".venv" / ".unfinished").touch()
    assert "making it afresh" in make(clone, pretend_python(tmp_path, "")).stdout


def test_nothing_is_done_when_nothing_changed(clone: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    setup = load_setup()
    (clone / ".venv" / "bin").mkdir(parents=True)
    (clone / ".venv" / "bin" / "python").symlink_to(sys.executable)
    for name, value in {"ROOT": clone, "VENV": clone / ".venv", "PYTHON": clone / ".venv" / "bin" / "python"}.items():
        monkeypatch.setattr(setup, name, str(value))
    assert not setup.is_ready("dev")
    (clone / ".venv" / ".ready").write_text(setup.fingerprint())
    setup.set_up("dev")
    assert capsys.readouterr().out == ""
    (clone / "settings.ini").write_text("[DEFAULT]\nrequirements = another\n")
    assert not setup.is_ready("dev")


@pytest.mark.parametrize(("output", "reason"), [
    ("OSError: [Errno 28] No space left on device", "disk is full"),
    ("NewConnectionError('<...>: Failed to establish a new connection: [Errno 111] Connection refused')", "cannot be reached"),
    ("ERROR: No matching distribution found for torch>=2.6", "no release of torch>=2.6 fits"),
    ("fatal error: Python.h: No such file or directory", "headers are missing"),
    ("error: command '/usr/bin/g++' failed with exit code 1", "compiler failed"),
    ("error: Command '['g++', '-O3']' returned non-zero exit status 1", "compiler failed"),
    ("ERROR: ResolutionImpossible: for help visit", "contradict"),
    ("PermissionError: [Errno 13] Permission denied: '/opt/x'", "cannot be written"),
    ("something never seen before", "pip failed"),
])
def test_a_failing_pip_is_explained(output: str, reason: str) -> None:
    failure = load_setup().pip_failure(output)
    assert reason in failure.reason
    assert failure.remedy.splitlines()[-1].strip() == output


def test_the_crf_is_left_out_with_a_reason_where_it_cannot_be_built(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    setup = load_setup()
    monkeypatch.setattr(setup, "version_of", lambda python: (3, 13))
    setup.install_crf()
    assert "no build for Python 3.13" in capsys.readouterr().out
    monkeypatch.setattr(setup, "version_of", lambda python: (3, 11))
    monkeypatch.setattr(setup, "PYTHON", shutil.which("false"))
    monkeypatch.setattr(setup, "compiler", lambda: "")
    setup.install_crf()
    assert "there is no C++ compiler here" in capsys.readouterr().out


def test_make_alone_lists_every_target() -> None:
    listed = subprocess.run(["make"], cwd=ROOT, text=True, capture_output=True, check=True).stdout
    for target in ("demo", "lab", "test", "fast", "bench", "docs", "clean"):
        assert f"make {target}" in listed


@pytest.mark.slow
def test_an_installed_wheel_finds_its_data(clone: Path, tmp_path: Path) -> None:
    shutil.copy(ROOT / "freqseg" / "files.py", clone / "freqseg")
    (clone / "data" / "lists").mkdir()
    (clone / "data" / "lists" / "ids.txt").write_text("2007_000032\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--target", tmp_path / "site", clone], check=True)
    program = "from freqseg.files import shipped; print(shipped('lists/ids.txt').read_text())"
    found = subprocess.run([sys.executable, "-c", program], cwd=tmp_path / "site", text=True, capture_output=True, check=True)
    assert found.stdout.strip() == "2007_000032"
    assert (tmp_path / "site" / "freqseg" / "assets" / "lists" / "ids.txt").is_file()
