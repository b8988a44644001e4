"""Reports: the same figures in HTML, Markdown and JSON; a page that needs nothing else; whole files or none."""

import base64
import io
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from toy_inference import NAMES, QUIET, SIZES, Toy, write_folder

import freqseg.faces.report as room
from freqseg.data import SegmentationFolder, open_folder
from freqseg.lists import COCO_CLASSES, VOC_CLASSES, ZeroShotSplit
from freqseg.pictures import read_mask
from freqseg.files import InputError
from freqseg.metrics import Interval
from freqseg.faces.report import (bias_svg, confusion_svg, evaluate_run, gallery_sheet, html, markdown, measured_on,
                                  percent, to_json, trimap_svg, write_report)
from freqseg.world.scenes import WORLD_DOMAIN
from freqseg.work.evaluation import SystemReport, ZeroShotScores, evaluate_system

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("toy") / "data")


@pytest.fixture(scope="module")
def report(folder: Path) -> SystemReport:
    return evaluate_system(Toy().eval(), open_folder(folder, "val", masks=True), bands=0.2, examples=2, command="freqseg evaluate", **QUIET)


class Page(HTMLParser):
    "Tags that are open, all attributes, the text."
    VOID = {"meta", "img", "br"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.attributes, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes) -> None:
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in self.VOID: self.open.append(tag)

    def handle_startendtag(self, tag, attributes) -> None: self.attributes += [(tag, name, value) for name, value in attributes]

    def handle_endtag(self, tag) -> None: assert self.open.pop() == tag

    def handle_data(self, data) -> None: self.words.append(data)


# ---- figures --------------------------------------------------------------------------------------------------------

@given(st.floats(0, 1), st.floats(0, 1))
def test_percentages_round_to_one_digit_and_missing_ones_are_a_dash(value: float, low: float) -> None:
    assert abs(float(percent(value)) - 100 * value) <= 0.0501
    assert percent(Interval(value, low, value)) == f"{percent(value)} [{percent(low)}, {percent(value)}]"
    assert percent(math.nan) == percent(None) == percent(Interval(math.nan, 0, 1)) == "–"


def test_the_three_forms_hold_the_same_figures(report: SystemReport) -> None:
    plain, text, page = json.loads(to_json(report)), markdown(report), "".join(Page(html(report)).words)
    for name, one in report.figures.items():
        assert plain["figures"][name]["miou"] == one.miou._asdict()
        assert f"| {name}: {one.title} | {percent(one.miou)} | {percent(one.boundary)} |" in text
        assert percent(one.miou.value) in page and one.title in page
    for name, value in plain["figures"]["seg"]["iou"].items(): assert f"| {name} |" in text and percent(value) in text
    assert "NaN" not in to_json(report) and "`freqseg evaluate`" in text


def test_the_data_are_named_and_the_world_is_no_photograph(report: SystemReport) -> None:
    world = replace(report, caveat=WORLD_DOMAIN.caveat, dataset="the embedded world, folder w")
    assert "say nothing about photographs" in measured_on(world) and 'class="data world"' in html(world)
    assert measured_on(report) == "measured on folder data, split val, 7 pictures" and 'class="data world"' not in html(report)


def test_pictures_that_were_left_out_are_listed(report: SystemReport) -> None:
    damaged = replace(report, skipped=("a.jpg cannot be decoded",))
    for text in (html(damaged), markdown(damaged)): assert "1 picture was left out" in text and "a.jpg cannot be decoded" in text
    assert "left out" not in markdown(report)


# ---- the page -------------------------------------------------------------------------------------------------------

def test_the_page_is_well_formed_and_fetches_nothing(report: SystemReport) -> None:
    text = html(report)
    page = Page(text)
    assert not page.open
    assert all(value.startswith("data:image/jpeg;base64,") for _, name, value in page.attributes if name in ("src", "href"))
    assert "<script" not in text and "@import" not in text and "url(" not in text and "http" not in text.replace(SVG[1:-1], "")
    assert "prefers-color-scheme:dark" in text and "@media print" in text and 'name="viewport"' in text


def test_every_picture_of_the_gallery_is_inside_the_page(report: SystemReport) -> None:
    pictures = [value for tag, name, value in Page(html(report)).attributes if (tag, name) == ("img", "src")]
    assert len(pictures) == 4 * 4
    for text in pictures:
        with Image.open(io.BytesIO(base64.b64decode(text.split(",")[1]))) as image: assert image.format == "JPEG" and max(image.size) <= 320
    assert gallery_sheet(report).axes


def test_hostile_names_are_text_and_no_markup(report: SystemReport) -> None:
    hostile = "<script>alert(1)</script>&\"'"
    changed = replace(report, names=("background", hostile, *NAMES[1:]), best=(replace(report.best[0], id=hostile),), command=hostile,
                      dataset=hostile, config={"path": hostile}, skipped=(hostile,))
    text = html(changed)
    page = Page(text)
    assert not page.open and "<script" not in text and "".join(page.words).count(hostile) >= 5
    ElementTree.fromstring(confusion_svg(changed.main, changed.names))


@pytest.mark.parametrize("hostile", ["<img src=x onerror=alert(1)>", "<script>alert(1)</script>", "a | b\n\n<b>c</b>", "[a](javascript:alert(1))", "`<i>`"])
def test_hostile_names_are_text_in_markdown_too(hostile: str, report: SystemReport) -> None:
    from nbconvert.filters.markdown import markdown2html
    changed = replace(report, names=("background", hostile, *NAMES[1:]), command=hostile, system=hostile, dataset=hostile, skipped=(hostile,))
    page = str(markdown2html(markdown(changed)))
    assert {tag.lower() for tag in re.findall(r"<(\w+)", page)} <= {"h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "code", "a"}
    assert "href=\"javascript" not in page and page.count("<tr>") == str(markdown2html(markdown(report))).count("<tr>")


def test_the_bias_chart_has_a_line_per_figure_and_marks_the_system(report: SystemReport) -> None:
    with pytest.raises(InputError, match="no unseen classes"): bias_svg(report)
    split = ZeroShotSplit(NAMES, NAMES[:1], NAMES[1:])
    curve = tuple((bias, .5 - bias, .3 + bias, math.nan if bias else .4) for bias in (-.2, 0., .2))
    scores = ZeroShotScores(split, *[Interval(.4, .3, .5)] * 4, .1, curve, torch.full((2, 3), 1 / 3))
    picture = ElementTree.fromstring(bias_svg(replace(report, zero_shot=scores)))
    seen, unseen, harmonic = ([tuple(map(float, point.split(","))) for point in line.get("points").split()] for line in picture.iter(f"{SVG}polyline"))
    assert [y for _, y in seen] == sorted(y for _, y in seen) and [y for _, y in unseen] == sorted((y for _, y in unseen), reverse=True)
    assert len(harmonic) == 1 and harmonic[0][0] == seen[1][0]   # what is not a number is left out
    (mark,) = [line for line in picture.iter(f"{SVG}line") if line.get("stroke-dasharray")]
    assert float(mark.get("x1")) == seen[1][0]   # the system as it is has a bias of 0 beyond its own
    assert "taken off the scores" in html(replace(report, zero_shot=scores))


def test_a_report_without_gallery_or_with_seeds_alone_is_a_page(report: SystemReport) -> None:
    assert "None." in "".join(Page(html(replace(report, best=(), worst=()))).words)
    seeds = replace(report, figures={"seed": report["seed"]})
    assert "Confusions of seed" in html(seeds) and "threshold" in markdown(seeds) and "class mAP" not in markdown(seeds)


@pytest.mark.slow
@pytest.mark.parametrize("width", [500, 800])
def test_a_browser_shows_the_page_without_sideways_scrolling(width: int, report: SystemReport, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None: pytest.skip("no Chromium or Chrome is installed")
    asks = "<script>document.title=[document.documentElement.scrollWidth,innerWidth,[...document.images].every(i=>i.naturalWidth>0)].join()</script></body>"
    (tmp_path / "page.html").write_text(html(report).replace("</body>", asks), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--no-first-run",
             f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--dump-dom"]
    shown = subprocess.run([browser, *flags, (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=120).stdout
    wide, window, loaded = re.search(r"<title>(.*?)</title>", shown).group(1).split(",")
    assert int(wide) <= int(window) and loaded == "true"


# ---- drawings -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("classes", [("background", *VOC_CLASSES), ("background", *COCO_CLASSES)], ids=["21", "81"])
def test_confusions_are_row_shares_with_readable_names(classes: tuple[str, ...], report: SystemReport) -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 1000, (len(classes), len(classes)), generator=generator) * (torch.rand(len(classes), len(classes), generator=generator) < 0.1)
    counts[3] = 0
    counts += 3000 * torch.diag((torch.arange(len(classes)) != 3).long())
    picture = ElementTree.fromstring(confusion_svg(replace(report.main, confusion=counts), classes))
    shares = counts / counts.sum(1, keepdim=True)
    cells = [cell for cell in picture.iter(f"{SVG}rect") if len(cell)]
    assert len(cells) == int((shares >= 0.005).sum())
    told = {cell[0].text for cell in cells}
    assert f"{classes[0]} as {classes[0]}: {100 * shares[0, 0]:.1f} %" in told and not any(text.startswith(f"{classes[3]} as") for text in told)
    texts = [text for text in picture.iter(f"{SVG}text") if text.text in classes]
    assert len(texts) == 2 * len(classes) and all(float(text.get("font-size")) >= 11 for text in texts)
    rows = sorted(float(text.get("y")) for text in texts if text.get("text-anchor") == "end")
    assert min(np.diff(rows)) >= 11   # lines of 11 px do not overlap
    right = max(float(cell.get("x")) + float(cell.get("width")) for cell in cells)
    assert right <= float(picture.get("width")) and all(0.12 <= float(cell.get("fill-opacity")) <= 1 for cell in cells)


def test_the_trimap_drawing_has_a_line_per_figure_that_rises_with_its_values(report: SystemReport) -> None:
    picture = ElementTree.fromstring(trimap_svg(report))
    lines = [line.get("points").split() for line in picture.iter(f"{SVG}polyline")]
    assert len(lines) == len(report.figures)
    for points, one in zip(lines, report.figures.values()):
        heights, values = np.array([float(point.split(",")[1]) for point in points]), [value for value in one.trimap if not math.isnan(value)]
        assert len(heights) == len(values) and np.allclose(np.argsort(-heights, kind="stable")[-1:], np.argsort(values, kind="stable")[-1:])
    box = float(picture.get("height"))
    assert all(0 <= float(line.get(end)) <= box for line in picture.iter(f"{SVG}line") for end in ("y1", "y2"))


# ---- on disk --------------------------------------------------------------------------------------------------------

def test_a_report_that_cannot_be_made_leaves_the_old_one(report: SystemReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_report(report, tmp_path)
    before = [path.read_bytes() for path in paths]
    assert [path.name for path in paths] == ["report.html", "report.md", "report.json"]
    monkeypatch.setattr(room, "html", lambda report: "\ud800")   # cannot be encoded
    with pytest.raises(UnicodeEncodeError): write_report(report, tmp_path)
    assert [path.read_bytes() for path in paths] == before and len(list(tmp_path.iterdir())) == 3


def test_the_command_writes_report_and_masks(folder: Path, tmp_path: Path) -> None:
    report = evaluate_run(Toy().eval(), folder, tmp_path / "out", figures=("seg",), save_masks=tmp_path / "masks", limit=3, **QUIET)
    assert json.loads((tmp_path / "out/report.json").read_text())["images"] == 3 == report.images
    assert {path.stem for path in (tmp_path / "masks").iterdir()} == {"val_0", "val_1", "val_2"}


def test_a_split_without_masks_is_written_and_not_scored(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    write_folder(bare, SIZES[:3])
    shutil.rmtree(bare / "SegmentationClass")
    with pytest.raises(InputError, match="no masks to score against"): evaluate_run(Toy().eval(), bare, tmp_path / "out", **QUIET)
    system = Toy().eval()
    assert evaluate_run(system, bare, tmp_path / "out", save_masks=tmp_path / "masks", scales=(1.0, 1.5), flip=False, **QUIET) is None
    assert len(list((tmp_path / "masks").iterdir())) == 3 and not list((tmp_path / "out").iterdir()) and len(system.asked) == 4   # two groups, two scales
    assert read_mask(tmp_path / "masks/val_0.png", 4).shape == SIZES[0]
    evaluate_run(system, bare, tmp_path / "out", save_masks=tmp_path / "masks", skip_existing=True, **QUIET)
    assert len(system.asked) == 4


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_computed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    system = Toy().eval()
    for options in (dict(out=tmp_path / "file"), dict(out=tmp_path / "out", save_masks=tmp_path / "file/masks")):
        with pytest.raises(InputError, match="cannot write into"): evaluate_run(system, folder, **options, **QUIET)
    assert not system.asked


def test_existing_masks_are_no_reason_to_score_fewer_pictures(folder: Path, tmp_path: Path) -> None:
    split = open_folder(folder, "val")
    assert isinstance(split, SegmentationFolder)
    with pytest.raises(InputError, match="every picture counts"): evaluate_run(Toy().eval(), split, tmp_path, skip_existing=True, **QUIET)
