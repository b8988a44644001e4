"""A step of `nbdev-export` (`export_procs` in pyproject.toml): notes become sections of docstrings.

The notes are the only source. In a notebook they stand where one reads the code; `help()` and Shift-Tab show
docstrings only, so the exported module carries them there, too, in numpy's style. A cell that was exported before
comes out the same."""

import ast
import io
import re
import textwrap
import tokenize
from collections.abc import Iterator
from typing import Any

WIDTH = 120
SECTION = re.compile(r"(?:\A|\s*\n)[ \t]*(?:Parameters|Attributes|Returns)\n[ \t]*-{3,}\n.*\Z", re.DOTALL)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def documented(
    cell: Any,  # of nbdev: `cell_type`, `directives_`, `source`, `set_source`
) -> None:
    "Put the notes of an exported cell into its docstrings."
    if cell.cell_type == "code" and {"export", "exports", "exporti"} & set(cell.directives_):
        cell.set_source(with_sections(cell.source))


def with_sections(
    source: str,  # of a cell or module
) -> str:
    "The same code, notes beside arguments and fields repeated in the docstrings of everything public."
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a magic command, for example
        return source
    notes = comments(source)
    changes = [change for node in public(tree) if (change := docstring_change(node, source, notes))]
    data = source.encode()
    for start, end, text in sorted(changes, reverse=True):
        data = data[:start] + text.encode() + data[end:]
    return data.decode()


def comments(
    source: str,
) -> dict[int, str]:
    "Line number -> what its comment says to a reader; remarks to type checkers are left out."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    texts = {
        token.start[0]: re.sub(r"#+\s*(type:|noqa|mypy:).*", "", token.string)
        for token in tokens
        if token.type == tokenize.COMMENT
    }
    return {line: text.strip("# \t") for line, text in texts.items() if text.strip("# \t")}


def public(
    tree: ast.Module | ast.ClassDef,
) -> Iterator[Function | ast.ClassDef]:
    "Functions and classes without an underscore, and their methods."
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and (not node.name.startswith("_") or node.name == "__call__"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public(node)


def docstring_change(
    node: Function | ast.ClassDef,
    source: str,
    notes: dict[int, str],  # of `comments`
) -> tuple[int, int, str] | None:
    "First byte, end and new text of a docstring; None where there is nothing to say."
    sections = (
        class_sections(node, source, notes)
        if isinstance(node, ast.ClassDef)
        else function_sections(node, source, notes)
    )
    if not sections:
        return None
    first = node.body[0]
    has = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    start, end = (
        offset(source, first.lineno, first.col_offset),
        offset(source, first.end_lineno or 0, first.end_col_offset or 0),
    )
    own_line = first.lineno > node.lineno and not source.splitlines()[first.lineno - 1][: first.col_offset].strip()
    indent = " " * (first.col_offset if own_line else node.col_offset + 4)
    old = source.encode()[start:end].decode() if has else '""'
    parts = re.fullmatch(r"([rRuU]?)(\"\"\"|'''|\"|')(.*)\2", old, re.DOTALL)
    prefix, quotes, inner = parts.groups()  # type: ignore[union-attr]
    text = "\n\n".join(textwrap.indent(section, indent) for section in sections)
    if not prefix:
        text = text.replace("\\", "\\\\").replace('"""', r"\"\"\"")
    head = SECTION.sub("", inner).rstrip()
    made = f'{prefix}"""{head}\n\n{text}\n{indent}"""' if head else f'{prefix}"""{text.lstrip()}\n{indent}"""'
    return (start, end, made) if has else (start, start, made + (f"\n{indent}" if own_line else "; "))


def offset(source: str, line: int, column: int) -> int:
    "Where a place of the syntax tree, which counts bytes in a line, lies in the encoded source."
    return sum(len(text.encode()) for text in source.splitlines(keepends=True)[: line - 1]) + column


def function_sections(node: Function, source: str, notes: dict[int, str]) -> list[str]:
    "`Parameters` and `Returns` of a function, as far as they have notes."
    spec, returned, sections = node.args, "", []
    notes = {line: text for line, text in notes.items() if line < node.body[0].lineno}  # what follows is about code
    if node.returns is not None:
        returned = notes.get(node.returns.end_lineno or 0, "")
        notes = {line: text for line, text in notes.items() if line != node.returns.end_lineno}
    named = [*spec.posonlyargs, *spec.args]
    defaults: dict[int, ast.expr | ast.arg] = dict(zip(map(id, named[::-1]), spec.defaults[::-1], strict=False))
    defaults |= {
        id(one): value for one, value in zip(spec.kwonlyargs, spec.kw_defaults, strict=True) if value is not None
    }
    starred = [("*", spec.vararg), *(("", one) for one in spec.kwonlyargs), ("**", spec.kwarg)]
    entries = []
    for star, one in [*(("", one) for one in named), *starred]:
        if one is None:
            continue
        last = defaults.get(id(one), one)
        if one.arg not in ("self", "cls") and (text := notes.get(last.end_lineno or 0)):
            entries.append(entry(star + one.arg, one.annotation, text, source))
    if entries:
        sections.append("Parameters\n----------\n" + "\n".join(entries))
    if returned:
        sections.append("Returns\n-------\n" + entry("", node.returns, returned, source))
    return sections


def class_sections(node: ast.ClassDef, source: str, notes: dict[int, str]) -> list[str]:
    "`Parameters` of a class from its constructor, `Attributes` from its annotated fields, as far as they have notes."
    for one in node.body:
        if isinstance(one, Function) and one.name == "__init__":
            return function_sections(one, source, notes)[:1]
    entries = []
    for one in node.body:
        if (
            isinstance(one, ast.AnnAssign)
            and isinstance(one.target, ast.Name)
            and "ClassVar" not in ast.unparse(one.annotation)
        ):
            text = "; ".join(filter(None, (explained(one.value), notes.get(one.end_lineno or 0))))
            if text and not one.target.id.startswith("_"):
                entries.append(entry(one.target.id, one.annotation, text, source))
    return ["Attributes\n----------\n" + "\n".join(entries)] if entries else []


def explained(value: ast.expr | None) -> str:
    'What `option(default, "...")` says about a field.'
    if not isinstance(value, ast.Call) or getattr(value.func, "id", None) != "option":
        return ""
    texts = [*value.args[1:2], *(one.value for one in value.keywords if one.arg == "help")]
    return str(texts[0].value) if texts and isinstance(texts[0], ast.Constant) else ""


def entry(name: str, annotation: ast.expr | None, text: str, source: str) -> str:
    "One argument in numpy's style."
    kind = (
        "" if annotation is None else " ".join((ast.get_source_segment(source, annotation) or "").split()).strip("\"'")
    )
    lines = textwrap.wrap(text, WIDTH - 12, initial_indent="    ", subsequent_indent="    ", break_long_words=False)
    return "\n".join([" : ".join(filter(None, (name, kind))), *lines])
