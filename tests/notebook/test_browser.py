"""JupyterLab in a real browser: the launcher's page, and the sliders of notebook 02. Skipped where no Chromium is.

The browser is spoken to by its own protocol (`--remote-debugging-port`), so that no driver has to be installed.
"""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest

ROOT = Path(__file__).parents[2]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine"),
]
MOVED = """(() => {
    const seen = document.querySelector(".jp-OutputArea .widget-image")?.src;
    window.first ??= seen;
    return seen !== undefined && seen !== window.first;
})()"""


def until(ask, seconds=300):
    """Return what `ask` returns as soon as it is true."""
    end = time.monotonic() + seconds
    while not (found := ask()):
        assert time.monotonic() < end, f"not in {seconds} seconds"
        time.sleep(1)
    return found


class Page:
    """A tab of the browser."""

    def __init__(self, address: str, folder: Path):
        websocket = pytest.importorskip("websocket")  # a dependency of Jupyter's server
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
        command = [BROWSER, *options, f"--user-data-dir={folder}", "--window-size=1280,900", address]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port = until(lambda: (at := folder / "DevToolsActivePort").exists() and at.read_text().partition("\n")[0])
        pages = until(lambda: [p for p in json.load(urlopen(f"http://127.0.0.1:{port}/json")) if p["type"] == "page"])
        self.socket = websocket.create_connection(pages[0]["webSocketDebuggerUrl"], suppress_origin=True, timeout=300)
        self.numbers = itertools.count(1)

    def call(self, method: str, **params):
        """Call a method of the browser's protocol; return its result."""
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while (answer := json.loads(self.socket.recv())).get("id") != number:
            pass
        return answer["result"]

    def says(self, expression: str):
        """Return what JavaScript says in the page."""
        told = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        return told["result"].get("value")


@pytest.fixture
def lab(tmp_path):
    """The address of a JupyterLab on a copy of two notebooks, which it may save."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").touch()
    for name in ("00_overview", "02_metrics"):
        shutil.copy(ROOT / f"notebooks/{name}.ipynb", tmp_path / "notebooks")
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--notebook-dir", "notebooks"]
    command += ["--ServerApp.port=0", "--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True"]
    environment = {**os.environ, "WSOLNB_ROOT": str(tmp_path), "JUPYTER_CONFIG_DIR": str(tmp_path / "config")}
    environment |= {"JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"), "JUPYTER_PREFER_ENV_PATH": "1"}
    said = tmp_path / "said.txt"
    server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=said.open("w"), stderr=subprocess.STDOUT)
    found = until(lambda: re.search(r"http://(?:localhost|127\.0\.0\.1):\d+/lab", said.read_text()))
    yield found[0]
    server.terminate()
    server.wait(60)


@pytest.fixture
def opened(lab, tmp_path):
    pages = []

    def opened(notebook):
        pages.append(Page(f"{lab}/tree/{notebook}.ipynb", tmp_path / f"browser-{notebook}"))
        until(lambda: pages[-1].says("document.querySelectorAll('.jp-Notebook .jp-Cell').length"))
        return pages[-1]

    yield opened
    for page in pages:
        page.process.terminate()
        page.process.wait(60)


def test_the_launcher_shows_links_to_the_lessons_at_once(opened):
    page = opened("00_overview")
    links = "[...document.querySelectorAll('.jp-Notebook .jp-RenderedMarkdown a')].map(a => a.textContent)"
    assert {"01 data", "91 claims", "glossary", "a lecturer's page"} <= set(until(lambda: page.says(links)))


def test_a_slider_of_notebook_02_draws_another_picture(opened):
    page = opened("02_metrics")
    until(lambda: page.says("!!window.jupyterapp?.shell.currentWidget?.context?.sessionContext?.session?.kernel"))
    page.says("void window.jupyterapp.commands.execute('notebook:run-all-cells')")
    handle = "document.querySelector('.jp-OutputArea .widget-slider .noUi-handle')"
    until(lambda: page.says(f"!!{handle} && !!document.querySelector('.jp-OutputArea .widget-image')"))
    assert not page.says(MOVED)
    page.says(f"{handle}.focus()")
    for kind in ("rawKeyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=kind, key="ArrowRight", code="ArrowRight", windowsVirtualKeyCode=39)
    until(lambda: page.says(MOVED), 60)
