"""Markdown tables: every cell is text, whatever it looks like."""

import re

import pytest
from nbconvert.filters.markdown import markdown2html

from freqseg.tables import markdown_table, plain


@pytest.mark.parametrize("hostile", ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "a | b", "a\n\nb", "[a](javascript:alert(1))", "a & b"])
def test_a_cell_shows_what_it_was_given_and_nothing_else(hostile: str) -> None:
    page = str(markdown2html(markdown_table(["name", "IoU"], [(hostile, 1.5), ("last", 2)])))
    assert set(re.findall(r"<(\w+)", page)) == {"table", "thead", "tbody", "tr", "th", "td"}
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page)
    assert len(cells) == 4 and cells[1:] == ["1.5", "last", "2"]
    assert cells[0] == plain(hostile).replace(r"\|", "|").replace(r"\(", "(")


def test_words_stand_left_and_figures_right() -> None:
    assert markdown_table(["a", "b", "c"], [], words=2).splitlines() == ["| a | b | c |", "| --- | --- | ---: |"]
