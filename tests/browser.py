"""JupyterLab in a real browser: a server on the loopback with folders of its own, and a page on one notebook.

`opened_notebook` gives a `NotebookPage`, with the driver of `playwright.sync_api.sync_playwright()`. Chromium is the one on the PATH, or FREQSEG_CHROMIUM.
"""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from freqseg.faces.cli import server_command

ROOT = Path(__file__).resolve().parent.parent
PICTURES = Path(os.environ.get("FREQSEG_SCREENSHOTS", ROOT / "htmlcov" / "screenshots"))
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SWITCHES = ("--no-sandbox --disable-gpu --disable-dev-shm-usage --disable-background-networking --disable-quic --no-first-run "
            "--disable-component-update --disable-sync").split()
SIZE = {"width": 1280, "height": 800}
WAIT = 60_000  # milliseconds, on a loaded machine


def chromium() -> str | None:
    "A Chromium that runs, or None."
    for name in (os.environ.get("FREQSEG_CHROMIUM"), *NAMES):
        found = shutil.which(name) if name else None
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            if found and subprocess.run([found, "--version"], capture_output=True, timeout=30).returncode == 0:
                return found
    return None


def free_port() -> int:
    "A port that nobody listens at."
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_port(port: int, server: subprocess.Popen, seconds: float = 60) -> None:
    "Return once somebody listens; raise when the server ends first."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with {server.returncode} before it listened")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(.2)
    raise RuntimeError(f"nobody listens at port {port} after {seconds:g} s")


@contextlib.contextmanager
def served(notebook: Path, home: Path, app: bool = False) -> Iterator[str]:
    "What `freqseg lab` or `freqseg app` serves, with settings of its own instead of the user's; the address, with its token."
    (home / "config" / "labconfig").mkdir(parents=True)
    (home / "config" / "labconfig" / "page_config.json").write_text(
        json.dumps({"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}))
    places = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime",
              "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "IPYTHONDIR": "ipython"}
    environment = {**os.environ, **{name: str(home / place) for name, place in places.items()}}
    port, token = free_port(), secrets.token_hex(16)
    command = [*server_command(notebook, app, port, browser=False), f"--IdentityProvider.token={token}", *([] if app else ["--LabApp.expose_app_in_browser=True"])]
    with (home / "server.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=notebook.parent)
        try:
            wait_for_port(port, server)
            yield f"http://127.0.0.1:{port}/{'voila/render' if app else 'doc/tree'}/{notebook.name}?token={token}"
        finally:
            server.terminate()
            server.wait(30)


class NotebookPage:
    "A notebook in a browser, and what a person does with it."

    def __init__(self, page: Any):
        self.page, self.strangers = page, []
        page.set_default_timeout(WAIT)
        page.on("request", lambda request: self._note(request.url))
        page.on("requestfailed", lambda request: self._forget(request))

    def _note(self, address: str) -> None:
        "Remember requests that leave this machine."
        if not address.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:", "about:", "chrome")):
            self.strangers.append(address)

    def _forget(self, request: Any) -> None:
        "A request that the page's own policy forbade never left."
        if request.failure == "csp" and request.url in self.strangers:
            self.strangers.remove(request.url)

    def open(self, address: str) -> None:
        "Go to a notebook and wait until its kernel answers."
        self.page.goto(address)
        self.page.wait_for_selector(".jp-Notebook")
        self.page.wait_for_function("() => window.jupyterapp && window.jupyterapp.shell.currentWidget && window.jupyterapp.shell.currentWidget.sessionContext")
        self.wait_for_kernel()

    def wait_for_kernel(self) -> None:
        "Wait until the kernel answers."
        self.page.evaluate("""async () => {
            const context = window.jupyterapp.shell.currentWidget.sessionContext;
            await context.ready; await context.session.kernel.info; await context.session.kernel.requestKernelInfo();
        }""")

    def run_all(self) -> None:
        "Run every cell and wait until the first pictures are there."
        self.page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }")
        self.page.wait_for_selector(".fs-grid img[src^=blob]")
        self.page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]")

    def command(self, name: str, **arguments: Any) -> None:
        "A command of JupyterLab."
        self.page.evaluate("([name, given]) => window.jupyterapp.commands.execute(name, given)", [name, arguments])

    def picture(self, place: int = 1, grid: int = 0) -> str:
        "What a picture of a grid shows: its bytes, as text. Waits until it is there."
        return self.page.evaluate("""async ([grid, place]) => {
            const image = document.querySelectorAll('.fs-grid')[grid].querySelectorAll('img')[place];
            if (!image || !image.src.startsWith('blob:')) return '';
            const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
            return Array.from(bytes, one => one.toString(16)).join('');
        }""", [grid, place])

    def settle(self) -> None:
        "Wait until everything asked for so far is drawn: the kernel has answered, and all pictures stay as they are."
        last = None
        for _ in range(WAIT // 300):
            self.wait_for_kernel()
            shown = self.page.evaluate("() => [document.querySelectorAll('.fs-busy').length, ...[...document.querySelectorAll('.fs-grid img')].map(one => one.src)]")
            if shown == last and not shown[0]:
                return
            last = shown
            self.page.wait_for_timeout(300)
        raise AssertionError("the pictures did not come to rest")

    def wait_for_other(self, before: str, place: int = 1, grid: int = 0) -> str:
        "Wait until a picture is another one than before."
        end = time.monotonic() + WAIT / 1000
        while time.monotonic() < end:
            with contextlib.suppress(Exception):   # a picture may be taken away while it is read
                now = self.picture(place, grid)
                if now not in ("", before):
                    return now
            self.page.wait_for_timeout(50)
        raise AssertionError(f"picture {place} of grid {grid} stayed as it was")

    def message(self, containing: str) -> str:
        "The line above the pictures, once it contains a text."
        found = self.page.locator(".fs-message", has_text=containing).first
        found.wait_for()
        return found.inner_text()

    def control(self, label: str, kind: str = "input") -> Any:
        "The control with a label."
        return self.page.locator(f".jp-OutputArea .widget-inline-hbox:has(> label:text-is('{label}')) {kind}").first

    def slider(self, label: str) -> Any:
        "The handle of a slider."
        return self.control(label, ".noUi-handle")

    def button(self, label: str) -> Any:
        "A button of the explorer."
        return self.page.locator(".jupyter-widgets").get_by_role("button", name=label).first

    def type_into(self, label: str, text: str) -> None:
        "Replace the text of a control and press Enter."
        field = self.control(label)
        field.fill(text)
        field.press("Enter")

    def choose_model(self, name: str) -> None:
        "Choose a model among those that are offered, or type it."
        choice = self.control("model", "select")
        if name in choice.locator("option").all_inner_texts():
            choice.select_option(name)
        else:
            choice.select_option("another ...")
            self.type_into("name", name)

    def screenshot(self, name: str) -> Path:
        "Keep a picture of the page, the explorer at its top; returns its path."
        self.page.locator(".fs-grid").first.evaluate("one => one.closest('.jp-OutputArea, body').scrollIntoView({block: 'start'})")
        self.page.wait_for_timeout(200)
        PICTURES.mkdir(parents=True, exist_ok=True)
        path = PICTURES / f"{name}.png"
        self.page.screenshot(path=path)
        return path


@contextlib.contextmanager
def opened_notebook(driver: Any, source: Path, home: Path, app: bool = False) -> Iterator[NotebookPage]:
    "A copy of a notebook in JupyterLab, or as an app, in a browser of 1280 x 800; its folder is `home`/work."
    work = home / "work"
    work.mkdir(parents=True)
    shutil.copy(source, work / source.name)
    with served(work / source.name, home, app) as address:
        browser = driver.chromium.launch(executable_path=chromium(), args=SWITCHES)
        try:
            found = NotebookPage(browser.new_page(viewport=SIZE))
            if app:
                found.page.goto(address)
                found.page.wait_for_selector(".fs-grid img[src^=blob]")
            else:
                found.open(address)
            yield found
        finally:
            browser.close()
