"""mkdocs hook: the navigation, from the guide's pages and the notebooks themselves, and equations that need no script.

A notebook's folder, or at the top its number, says its floor, and its first heading is its title, so a new room is in the navigation by being there.
A page of the guide is there in the same way; GUIDE says where.
"""

import html
import json
import re
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.plugins import event_priority
from mkdocs.structure.toc import TableOfContents, get_toc

FLOORS = {
    "0": "0 · Mathematics",
    "1": "1 · Inputs",
    "2": "2 · Method parts",
    "3": "2 · Method parts",
}
FOLDERS = {"explore": "Explore", "train": "Train"}
ROOMS = {"systems": "3 · Systems", "world": "4 · Embedded models", "work": "5 · Work", "faces": "6 · Faces"}
GUIDE = ("first_hour", "own_data", "own_classes", "own_system", "own_map", "cluster", "crf", "systems", "glossary")

# Equations as nbconvert leaves them: between dollars, or between backslash brackets. Code is matched first, to be kept.
CODE_OR_MATH = re.compile(
    r"(?P<keep><(pre|code|script|style|svg)\b.*?</\2>)"
    r"|\$\$(?P<display>[^$]+)\$\$|\\\[(?P<bracketed>.+?)\\\]"
    r"|(?<![\\\w$])\$(?P<inline>[^$\n<]*[^$\s<])\$(?![\w$])|\\\((?P<round>.+?)\\\)",
    re.DOTALL)
HEADING = re.compile(r'<h([1-6]) id="([^"]+)">(.*?)<a class="anchor-link"', re.DOTALL)
SCRIPT = re.compile(r"<script\b.*?</script>", re.DOTALL)
FROM_A_CDN = re.compile(r"https://(?:cdn|unpkg)|mathjax|mermaid|<script src=\"\">", re.IGNORECASE)


def title(path: Path) -> str:
    "The first heading of a notebook, or its name."
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        heading = re.match(r"#\s+(.+)", "".join(cell["source"]))
        if cell["cell_type"] == "markdown" and heading:
            return heading.group(1).strip()
    return path.stem


def section(path: Path) -> str | None:
    "The heading of the navigation under which a notebook belongs, from its folder or, at the top, its number."
    return (FOLDERS | ROOMS).get(path.parent.name) or FLOORS.get(path.name[0])


def guide(docs: Path) -> list[str]:
    "The pages of the guide in the order of GUIDE, others after them; mkdocs reads their titles from their headings."
    def place(path: Path) -> tuple[int, str]: return GUIDE.index(path.stem) if path.stem in GUIDE else len(GUIDE), path.stem
    return [path.relative_to(docs).as_posix() for path in sorted((docs / "guide").glob("*.md"), key=place)]


def navigation(docs: Path) -> list[dict[str, Any]]:
    "mkdocs' `nav`: home, the guide, the notebooks to explore, those that train, then the rooms floor by floor."
    sections: dict[str, list[dict[str, str]]] = {name: [] for name in [*FOLDERS.values(), *FLOORS.values(), *ROOMS.values()]}
    for path in sorted(docs.rglob("*.ipynb")):
        name = section(path)
        if name and ".ipynb_checkpoints" not in path.parts:
            sections[name].append({title(path): path.relative_to(docs).as_posix()})
    return [{"Home": "index.md"}, {"Guide": guide(docs)}, *({name: pages} for name, pages in sections.items() if pages)]


def mathml(match: re.Match[str]) -> str:
    "A TeX equation as MathML, which browsers draw by themselves; code passes through, and so does what is no TeX."
    if match["keep"]:
        return match["keep"]
    block = match["display"] or match["bracketed"]
    tex, display = html.unescape(block or match["inline"] or match["round"]), "block" if block else "inline"
    try:
        return latex2mathml.converter.convert(tex.strip(), display=display)
    except Exception:  # an equation drawn as its source is better than no page
        return match[0]


def contents(body: str) -> TableOfContents:
    "A notebook's table of contents, from its headings as nbconvert wrote them: mkdocs-jupyter's own leaves out what is set as code."
    found: list[dict[str, Any]] = []
    open_above: list[dict[str, Any]] = []
    for level, place, name in HEADING.findall(body):
        heading = {"level": int(level), "id": html.unescape(place), "name": re.sub(r"<[^>]+>", "", name).strip(), "children": []}
        while open_above and open_above[-1]["level"] >= heading["level"]:
            open_above.pop()
        (open_above[-1]["children"] if open_above else found).append(heading)
        open_above.append(heading)
    return get_toc(found)


def on_config(config: Any) -> Any:
    "Called by mkdocs once the configuration is read."
    config["nav"] = navigation(Path(config["docs_dir"]))
    return config


def on_page_content(body: str, page: Any, config: Any, files: Any) -> None:
    "Called by mkdocs with a page's own part, before it is put into the theme."
    if page.file.src_uri.endswith(".ipynb"):
        page.toc = contents(body)


@event_priority(-100)  # after mkdocs-jupyter, which adds scripts of its own
def on_post_page(output: str, page: Any, config: Any) -> str:
    "Called by mkdocs with a whole page: equations drawn, links between notebooks mended, scripts from a CDN left out."
    output = SCRIPT.sub(lambda block: "" if FROM_A_CDN.search(block[0]) else block[0], output)
    output = re.sub(r'href="(?!\w+:)([^"#]+)\.ipynb(#[^"]*)?"', r'href="\1.html\2"', output)
    return CODE_OR_MATH.sub(mathml, output)
