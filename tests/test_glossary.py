"""One name, one meaning: what public functions, classes and options call their parameters, held against the guide's glossary."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "nbs" / "guide" / "glossary.md"
NUMBERS, TEXTS = {"int", "float"}, {"str", "Path", "LiteralString"}
ARRAYS = {"Tensor", "np.ndarray", "Array", "Image.Image", "Picturelike"}
ALIASES = {"Transfer": "Callable", "Distance": "Callable", "dict": "Mapping"}
COLLECTIONS = {"Sequence", "tuple", "list", "Iterable", "Collection", "Iterator", "set", "frozenset"}


class Use(NamedTuple):
    "One parameter of a public function, method or dataclass."
    name: str
    where: str                  # module and function or class
    annotation: ast.expr | None
    default: ast.expr | None
    note: str                   # the comment behind it


def holds_options(node: ast.ClassDef) -> bool:
    "Are the fields of this class options, given by whoever constructs it, and not the parts of a result?"
    names = [node.name, *map(ast.unparse, node.bases)]
    return any(name.endswith(("Options", "Settings", "Preset")) for name in names) or "option(" in ast.unparse(node)


def uses_in(source: str, module: str) -> Iterator[Use]:
    "The parameters of a module's public functions, methods and records."
    lines = source.splitlines()
    def note(node: ast.AST) -> str:
        found = re.search(r"\s#\s(.+)$", lines[node.end_lineno - 1]) if node.end_lineno else None
        return found[1] if found else ""
    def of_function(node: ast.FunctionDef, where: str) -> Iterator[Use]:
        args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        positional = len(args) - len(node.args.kwonlyargs)
        defaults = [None] * (positional - len(node.args.defaults)) + [*node.args.defaults, *node.args.kw_defaults]
        for arg, default in zip(args, defaults, strict=True):
            if arg.arg not in ("self", "cls"): yield Use(arg.arg, where, arg.annotation, default, note(arg))
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"): yield from of_function(node, f"{module}.{node.name}")
        if not isinstance(node, ast.ClassDef) or node.name.startswith("_"): continue
        for part in node.body:
            if isinstance(part, ast.FunctionDef) and (part.name in ("__init__", "__call__") or not part.name.startswith("_")):
                yield from of_function(part, f"{module}.{node.name}.{part.name}")
            if holds_options(node) and isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name) \
                    and "ClassVar" not in ast.unparse(part.annotation):
                value = part.value
                if isinstance(value, ast.Call) and ast.unparse(value.func) in ("option", "field"):   # their first argument is the default
                    value = value.args[0] if value.args else None
                yield Use(part.target.id, f"{module}.{node.name}", part.annotation, value, note(part))


def modules() -> dict[str, str]:
    "Name of every module of the package -> its source."
    paths = [path for path in sorted((ROOT / "freqseg").rglob("*.py")) if not path.name.startswith("_")]
    return {".".join(path.relative_to(ROOT / "freqseg").with_suffix("").parts): path.read_text(encoding="utf-8") for path in paths}


@cache
def uses() -> dict[str, list[Use]]:
    "Every public parameter name -> where it stands."
    found = defaultdict(list)
    for module, source in modules().items():
        for use in uses_in(source, module): found[use.name].append(use)
    return found


@cache
def constants() -> dict[str, str]:
    "Constants of the package that hold a number or a text, by name: defaults may name them."
    values = {}
    for source in modules().values():
        for node in ast.parse(source).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                values |= {target.id: ast.unparse(node.value) for target in node.targets if isinstance(target, ast.Name)}
    return values


def default_of(use: Use) -> str | None:
    "A default as text, equal for equal values; None where there is none, or None itself, which only says that it is left open."
    node = use.default
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "same_option": node = node.args[2] if len(node.args) > 2 else None
    if node is None or ast.unparse(node) in ("...", "MISSING"): return None   # as the option that is named, or a mark for none
    text = ast.unparse(node)
    text = constants().get(text, text)
    try: value = ast.literal_eval(text)
    except ValueError: return text
    if value is None: return None
    return f"{value:g}" if type(value) in (int, float) else repr(value)


def kinds(annotation: ast.expr | None) -> set[str]:
    "What an annotation admits, roughly: numbers, truths, texts, arrays, mappings, functions, or a class by its name."
    if annotation is None: return set()
    if isinstance(annotation, ast.Constant):   # a name in quotes, None or ...
        return kinds(ast.parse(annotation.value, mode="eval").body) if isinstance(annotation.value, str) else set()
    if isinstance(annotation, ast.BinOp): return kinds(annotation.left) | kinds(annotation.right)
    text = ALIASES.get(ast.unparse(annotation), ast.unparse(annotation))
    if text in NUMBERS: return {"number"}
    if text in TEXTS: return {"text"}
    if text in ARRAYS: return {"array"}
    if text == "bool": return {"truth"}
    if text in ("Any", "object", "Iterable", "Item", "Labelled"): return set()   # anything
    if text in ("Callable", "Mapping"): return {"function" if text == "Callable" else "mapping"}
    if isinstance(annotation, ast.Subscript):
        outer = ast.unparse(annotation.value)
        inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        if outer == "Literal": return {"text"}
        if outer == "Callable": return {"function"}
        if outer in ("Mapping", "dict"): return {"mapping"}
        if outer in COLLECTIONS: return {one for part in inner for one in kinds(part)}   # several of them are the same thing
    return {text}


PLAIN = {"number", "truth", "text", "array", "mapping", "function"}


def agree(one: set[str], other: set[str]) -> bool:
    "May the same name admit both? They have a kind in common, or one is an object and the other a text that names it."
    return bool(one & other) or any("text" in a and not b & PLAIN for a, b in ((one, other), (other, one)))


def conflicts() -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    "Names with several defaults, and names whose annotations do not agree: name -> defaults, name -> kinds."
    defaults = {name: {one for use in group if (one := default_of(use)) is not None} for name, group in uses().items()}
    meanings = {}
    for name, group in uses().items():
        admitted = [admits for use in group if (admits := kinds(use.annotation))]
        if not all(map(agree, admitted, admitted[1:])) or not all(agree(a, b) for a in admitted for b in admitted):
            meanings[name] = set.union(*admitted)
    return {name: values for name, values in defaults.items() if len(values) > 1}, meanings


# ---- the page -------------------------------------------------------------------------------------------------------

def listed(heading: str) -> dict[str, set[str]]:
    "Name -> what the table under a heading of the glossary allows it."
    section = PAGE.read_text(encoding="utf-8").split(f"\n### {heading}\n")[1].split("\n#")[0]
    rows = [[cell.strip() for cell in row.split(" | ")] for row in re.findall(r"^\| (`.+) \|$", section, re.MULTILINE)]
    names = [row[0].strip("`") for row in rows]
    assert names == sorted(set(names)), "one row a name, in order"
    assert all(len(row) == 3 and row[2] for row in rows), "a name, what it may be, and why"
    return {row[0].strip("`"): set(re.findall(r"`([^`]+)`", row[1])) for row in rows}


@pytest.mark.parametrize("heading", ["One name, several defaults", "One name, several kinds of value"])
def test_a_name_means_one_thing_or_the_glossary_says_why(heading: str) -> None:
    actual, allowed = conflicts()["kinds" in heading], listed(heading)
    def places(name: str, values: set[str]) -> str:
        of = (lambda use: {default_of(use)}) if "defaults" in heading else (lambda use: kinds(use.annotation))
        return ", ".join(sorted({use.where for use in uses()[name] if of(use) & values}))
    new = [f"`{name}` is {', '.join(sorted(extra))} in {places(name, extra)}: rename it, or list it with a reason"
           for name in sorted(actual) if (extra := actual[name] - allowed.get(name, set()))]
    gone = [f"`{name}` is nowhere {', '.join(sorted(extra))} any more: take it off the list"
            for name in sorted(allowed) if (extra := allowed[name] - actual.get(name, set()))]
    assert not new + gone, f"{PAGE.relative_to(ROOT)}, {heading}:\n" + "\n".join(new + gone)


def test_what_the_page_says_of_mu_is_so() -> None:
    from freqseg.spectra import lowpass_mask
    for side in (14, 28): assert lowpass_mask(side, side, 0.12).equal(lowpass_mask(side, side, 0.14))
    rows = re.findall(r"^\| (0\.\d+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == ["0.4", "0.14", "0.12", "0.25"]
    assert {default_of(use) for use in uses()["mu"]} - {None} <= set(rows)


# ---- the reading of sources -----------------------------------------------------------------------------------------

EXAMPLE = '''
class Settings(NamedTuple):
    mu: float = 0.4   # cut-off
    maps: str = option("gradcam", "which")
    _hidden: int = 3

class Outcome(NamedTuple):
    mu: str

def walk(
    affinity: "Tensor",   # (B, N, N)
    steps: int | None = None, *, box: float = LIMIT, sizes: Sequence[int] = (),
) -> None: ...

def _private(mu: str = ""): ...
'''


def test_parameters_are_read_with_annotation_default_and_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(constants(), "LIMIT", "0.70")
    found = {use.name: use for use in uses_in(EXAMPLE, "room")}
    assert set(found) == {"mu", "maps", "_hidden", "affinity", "steps", "box", "sizes"}
    assert {name: default_of(use) for name, use in found.items()} == {
        "mu": "0.4", "maps": "'gradcam'", "_hidden": "3", "affinity": None, "steps": None, "box": "0.7", "sizes": "()"}
    assert [kinds(found[name].annotation) for name in ("mu", "maps", "affinity", "steps", "sizes")] == [
        {"number"}, {"text"}, {"array"}, {"number"}, {"number"}]
    assert found["mu"].note == "cut-off" and found["affinity"].note == "(B, N, N)" and found["box"].where == "room.walk"


def test_a_second_meaning_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    other = uses_in("def f(mu: str = 'low', crf: CRFSettings = None): ...\ndef g(mu: float = 0.4, crf: str = ''): ...", "room")
    grouped = defaultdict(list)
    for use in other: grouped[use.name].append(use)
    monkeypatch.setattr(__import__(__name__), "uses", lambda: grouped)
    assert conflicts() == ({"mu": {"'low'", "0.4"}}, {"mu": {"text", "number"}})   # a text may name settings, not a number


def test_every_link_of_the_glossary_leads_to_a_notebook() -> None:
    links = set(re.findall(r"\]\((\S+?\.ipynb)\)", PAGE.read_text(encoding="utf-8")))
    assert len(links) > 20 and not [link for link in links if not (PAGE.parent / link).is_file()]
