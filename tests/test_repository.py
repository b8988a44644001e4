"""The rules of the house, checked on the files themselves: floors, notebooks, versions, requirements."""

import ast
import configparser
import graphlib
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import freqseg

ROOT = Path(__file__).resolve().parent.parent
LARGEST_NOTEBOOK = 600_000  # bytes
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:root|home/\w+|tmp|work|Users/\w+)/[\w./-]*|[A-Z]:\\\\Users")
FOLDERS = ["", "systems", "world", "work", "faces"]  # from the ground up; what lies at the top are the parts
NOT_ON_FLOOR_0 = {"open_clip", "torchvision", "matplotlib", "pywt", "scipy", "skimage", "sklearn", "PIL", "papermill"}


def all_notebooks() -> list[Path]:
    "Every notebook of the repository, hidden folders left out."
    found = (path for path in (ROOT / "nbs").rglob("*.ipynb"))
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(ROOT).parts))


def name_of(path: Path) -> str:
    "A path as pytest shows it."
    return str(path.relative_to(ROOT))


NOTEBOOKS = all_notebooks()
TRAINING = [path for path in NOTEBOOKS if path.parent.name == "train"]


@cache
def cells(path: Path) -> list[dict]:
    "The cells of a notebook."
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell: dict) -> str:
    "A cell's source as one string."
    return "".join(cell["source"])


@cache
def floors() -> dict[str, int]:
    "Module name -> floor: a folder is a floor of its own; at the top the notebook's number says it (0 mathematics, 1 inputs, 2 and 3 method parts)."
    found = {}
    for path in (ROOT / "nbs").rglob("[0-9][0-9]_*.ipynb"):
        exported = re.search(r"^#\|\s*default_exp:?\s+([\w.]+)", "\n".join(map(source, cells(path))), re.MULTILINE)
        assert exported, f"{path.name} has a number but exports no module"
        folder = exported.group(1).rpartition(".")[0]
        assert folder == path.parent.relative_to(ROOT / "nbs").as_posix().strip("."), f"{path.name} lies in another folder than its module"
        found[f"freqseg.{exported.group(1)}"] = FOLDERS.index(folder) + 2 if folder else min(int(path.name[0]), 2)
    return found


def module_path(module: str) -> Path:
    "The file of a module of the package."
    return ROOT / (module.replace(".", "/") + ".py")


@cache
def imports(module: str) -> frozenset[str]:
    "Every module that `module` imports, inside functions too; relative names resolved."
    found = set()
    for node in ast.walk(ast.parse(module_path(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            name = ".".join([*module.split(".")[:-node.level], *filter(None, [node.module])]) if node.level else node.module
            found |= {name, *(f"{name}.{alias.name}" for alias in node.names)}
    return frozenset(found)


def house_imports(module: str) -> set[str]:
    "The rooms that a room imports."
    return set(imports(module)) & set(floors()) - {module}


def modules_on(floor: int) -> list[str]:
    "The rooms on one floor."
    return sorted(module for module, its in floors().items() if its == floor)


@cache
def settings() -> dict[str, list[str]]:
    "The requirement lists of settings.ini."
    parser = configparser.ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return {name: [line.strip() for line in value.splitlines() if line.strip()]
            for name, value in parser["DEFAULT"].items() if name.endswith("requirements")}


@cache
def import_names() -> dict[str, set[str]]:
    "Distribution name -> what one imports from it."
    found: dict[str, set[str]] = {}
    for module, distributions in importlib.metadata.packages_distributions().items():
        for distribution in distributions:
            found.setdefault(canonicalize_name(distribution), set()).add(module)
    return found


# ---- floors ---------------------------------------------------------------------------------------------------------

def test_every_module_is_exported_by_a_numbered_notebook() -> None:
    modules = {path.relative_to(ROOT) for path in (ROOT / "freqseg").rglob("*.py") if not path.name.startswith("_")}
    assert modules == {module_path(module).relative_to(ROOT) for module in floors()}


@pytest.mark.parametrize("module", sorted(floors()))
def test_a_room_imports_only_from_its_own_floor_or_below(module: str) -> None:
    above = {other for other in house_imports(module) if floors()[other] > floors()[module]}
    assert not above, f"{module} (floor {floors()[module]}) imports from above: {sorted(above)}"


def test_no_rooms_import_each_other_in_a_circle() -> None:
    order = list(graphlib.TopologicalSorter({module: house_imports(module) for module in floors()}).static_order())
    assert set(order) == set(floors())


def test_the_mathematics_imports_torch_only() -> None:
    program = "import " + ", ".join(modules_on(0))
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", program], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "freqseg" in imported
    assert not imported & NOT_ON_FLOOR_0


@pytest.mark.parametrize("module", sorted(floors()))
def test_everything_imported_is_a_declared_requirement(module: str) -> None:
    declared = {canonicalize_name(Requirement(line).name) for part in ("requirements", "crf_requirements")
                for line in settings()[part]}
    allowed = {name for distribution in declared for name in import_names().get(distribution, ())}
    used = {name.split(".")[0] for name in imports(module)} - set(sys.stdlib_module_names) - {"freqseg", "pydensecrf"}
    assert used <= allowed, f"{module} imports {sorted(used - allowed)}, not in settings.ini"


# ---- notebooks ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_reader_of_the_notebook_sees_results(path: Path) -> None:
    assert any(cell.get("outputs") for cell in cells(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_the_notebook_is_small_and_free_of_widget_state(path: Path) -> None:
    assert path.stat().st_size <= LARGEST_NOTEBOOK
    assert "widgets" not in json.loads(path.read_text(encoding="utf-8"))["metadata"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_the_notebook_names_no_path_of_one_machine(path: Path) -> None:
    for cell in cells(path):
        outputs = [{**output, "data": {kind: data for kind, data in output.get("data", {}).items()
                                       if not kind.startswith("image/")}} for output in cell.get("outputs", [])]
        found = MACHINE_PATH.search(source(cell) + "\n" + json.dumps(outputs))
        assert not found, f"{path.name}: {found.group(0)}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_no_cell_failed_when_the_notebook_was_run(path: Path) -> None:
    kinds = {output["output_type"] for cell in cells(path) for output in cell.get("outputs", [])}
    assert "error" not in kinds


@pytest.mark.parametrize("path", TRAINING, ids=name_of)
def test_papermill_finds_the_parameters_of_a_training_notebook(path: Path) -> None:
    tagged = [cell for cell in cells(path) if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1, f"{path.name}: {len(tagged)} cells are tagged `parameters`, one is wanted"
    assert tagged[0]["cell_type"] == "code"


# ---- versions and requirements --------------------------------------------------------------------------------------

def test_the_changelog_begins_with_this_version() -> None:
    heading = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert heading.group(1) == freqseg.__version__


def test_the_changelog_sorts_changes_into_new_changed_and_fixed() -> None:
    newest = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("\n## ")[1]
    assert re.findall(r"^### (\w+)", newest, re.MULTILINE) == ["New", "Changed", "Fixed"]


@pytest.mark.parametrize("line", settings()["requirements"] + settings()["dev_requirements"])
def test_a_requirement_is_installed_in_that_version_and_importable(line: str) -> None:
    wanted = Requirement(line)
    assert wanted.specifier.contains(importlib.metadata.version(wanted.name), prereleases=True)
    modules = import_names()[canonicalize_name(wanted.name)]
    assert any(importlib.util.find_spec(module) for module in modules)


def test_python_versions_agree_wherever_they_are_written() -> None:
    oldest = re.search(r"^min_python = (\S+)$", (ROOT / "settings.ini").read_text(), re.MULTILINE).group(1)
    assert f'requires-python = ">={oldest}"' in (ROOT / "pyproject.toml").read_text()
    assert f"Python {oldest} to 3.13" in (ROOT / "README.md").read_text()


def test_every_link_of_the_readme_into_the_repository_leads_somewhere() -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]
