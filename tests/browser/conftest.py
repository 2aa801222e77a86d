"""A browser and a JupyterLab for the tests in this folder; skipped where no Chromium is installed."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path

import pytest
from lab_server import PATIENCE, ROOT, SHUT_DOWN, Notebook, find_browser, running_lab

PICTURES = Path(os.environ.get("PRUNER_LIB_SCREENSHOTS", ROOT / "build" / "screenshots"))
REQUIRED = os.environ.get("PRUNER_LIB_REQUIRE_BROWSER") == "1"


@pytest.fixture(scope="session")
def browser():
    path = find_browser()
    if path is None:
        said = "no chromium found: install it (Debian: apt-get install chromium) or set PRUNER_LIB_BROWSER"
        if REQUIRED:
            pytest.fail(f"{said}; PRUNER_LIB_REQUIRE_BROWSER=1 does not allow skipping")
        pytest.skip(said)
    playwright = pytest.importorskip("playwright.sync_api")
    playwright.expect.set_options(timeout=PATIENCE)
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def lab(browser, tmp_path_factory):
    with running_lab(tmp_path_factory.mktemp("lab")) as running:
        yield running


@pytest.fixture(scope="session")
def open_notebook(browser):
    """Opens a notebook of a lab for the length of a ``with``; then its kernel ends and the page is closed."""

    @contextmanager
    def opened(lab, name):
        context = browser.new_context(viewport={"width": 1360, "height": 1500})
        page = context.new_page()
        try:
            yield Notebook(page, lab, name, PICTURES)
        finally:
            page.evaluate(SHUT_DOWN)
            context.close()

    return opened
