"""From a key press on the cut-off to the new picture on the screen, in JupyterLab in Chromium: median and 95th percentile.

There is no peer: this is what a person waits for, not a race. `python benchmarks/bench_explorer_browser.py [moves]`, needs Chromium.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from browser import NotebookPage, chromium, opened_notebook  # noqa: E402

# Counted in the page itself: from the key to the first picture whose source changed, a frame later.
WATCH = """() => {
    const image = document.querySelectorAll('.fs-grid')[0].querySelectorAll('img')[1], handle = document.querySelector('.noUi-handle');
    window.waits = []; let pressed = 0;
    handle.addEventListener('keydown', () => { pressed = performance.now(); }, true);
    new MutationObserver(() => { if (pressed) { const at = pressed; pressed = 0; requestAnimationFrame(() => window.waits.push(performance.now() - at)); } })
        .observe(image, { attributes: true, attributeFilter: ['src'] });
}"""


def waits(page: NotebookPage, moves: int) -> np.ndarray:
    "Milliseconds from key to picture, move by move."
    page.page.evaluate(WATCH)
    for move in range(moves):
        page.page.locator(".noUi-handle").first.focus()
        page.page.keyboard.press("PageDown" if move % 2 else "PageUp")   # five steps up and down again: enough for another band
        page.page.wait_for_function("count => window.waits.length >= count", arg=move + 1)
        time.sleep(.05)
    return np.array(page.page.evaluate("() => window.waits"))


def main(moves: int = 60) -> None:
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as home, sync_playwright() as driver:
        with opened_notebook(driver, ROOT / "nbs" / "explore" / "frequency_cam.ipynb", Path(home)) as page:
            page.run_all()
            waits(page, 6)   # the first moves warm up
            found = waits(page, moves)
    print(f"{moves} moves of the cut-off, the embedded world's CLIP, two classes, in Chromium: median {np.median(found):.0f} ms, "
          f"95th percentile {np.quantile(found, .95):.0f} ms, slowest {found.max():.0f} ms")


if __name__ == "__main__":
    if chromium() is None:
        sys.exit("no Chromium: install it (Debian, Ubuntu: apt-get install chromium), or name yours in FREQSEG_CHROMIUM")
    main(*map(int, sys.argv[1:2]))
