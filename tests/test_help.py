"""help() says of every argument what it is: the step of the export that repeats notes in docstrings, and that all have notes."""

import ast
import dataclasses
import importlib
import inspect
import json
import pkgutil
import re
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import freqseg
from freqseg._export import SECTION, documented, with_sections

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(info.name for info in pkgutil.walk_packages(freqseg.__path__, "freqseg.")
                 if not info.ispkg and not info.name.rpartition(".")[2].startswith("_"))

EXAMPLE = '''def soften(
    x: Tensor,              # (B, D, h, w) maps
    mu: float = .2,         # cut-off, cycles per token
    *, shape: str="disc",   # "disc" or "square"   # noqa: E252
    plain=None,
    **more: Any,            # of `soften`
) -> Tensor:                # (B, D, h, w)
    "Smooth maps."
    return x

@dataclass
class Settings(Options):
    "Options."
    mu: float = option(.2, "cut-off, cycles per token", low=0)
    size: int | None = None   # pixels
    names: ClassVar[tuple] = ()   # of the options

class Layer(nn.Module):
    """A layer.

    In two lines."""
    def __init__(self, dim: int,   # channels
                 width: int = 2): self.dim = dim

    def forward(self, x: Tensor) -> Tensor: return x   # a remark on the code

def bare(a: int):   # one thing
    return a

def short(
    a: int,   # a back\\\\slash
): return a

def _hidden(
    a: int,   # not shown
): return a
'''


def docstrings(source: str) -> dict[str, str]:
    "Name -> docstring of everything in a piece of code."
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name: ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)}


# ---- the step of the export -----------------------------------------------------------------------------------------

def test_notes_become_sections_in_numpys_style() -> None:
    docs = docstrings(with_sections(EXAMPLE))
    assert docs["soften"] == (
        "Smooth maps.\n\nParameters\n----------\nx : Tensor\n    (B, D, h, w) maps\nmu : float\n    cut-off, cycles per token\n"
        'shape : str\n    "disc" or "square"\n**more : Any\n    of `soften`\n\nReturns\n-------\nTensor\n    (B, D, h, w)')
    assert docs["Settings"] == "Options.\n\nAttributes\n----------\nmu : float\n    cut-off, cycles per token\nsize : int | None\n    pixels"
    assert docs["Layer"] == "A layer.\n\nIn two lines.\n\nParameters\n----------\ndim : int\n    channels"
    assert docs["bare"] == "Parameters\n----------\na : int\n    one thing"
    assert docs["short"].endswith("a : int\n    a back\\\\slash")
    assert docs["forward"] is None and docs["_hidden"] is None


def test_the_code_stays_what_it_was() -> None:
    def code(source: str) -> str:
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None: del node.body[0]
        return ast.dump(tree)
    assert code(with_sections(EXAMPLE)) == code(EXAMPLE)


def test_a_second_export_changes_nothing() -> None:
    once = with_sections(EXAMPLE)
    assert with_sections(once) == once


def test_a_changed_note_replaces_the_old_one() -> None:
    later = with_sections(with_sections(EXAMPLE).replace("# (B, D, h, w) maps", "# maps (B, D, h, w)"))
    assert "maps (B, D, h, w)" in docstrings(later)["soften"] and "(B, D, h, w) maps" not in docstrings(later)["soften"]


def test_only_exported_code_cells_are_touched() -> None:
    def cell(kind: str, directive: str) -> types.SimpleNamespace:
        made = types.SimpleNamespace(cell_type=kind, directives_={directive: ""}, source=EXAMPLE)
        made.set_source = lambda text: setattr(made, "source", text)
        documented(made)
        return made
    assert cell("code", "export").source != EXAMPLE
    assert cell("code", "hide").source == cell("markdown", "export").source == EXAMPLE
    assert with_sections("%matplotlib inline\n") == "%matplotlib inline\n"


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").rglob("[0-9][0-9]_*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_has_notes_and_no_sections(path: Path) -> None:
    exported = ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if "#| export" in "".join(cell["source"])[:60]]
    twice = [text for text in exported for doc in docstrings(text.partition("\n")[2]).values() if doc and SECTION.search(doc)]
    assert not twice, "nbdev-update copied what the export had made: keep the notes beside the arguments, take the sections out"


# ---- every argument -------------------------------------------------------------------------------------------------

def members(module: types.ModuleType) -> Iterator[tuple[str, object]]:
    "Public functions and classes that a module defines; the silhouettes of drawn classes, all of (x, y), are explained by their room."
    for name, value in vars(module).items():
        mine = (inspect.isfunction(value) or inspect.isclass(value)) and value.__module__ == module.__name__
        if not mine or name.startswith("_") or module.__name__ == "freqseg.world.scenes" and str(inspect.signature(value)) == "(x, y)": continue
        yield name, value


def arguments(value: object) -> list[str]:
    "What a caller can give: parameters of a function or constructor, fields of a dataclass."
    if getattr(value, "_is_protocol", False): return []
    if not inspect.isclass(value): named = list(inspect.signature(value).parameters)
    elif dataclasses.is_dataclass(value): named = [field.name for field in dataclasses.fields(value) if field.init]
    else: named = [name for name in inspect.signature(value.__init__).parameters if name != "self"] if "__init__" in vars(value) else []
    return [name for name in named if not name.startswith("_") and name not in ("self", "cls")]


def without_a_word(value: object) -> list[str]:
    "Arguments that neither the sections of a docstring nor its sentences explain; a class's are those of its bases, too."
    kinds = [kind for kind in value.__mro__ if kind.__module__.startswith("freqseg")] if inspect.isclass(value) else [value]
    text = "\n".join(inspect.getdoc(kind) or "" for kind in kinds)
    return [name for name in arguments(value)
            if not re.search(rf"^ *\**{name}( : .*)?\n +\S", text, re.MULTILINE) and not re.search(rf"`{name}\b[^`\n]*`", text)]


def unexplained(module: str) -> dict[str, list[str]]:
    "Name -> arguments without a word."
    return {name: missing for name, value in members(importlib.import_module(module)) if (missing := without_a_word(value))}


@pytest.mark.parametrize("module", MODULES)
def test_help_explains_every_argument(module: str) -> None:
    missing = unexplained(module)
    assert not missing, f"give these a trailing note in their notebook, then run nbdev-export: {missing}"
