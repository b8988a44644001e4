#!/usr/bin/env python3
"""Set up .venv with everything freqseg needs: `python3 .ci/setup.py [dev|docs]`. The Makefile calls it.

Safe to run again at any time: it does nothing when nothing changed, and it goes on where a failed run stopped. It uses
the standard library only, and no syntax that an old Python could not read, because saying "your Python is too old" is
one of its jobs.
"""

import configparser
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
PYTHON = os.path.join(VENV, "bin", "python")
UNFINISHED = os.path.join(VENV, ".unfinished")  # there only while the environment itself is being made
LOG = os.path.join(VENV, "setup.log")
SOURCES = ("setup.py", "settings.ini", "pyproject.toml", os.path.join(".ci", "setup.py"))

OLDEST, NEWEST = (3, 10), (3, 13)
OTHER_PYTHONS = ("python3.12", "python3.11", "python3.13", "python3.10")
DISK_NEEDED = 7e9  # bytes; torch and its CUDA libraries are most of it
BEAT = 20  # seconds between two signs of life

# What a failing pip prints -> why it failed, and what to do. The first that matches wins.
PIP_FAILURES = (
    (r"No space left on device|Errno 28|Disk quota exceeded",
     "the disk is full",
     "Free about 7 GB, or move the repository to a larger disk, and run the same command again."),
    (r"NewConnectionError|NameResolutionError|Temporary failure in name resolution|Failed to establish a new connection"
     r"|ConnectTimeoutError|ReadTimeoutError|Read timed out|ProxyError|SSLError|Network is unreachable"
     r"|Connection refused|ConnectionResetError|Connection aborted|Max retries exceeded|IncompleteRead|IncompleteDownload",
     "the package index cannot be reached",
     "Check the network (and PIP_INDEX_URL, https_proxy if you use them) and run the same command again;\n"
     "what was downloaded so far is kept."),
    (r"from versions: none\)",
     "the package index cannot be reached, or it lacks a package",
     "Check the network (and PIP_INDEX_URL, https_proxy if you use them) and run the same command again."),
    (r"No matching distribution found for (?P<what>[^\n]+)",
     "no release of {what} fits this Python and platform",
     "Use Python 3.11 or 3.12: rm -r .venv, then the same command with PYTHON=python3.12 behind `make`."),
    (r"ResolutionImpossible|conflicting dependencies",
     "the requirements contradict each other",
     "See the log; if you changed settings.ini, look there first."),
    (r"Python\.h: No such file",
     "the Python headers are missing",
     "Debian, Ubuntu: sudo apt-get install python3-dev. Fedora: sudo dnf install python3-devel. Then run it again."),
    (r"error: [Cc]ommand [\['\"]+[^'\"]*(?:gcc|g\+\+|cc|c\+\+|clang)|No such file or directory: '(?:gcc|g\+\+|cc|c\+\+)'",
     "a package had to be compiled and the compiler failed",
     "Debian, Ubuntu: sudo apt-get install g++ python3-dev. macOS: xcode-select --install. Then run it again."),
    (r"Permission denied|Errno 13",
     "a folder cannot be written",
     "Make the repository folder yours (chown), or clone it again into a folder of your own."),
    (r"Killed|MemoryError|Errno 12",
     "memory ran out",
     "Close other programs and run the same command again."),
)
UNKNOWN = (r"", "pip failed", "The lines below say why. Mend that and run the same command again.")


class SetupError(Exception):
    """A step failed: `reason` says why, `remedy` what to do about it."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.reason, self.remedy = reason, remedy


def say(text: str) -> None:
    print("[setup] " + text.replace("\n", "\n[setup]   "), flush=True)


def dotted(version: tuple) -> str:
    return ".".join(str(number) for number in version)


# ---- which Python ---------------------------------------------------------------------------------------------------

def version_of(python: str) -> tuple:
    "(major, minor) of an interpreter, or () where it does not run."
    ask = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        answer = subprocess.run([python, "-c", ask], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ()
    found = re.match(r"(\d+)\.(\d+)", answer.stdout.decode()) if answer.returncode == 0 else None
    return (int(found.group(1)), int(found.group(2))) if found else ()


def choose_python() -> str:
    "This interpreter if its version fits, otherwise another on the PATH whose version does."
    own = sys.version_info[:2]
    if OLDEST <= own <= NEWEST:
        return sys.executable
    for name in OTHER_PYTHONS:
        path = shutil.which(name)
        if path and OLDEST <= version_of(path) <= NEWEST:
            say("python3 here is {}; using {} instead.".format(dotted(own), path))
            return path
    if own > NEWEST:
        say("Python {} is newer than anything tried so far ({}); going on with it.".format(dotted(own), dotted(NEWEST)))
        return sys.executable
    raise SetupError(
        "Python {} is too old: freqseg needs {} to {}".format(dotted(own), dotted(OLDEST), dotted(NEWEST)),
        "Install a newer one (Debian, Ubuntu: sudo apt-get install python3.11 python3.11-venv; macOS: brew install\n"
        "python@3.12; or pyenv install 3.12). If you have one under another name: make PYTHON=/path/to/python3.12 ...")


# ---- the environment ------------------------------------------------------------------------------------------------

def has_pip() -> bool:
    done = subprocess.run([PYTHON, "-c", "import pip"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return done.returncode == 0


def usable_environment() -> bool:
    "Is there a .venv that can be installed into? Clears away one that cannot."
    if not os.path.isdir(VENV):
        return False
    if os.path.exists(UNFINISHED) or not version_of(PYTHON):
        say("The .venv here is unfinished, or its Python is gone: making it afresh.")
        shutil.rmtree(VENV)
        return False
    if version_of(PYTHON) < OLDEST:
        raise SetupError(".venv holds Python {}, too old for freqseg".format(dotted(version_of(PYTHON))),
                         "rm -r .venv, and run the same command again.")
    if not has_pip():
        subprocess.run([PYTHON, "-m", "ensurepip"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if not has_pip():
        raise SetupError("the .venv here has no pip", "rm -r .venv, and run the same command again.")
    return True


def warn_of_small_disk() -> None:
    free = shutil.disk_usage(ROOT).free
    if free < DISK_NEEDED:
        say("Only {:.1f} GB are free here; about {:.0f} GB are needed. Trying all the same.".format(
            free / 1e9, DISK_NEEDED / 1e9))


def make_environment(python: str) -> None:
    "Make .venv with `python`, or leave nothing behind."
    say("1/3 Making .venv with Python {} (a few seconds) ...".format(dotted(version_of(python))))
    os.makedirs(VENV)
    open(UNFINISHED, "w").close()
    made = subprocess.run([python, "-m", "venv", VENV], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if made.returncode == 0 and has_pip():
        os.remove(UNFINISHED)
        return
    shutil.rmtree(VENV, ignore_errors=True)
    raise venv_failure(made.stdout.decode(errors="replace"), dotted(version_of(python)))


def venv_failure(output: str, version: str) -> SetupError:
    if re.search(r"ensurepip|No module named '?venv", output):
        return SetupError(
            "this Python cannot make virtual environments: its venv module is not installed",
            "Debian, Ubuntu: sudo apt-get install python3-venv (or python{}-venv). Then run the same command again.\n"
            "Nothing was left behind.".format(version))
    for pattern, reason, remedy in PIP_FAILURES:
        if re.search(pattern, output) and "{what}" not in reason:
            return SetupError(reason, remedy)
    return SetupError("python -m venv failed:\n" + output.strip()[-800:], "Mend that and run the same command again.")


# ---- installing -----------------------------------------------------------------------------------------------------

def last_line(path: str) -> str:
    "The last line of the log that says what pip is doing, cut to a screen's width."
    with open(path, "rb") as log:
        log.seek(max(0, os.path.getsize(path) - 20000))
        lines = [line.strip() for line in re.split(r"[\r\n]", log.read().decode(errors="replace"))]
    told = [line for line in lines if line and not line.startswith("WARNING")]
    return told[-1][:90] if told else ""


def pip(*arguments: str) -> str:
    "Run pip, writing to the log and showing a sign of life now and then. Returns '' or, on failure, what it printed."
    environment = dict(os.environ, PIP_USER="0", PIP_NO_INPUT="1", PIP_DISABLE_PIP_VERSION_CHECK="1")
    environment.pop("PYTHONHOME", None)
    start = beat = time.time()
    with open(LOG, "ab") as log:
        begin = log.tell()
        command = [PYTHON, "-m", "pip"] + list(arguments) + ["--progress-bar", "off"]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log,
                                   stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                time.sleep(0.2)
                if time.time() - beat > BEAT:
                    beat = time.time()
                    say("    {:.0f} s: {}".format(beat - start, last_line(LOG)))
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if process.returncode == 0:
        return ""
    with open(LOG, "rb") as log:
        log.seek(begin)
        return log.read().decode(errors="replace") or "pip ended with status {}".format(process.returncode)


def pip_failure(output: str) -> SetupError:
    "Why pip failed, from what it printed."
    pattern, reason, remedy = next(failure for failure in (*PIP_FAILURES, UNKNOWN) if re.search(failure[0], output))
    lines = [line.strip()[:160] for line in output.splitlines() if line.strip()]
    told = [line for line in lines if re.match(r"(?i)(\S+ )?(fatal )?error", line)] or lines
    return SetupError(reason.format(**re.search(pattern, output).groupdict()),
                      "{}\nFrom .venv/setup.log:\n{}".format(remedy, "\n".join(told[-5:])))


def install_package(extra: str) -> None:
    size = "2 to 5 minutes and about 6 GB the first time, PyTorch mostly" if extra == "dev" else "about half a minute"
    say('2/3 pip install -e ".[{}]" ({}) ...'.format(extra, size))
    output = pip("install", "-e", ".[{}]".format(extra))
    if output:
        raise pip_failure(output)


def requirements(extra: str) -> list:
    "The requirements of an extra, from settings.ini."
    parser = configparser.ConfigParser(delimiters=["="], interpolation=None)
    parser.read(os.path.join(ROOT, "settings.ini"), encoding="utf-8")
    return [line.strip() for line in parser["DEFAULT"][extra + "_requirements"].splitlines() if line.strip()]


def compiler() -> str:
    "Path of a C++ compiler, or ''."
    names = (os.environ.get("CXX", "").split() or [""])[0], "g++", "c++", "clang++"
    return next((shutil.which(name) for name in names if name and shutil.which(name)), "")


def install_crf() -> None:
    "The dense CRF, where it can be had. Never fails: without it everything else works."
    version = version_of(PYTHON)
    later = "install it later with: .venv/bin/python -m pip install -e '.[crf]'"
    if version >= (3, 13):
        say("3/3 Dense CRF left out: pydensecrf2 has no build for Python {}. Everything else works; PAR refines without\n"
            "it. For the CRF: rm -r .venv, then the same command with PYTHON=python3.12 behind `make`.".format(dotted(version)))
        return
    if subprocess.run([PYTHON, "-c", "import pydensecrf"], stderr=subprocess.DEVNULL).returncode == 0:
        say("3/3 Dense CRF: already there.")
        return
    if not compiler():
        say("3/3 Dense CRF left out: it is compiled on installation and there is no C++ compiler here. Everything else\n"
            "works; PAR refines without it. Debian, Ubuntu: sudo apt-get install g++ python3-dev. macOS: xcode-select\n"
            "--install. Then " + later)
        return
    say("3/3 Compiling the dense CRF (about a minute) ...")
    output = pip("install", *requirements("crf"))
    if output:
        failure = pip_failure(output)
        say("Dense CRF left out: {}. Everything else works; PAR refines without it.\n{}\nOr {}".format(
            failure.reason, failure.remedy, later))


def check_imports() -> None:
    "Does what was installed import? A torch of one origin beside a torchvision of another, for one, does not."
    names = "freqseg", "torch", "torchvision", "open_clip"
    code = ("import importlib.util as u\n"
            "for name in {!r}:\n"
            "    if name == 'freqseg' or u.find_spec(name): __import__(name)").format(names)
    done = subprocess.run([PYTHON, "-c", code], cwd=VENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SetupError("what was installed does not import:\n" + done.stdout.decode(errors="replace").strip()[-600:],
                         "rm -r .venv, and run the same command again.")


# ---- once is enough -------------------------------------------------------------------------------------------------

def stamp_path(extra: str) -> str:
    return os.path.join(VENV, ".ready" if extra == "dev" else ".ready-" + extra)


def fingerprint() -> str:
    "Changes when the requirements, or this script, or the repository's place change."
    digest = hashlib.sha256(ROOT.encode())
    for name in SOURCES:
        with open(os.path.join(ROOT, name), "rb") as source:
            digest.update(source.read())
    return digest.hexdigest()


def is_ready(extra: str) -> bool:
    try:
        with open(stamp_path(extra)) as stamp:
            return stamp.read().strip() == fingerprint() and bool(version_of(PYTHON))
    except OSError:
        return False


def set_up(extra: str) -> None:
    if is_ready(extra):
        os.utime(stamp_path(extra))  # only the dates changed: keep make quiet next time
        return
    start = time.time()
    if not usable_environment():
        python = choose_python()
        warn_of_small_disk()
        make_environment(python)
    if extra != "dev" and not is_ready("dev"):
        set_up("dev")
    install_package(extra)
    if extra == "dev":
        install_crf()
        check_imports()
    with open(stamp_path(extra), "w") as stamp:
        stamp.write(fingerprint() + "\n")
    say("Ready after {:.0f} s.".format(time.time() - start))


def main() -> int:
    extra = sys.argv[1] if len(sys.argv) > 1 else "dev"
    if extra not in ("dev", "docs"):
        say("usage: python3 .ci/setup.py [dev|docs]")
        return 2
    try:
        set_up(extra)
    except SetupError as error:
        say("FAILED: {}\n{}".format(error.reason, error.remedy))
        return 1
    except KeyboardInterrupt:
        say("Stopped. Run the same command again to go on.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
