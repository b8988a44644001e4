"""The site: every link leads somewhere, nothing comes from elsewhere, and the guide's commands are commands that freqseg knows."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "nbs" / "index.md", *(ROOT / "nbs" / "guide").glob("*.md")])


# ---- the guide ------------------------------------------------------------------------------------------------------

def blocks(page: Path, language: str) -> list[str]:
    "The fenced blocks of a page in that language."
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    "The words of every `freqseg` command in the shell blocks of a page; what stands before it (torchrun, a quote) is left out."
    text = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
    return [shlex.split(words, comments=True)
            for words in re.findall(r"(?:^|--no-python |bash -c ')freqseg (.*?)'?$", text, re.MULTILINE)]


def check_command(words: list[str]) -> None:
    "Raises what `freqseg WORDS` would, before it does anything."
    from freqseg.faces.cli import build_parser
    from freqseg.faces.training_cli import given_parameters, grid_axes
    from freqseg.work.experiments import plan, presets_of
    numbers = {"$SLURM_NNODES": "2", "$SLURM_NODEID": "0"}
    args = build_parser().parse_args([numbers.get(word, word) for word in words])
    if words[0] in ("train", "sweep"):
        assert (args.preset or "smoke") in presets_of(args.system)
        plan(args.system, given_parameters(args))   # every -p is a parameter, and its value one that it can have
    if words[0] == "sweep": assert grid_axes(args.system, args.grid)
    if words[0] == "run": assert (ROOT / args.notebook).is_file()


def check_python(code: str) -> None:
    "Raises what a block of Python would when it is compiled, and what its imports from the package would."
    compile(code, "block", "exec")
    for line in re.findall(r"^from freqseg\S* import .+$", code, re.MULTILINE): exec(line, {})


def faults(checks: list[tuple[str, Callable[[], None]]]) -> list[str]:
    "What fails of these checks, with its name."
    failed = []
    for name, check in checks:
        try: check()
        except (Exception, SystemExit) as error: failed.append(f"{name}: {error!r}")
    return failed


def test_commands_of_the_guide_are_ones_that_freqseg_takes(own_registry: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my_system.py").write_text(blocks(ROOT / "nbs" / "guide" / "own_system.md", "python")[0])   # the file that commands of that page name
    monkeypatch.chdir(tmp_path)
    checks = [(f"{page.stem}: freqseg {' '.join(words)}", partial(check_command, words))
              for page in PAGES for words in commands(page) if words != ["--help"]]
    wrong = faults(checks)
    assert len(checks) > 30 and not wrong, "\n".join([*wrong, capsys.readouterr().err])


def test_python_in_the_guide_compiles_and_imports_what_there_is() -> None:
    checks = [(page.stem, partial(check_python, code)) for page in PAGES for code in blocks(page, "python")]
    wrong = faults(checks)
    assert checks and not wrong, "\n".join(wrong)


@pytest.mark.parametrize("words", ["train dfaa", "train dfa -p lambda_x=1", "train dfa --preset large", "run nbs/none.ipynb", "camm x"])
def test_a_wrong_command_would_be_noticed(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(faults([("page", partial(check_command, words.split()))])) == 1


def test_options_that_the_page_on_systems_names_are_options() -> None:
    from freqseg.systems.segmenter import known_systems
    from freqseg.work.experiments import known_parameters
    known = {name for system in known_systems() for names in known_parameters(system).values() for name in names}
    named = re.findall(r"`(\w+)=[\w.-]+`", (ROOT / "nbs" / "guide" / "systems.md").read_text(encoding="utf-8"))
    assert len(named) > 10 and not set(named) - known


# ---- the site -------------------------------------------------------------------------------------------------------

class Links(HTMLParser):
    "What a page points at, and the places in it that can be pointed at."

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.places: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("href", "src", "data", "poster") and value is not None: self.targets.append(value)
            if name in ("id", "name") and value: self.places.add(value)
            if name == "srcset" and value: self.targets += [part.split()[0] for part in value.split(",")]


@cache
def links(page: Path) -> Links:
    "The links of a page, read once."
    return Links(page)


def missing(page: Path, target: str, site: Path) -> str | None:
    "What is wrong with a link of a page, or None. Links to other sites are not followed."
    parts = urlsplit(target)
    if parts.scheme or parts.netloc: return None
    if parts.path.startswith("/"): return f"{target}: opened from the disk, this is the root of the disk"
    there = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if there.is_dir(): there = there / "index.html"
    if site not in there.parents: return f"{target}: outside of the site"
    if not there.is_file(): return f"{target}: no such file"
    if parts.fragment and there.suffix == ".html" and unquote(parts.fragment) not in links(there).places: return f"{target}: no such heading"
    return None


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "The site, built once."
    for module in ("mkdocs", "mkdocs_jupyter", "material"): pytest.importorskip(module, reason="the site's packages are not installed (make docs)")
    out = tmp_path_factory.mktemp("site").resolve()
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(out)], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    return out


@pytest.mark.slow
def test_every_link_and_picture_of_the_site_is_there(site: Path) -> None:
    pages = [page for page in sorted(site.rglob("*.html")) if page.name != "404.html"]   # that one is for servers, and begins at their root
    assert len(pages) > 60
    broken = [f"{page.relative_to(site)}: {fault}" for page in pages for target in links(page).targets if (fault := missing(page, target, site))]
    assert not broken, "\n".join(broken)


@pytest.mark.slow
def test_the_navigation_begins_with_home_and_the_guide(site: Path) -> None:
    found = [target for target in links(site / "index.html").targets if target.endswith(".html") and "://" not in target]
    inside = list(dict.fromkeys(found))
    names = ("first_hour", "own_data", "own_classes", "own_system", "own_map", "cluster", "crf", "systems", "glossary")
    guide = [f"guide/{name}.html" for name in names]
    assert [page for page in inside if page.startswith("guide/")] == guide
    assert inside.index(guide[-1]) < next(place for place, page in enumerate(inside) if page.startswith("explore/"))


@pytest.mark.slow
def test_pages_read_nothing_from_elsewhere(site: Path) -> None:
    elsewhere = re.compile(r"<(?:script|img|iframe)[^>]+src=\"https?:|<link[^>]+rel=\"stylesheet\"[^>]+href=\"https?:")
    wrong = [str(page.relative_to(site)) for page in site.rglob("*.html") if elsewhere.search(page.read_text(encoding="utf-8"))]
    assert not wrong, "\n".join(wrong)
