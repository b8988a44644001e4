"""The explorer in JupyterLab in a browser: what a person does, and what a person sees."""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import NotebookPage, chromium, opened_notebook
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    chromium() is None, reason="no Chromium: install it (Debian, Ubuntu: apt-get install chromium), or name yours in FREQSEG_CHROMIUM")]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    "What drives the browser; there can be one at a time."
    from playwright.sync_api import sync_playwright

    with sync_playwright() as found:
        yield found


@pytest.fixture(scope="module")
def running(driver: Any, home: Path) -> Iterator[NotebookPage]:
    "The explorer's notebook, all cells run."
    with opened_notebook(driver, ROOT / "nbs" / "explore" / "frequency_cam.ipynb", home) as page:
        page.run_all()
        yield page


@pytest.fixture
def lab(running: NotebookPage) -> NotebookPage:
    "The same with the first picture, class list and options again."
    page = running
    page.control("picture", "select").select_option("scene of the world")
    if page.control("scene").input_value() != "48":
        page.type_into("scene", "48")
    page.choose_model("world")
    page.type_into("classes", "star, wheel")
    page.button("Reset").click()
    page.message("star 9")
    page.settle()
    return page


def picture_file(path: Path, width: int, height: int, seed: int = 0) -> Path:
    "A picture of soft noise."
    small = np.random.default_rng(seed).integers(0, 255, (12, 16, 3), np.uint8)
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(path)
    return path


def upload(lab: NotebookPage, path: Path) -> None:
    lab.control("picture", "select").select_option("a file of mine")
    with lab.page.expect_file_chooser() as chooser:
        lab.button("choose a picture").click()
    chooser.value.set_files(path)


def test_running_all_cells_shows_maps_with_names_and_a_colour_bar(lab: NotebookPage) -> None:
    lab.screenshot("explorer")
    assert lab.page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
    assert lab.page.locator(".fs-grid").first.locator("img").count() == 8   # GradCAM, low, high, refined for two classes
    assert lab.page.locator(".fs-head").all_inner_texts()[:4] == ["GradCAM", "low", "high", "over the smoothed affinity"]
    assert [name for name in lab.page.locator(".fs-name").all_inner_texts() if name] == ["star", "wheel"]
    assert all(alt for alt in lab.page.locator(".fs-grid img").evaluate_all("images => images.map(one => one.alt)"))
    assert lab.page.locator(".fs-strip").is_visible() and "linear-gradient" in lab.page.locator(".fs-strip").first.get_attribute("style")
    assert re.search(r"mIoU\s\d\d\.\d", " ".join(lab.page.locator(".fs-head").all_inner_texts()))


def test_nothing_is_cut_off_in_a_window_of_1280_by_800(lab: NotebookPage) -> None:
    wide = lab.page.locator(".jp-OutputArea-output:has(.fs-grid)").first.evaluate("one => [one.scrollWidth, one.clientWidth]")
    assert wide[0] <= wide[1] + 1
    overflowing = lab.page.locator(".jp-OutputArea .widget-inline-hbox > label").evaluate_all("all => all.filter(one => one.scrollWidth > one.clientWidth + 1).map(one => one.innerText)")
    assert not overflowing


def test_moving_the_cut_off_changes_the_bands_but_not_the_map(lab: NotebookPage) -> None:
    whole, low = lab.picture(0), lab.picture(1)
    lab.slider("cut-off μ").focus()
    for _ in range(8):
        lab.page.keyboard.press("ArrowRight")
    lab.wait_for_other(low, 1)
    lab.page.wait_for_function("() => [...document.querySelectorAll('svg text')].some(one => one.textContent === 'cut-off 0.3')")
    lab.screenshot("cut-off moved")
    assert lab.picture(0) == whole


def test_a_class_is_typed_and_an_unknown_one_is_answered_in_words(lab: NotebookPage) -> None:
    lab.type_into("classes", "moon")
    lab.page.locator(".fs-name", has_text="moon").wait_for()
    shown = lab.picture(0)
    lab.type_into("classes", "zebra")
    said = lab.message("unknown class 'zebra'")
    lab.screenshot("unknown class")
    assert "a CLIP of the embedded world" in said and lab.picture(0) == shown
    lab.type_into("classes", "")
    assert "type the classes" in lab.message("type the classes")


def test_a_clicked_patch_shows_what_it_is_related_to_and_arrow_keys_go_on(lab: NotebookPage) -> None:
    image = lab.page.locator(".fs-grid").first.locator("img").first
    box = image.bounding_box()
    image.click(position={"x": box["width"] * .4, "y": box["height"] * .6})
    lab.page.locator(".fs-head", has_text="smoothed affinity of the patch in row 16, column 11").wait_for()
    lab.page.wait_for_function("() => document.querySelectorAll('.fs-grid')[2].querySelectorAll('img[src^=blob]').length === 2")
    before = lab.picture(0, 2)
    lab.screenshot("patch")
    lab.page.keyboard.press("ArrowRight")
    lab.page.locator(".fs-head", has_text="smoothed affinity of the patch in row 16, column 12").wait_for()
    lab.wait_for_other(before, 0, 2)
    assert lab.page.locator(".fs-mark:visible").count() == 8


def test_an_uploaded_picture_is_looked_at(lab: NotebookPage, tmp_path: Path) -> None:
    before = lab.picture(0)
    upload(lab, picture_file(tmp_path / "mine.png", 320, 240))
    lab.message("mine.png, world, 21 x 28 patches")
    lab.wait_for_other(before, 0)
    lab.screenshot("uploaded")


def test_a_broken_file_is_answered_in_words_and_nothing_is_lost(lab: NotebookPage, tmp_path: Path) -> None:
    lab.control("picture", "select").select_option("a file of mine")   # shows the last one that was put in, if any
    lab.settle()
    before = lab.picture(0)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 this is no picture")
    upload(lab, tmp_path / "broken.jpg")
    assert "broken.jpg cannot be opened" in lab.message("broken.jpg")
    lab.screenshot("broken file")
    assert lab.picture(0) == before and lab.page.locator(".fs-error").count() == 1


def test_twenty_megapixels_are_made_smaller_with_a_notice(lab: NotebookPage, tmp_path: Path) -> None:
    upload(lab, picture_file(tmp_path / "large.jpg", 5200, 3900))
    assert "5200 x 3900 pixels: shown at 1024 x 768" in lab.message("large.jpg has")


def test_a_view_is_saved_and_the_files_are_there(lab: NotebookPage, home: Path) -> None:
    lab.button("Save").click()
    said = lab.message("Saved in views")
    lab.screenshot("saved")
    names = sorted(path.name for path in (home / "work" / "views").iterdir())
    assert {Path(name).suffix for name in names} >= {".png", ".npz", ".py"} and all(name in said for name in names if name.startswith("view-001"))
    assert Image.open(home / "work" / "views" / "view-001.png").size[0] > 500


def test_a_long_computation_shows_that_it_is_busy_and_the_page_stays_alive(lab: NotebookPage) -> None:
    lab.choose_model("ViT-B-16 (random weights)")
    lab.page.wait_for_selector(".fs-busy")
    began = time.monotonic()
    lab.slider("cut-off μ").focus()
    lab.page.keyboard.press("ArrowRight")   # the page takes it at once, the kernel when it can
    assert time.monotonic() - began < 5 and lab.page.locator(".fs-busy").count() == 1
    lab.screenshot("busy")
    lab.message("ViT-B-16 (random weights), 28 x 28 patches")
    lab.page.wait_for_selector(".fs-grid:not(.fs-busy)")
    lab.choose_model("ViT-B-61")
    assert "ViT-B-61" in lab.message("no backbone called")


def test_reset_and_help(lab: NotebookPage) -> None:
    before = lab.picture(1)
    lab.slider("cut-off μ").focus()
    for _ in range(6):
        lab.page.keyboard.press("ArrowRight")
    lab.wait_for_other(before, 1)
    lab.page.wait_for_function("() => [...document.querySelectorAll('svg text')].some(one => one.textContent === 'cut-off 0.26')")
    lab.button("Reset").click()
    lab.page.wait_for_function("() => [...document.querySelectorAll('svg text')].some(one => one.textContent === 'cut-off 0.14')")
    lab.page.wait_for_timeout(300)
    assert lab.picture(1) == before
    lab.button("Help").click()
    lab.page.get_by_text("cut-off between low and high, in cycles per token").first.wait_for()
    lab.button("Help").click()


def test_everything_is_reached_with_the_keyboard_alone(lab: NotebookPage) -> None:
    lab.control("classes").focus()
    reached = []
    for _ in range(14):
        lab.page.keyboard.press("Tab")
        reached.append(lab.page.evaluate("() => document.activeElement.className + ' ' + document.activeElement.innerText.trim()"))
    told = "\n".join(reached)
    assert all(one in told for one in ("noUi-handle", "more options", "Save", "Reset", "Help", "fs-table")), told


def test_options_that_are_folded_away_are_reached_with_the_keyboard(lab: NotebookPage) -> None:
    assert not lab.control("temperature", ".noUi-handle").is_visible()
    lab.button("more options").focus()
    lab.page.keyboard.press("Space")
    lab.control("temperature", ".noUi-handle").wait_for()
    lab.screenshot("more options")
    cut = lab.page.locator(".jp-OutputArea .widget-inline-hbox > label").evaluate_all("all => all.filter(one => one.scrollWidth > one.clientWidth + 1).map(one => one.innerText)")
    assert not cut
    lab.button("more options").focus()
    lab.page.keyboard.press("Space")


def test_keys_pressed_in_a_control_leave_the_notebook_alone(lab: NotebookPage) -> None:
    state = "() => { const all = [...document.querySelectorAll('.jp-Notebook .jp-Cell')]; return [all.length, all.findIndex(one => one.classList.contains('jp-mod-active'))]; }"
    lab.page.locator(".jp-Notebook .jp-CodeCell").nth(1).locator(".jp-InputPrompt").click()   # command mode
    before = lab.page.evaluate(state)
    for control in (lab.control("affinity", "select"), lab.slider("cut-off μ"), lab.button("Help")):
        control.focus()
        for key in ("a", "b", "ArrowDown", "ArrowUp", "z"):
            lab.page.keyboard.press(key)
    assert lab.page.evaluate(state) == before
    lab.slider("cut-off μ").focus()
    lab.page.keyboard.press("Escape")   # leads out of the explorer, to its cell
    assert lab.page.evaluate("() => document.activeElement.classList.contains('jp-Cell')")
    lab.page.keyboard.press("ArrowDown")
    assert lab.page.evaluate(state)[1] == before[1] + 1


def test_the_dark_theme_is_readable(lab: NotebookPage) -> None:
    lab.command("apputils:change-theme", theme="JupyterLab Dark")
    lab.page.wait_for_function("() => document.body.dataset.jpThemeLight === 'false'")
    lab.page.wait_for_timeout(500)
    lab.screenshot("dark")
    lightness = lab.page.evaluate("""() => {
        const light = colour => { const [r, g, b] = colour.match(/[\\d.]+/g).map(Number); return (.299*r + .587*g + .114*b)/255; };
        const ground = light(getComputedStyle(document.querySelector('.jp-Notebook')).backgroundColor);
        return ['.fs-head', '.fs-name', '.fs-message'].map(name => Math.abs(light(getComputedStyle(document.querySelector(name)).color) - ground));
    }""")
    lab.command("apputils:change-theme", theme="JupyterLab Light")
    lab.page.wait_for_function("() => document.body.dataset.jpThemeLight === 'true'")
    assert min(lightness) > .5


def test_running_the_cell_again_leaves_one_explorer(lab: NotebookPage) -> None:
    count = "() => Promise.all([...document.querySelectorAll('.fs-grid')].map(one => one.isConnected)).then(all => all.length)"
    before = lab.page.evaluate(count)
    lab.run_all()
    lab.message("star 9")
    lab.page.wait_for_function(f"() => document.querySelectorAll('.fs-grid').length === {before}")
    low = lab.picture(1)
    lab.slider("cut-off μ").focus()
    for _ in range(6):
        lab.page.keyboard.press("ArrowRight")
    lab.wait_for_other(low, 1)


def test_a_restarted_kernel_is_answered_by_running_the_cells_again(lab: NotebookPage) -> None:
    lab.page.evaluate("async () => { await window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart(); }")
    lab.wait_for_kernel()
    lab.run_all()
    lab.message("star 9")
    low = lab.picture(1)
    lab.slider("cut-off μ").focus()
    for _ in range(6):
        lab.page.keyboard.press("ArrowRight")
    lab.wait_for_other(low, 1)


def test_no_request_left_this_machine(lab: NotebookPage) -> None:
    assert not lab.strangers


def test_the_app_shows_the_explorer_without_code_and_asks_for_the_token(driver: Any, tmp_path: Path) -> None:
    with opened_notebook(driver, ROOT / "nbs" / "explore" / "frequency_cam.ipynb", tmp_path, app=True) as page:
        low = page.picture(1)
        page.screenshot("app")
        assert "import" not in page.page.locator("body").inner_text()
        page.page.locator(".noUi-handle").first.focus()
        for _ in range(6):
            page.page.keyboard.press("ArrowRight")
        page.wait_for_other(low, 1)
        assert not page.strangers
        stranger = page.page.context.browser.new_page()
        stranger.goto(page.page.url.split("?")[0])
        assert "/login" in stranger.url


@pytest.mark.parametrize("name", ["compare_systems", "spectral_prompts"])
def test_the_other_notebooks_with_widgets_run_in_a_browser(driver: Any, name: str, tmp_path: Path) -> None:
    with opened_notebook(driver, ROOT / "nbs" / "explore" / f"{name}.ipynb", tmp_path) as page:
        page.run_all()
        page.screenshot(name)
        assert page.page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
        assert page.page.locator(".fs-grid").first.locator("img").count() >= 2 and not page.strangers
