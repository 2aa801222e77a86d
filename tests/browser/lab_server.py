"""A JupyterLab of its own for the tests, and a page in which a notebook is open."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SETTINGS = {  # nothing pops up, and every cell is in the page even when it is scrolled away
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/docmanager-extension/plugin": {"autosave": False},
}
PATIENCE = 120_000  # ms, for one thing on the page; a shared machine is slow at times
RUN_LIMIT = 900_000  # ms, for all cells of a notebook


def find_browser() -> str | None:
    """Path of an installed Chromium, or None. ``PRUNER_LIB_BROWSER`` names another."""
    named = os.environ.get("PRUNER_LIB_BROWSER")
    return named or next((path for name in BROWSERS if (path := shutil.which(name))), None)


@dataclass(frozen=True)
class Lab:
    """A running server: its address and the folder it serves."""

    address: str
    token: str
    folder: Path

    def url(self, notebook: str) -> str:
        """A notebook alone on the page."""
        return f"{self.address}/doc/tree/{notebook}?token={self.token}&reset"


def environment(home: Path, extra: Mapping[str, str]) -> dict[str, str]:
    """Of the server and its kernels: this environment's kernel, this checkout, no settings of the user's."""
    here = [str(ROOT), str(ROOT / "tests")]
    before = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*here, *([before] if before else [])]),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "IPYTHONDIR": str(home / "ipython"),
        "HF_HUB_OFFLINE": "1",
        **extra,
    }


@contextmanager
def running_lab(home: Path, extra: Mapping[str, str] | None = None):
    """Start JupyterLab on a free port, serve ``home/notebooks``, and end it with all its kernels.

    Args:
        home: an empty folder for everything the server writes.
        extra: environment variables for the kernels.
    """
    folder = home / "notebooks"
    folder.mkdir(parents=True)
    for name, values in SETTINGS.items():
        file = home / "settings" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1",
        f"--port={port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={folder}",
        f"--IdentityProvider.token={token}", "--LabApp.expose_app_in_browser=True",
        "--LabApp.news_url=", "--ContentsManager.allow_hidden=False",
    ]  # fmt: skip
    log = (home / "server.log").open("w")
    server = subprocess.Popen(
        command, env=environment(home, extra or {}), stdout=log, stderr=subprocess.STDOUT, cwd=folder
    )
    lab = Lab(f"http://127.0.0.1:{port}", token, folder)
    try:
        _wait_until_it_answers(lab, server, home / "server.log")
        yield lab
    finally:
        server.terminate()
        try:
            server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            server.kill()
        log.close()


def _wait_until_it_answers(lab: Lab, server: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + PATIENCE / 1000
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{lab.address}/api?token={lab.token}", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")


NOTEBOOK = "jupyterapp.shell.currentWidget"
READY = f"() => window.jupyterapp && {NOTEBOOK}?.sessionContext?.session?.kernel?.status === 'idle'"
# Finished: the kernel is idle and every code cell with text has run, or one ended in an error.
FINISHED = f"""() => {{
  const panel = {NOTEBOOK};
  const written = panel.content.model.toJSON().cells.filter(c => String(c.source).trim());
  const cells = written.filter(c => c.cell_type === 'code');
  const failed = cells.some(c => c.outputs.some(o => o.output_type === 'error'));
  const idle = panel.sessionContext.session?.kernel?.status === 'idle';
  return idle && (failed || cells.every(c => c.execution_count !== null));
}}"""
OUTPUTS = f"""() => {NOTEBOOK}.content.model.toJSON().cells.filter(c => c.cell_type === 'code').map(c => ({{
  source: [].concat(c.source).join(''), tags: c.metadata.tags ?? [], outputs: c.outputs}}))"""
# Nothing of a panel has changed for half a second, and the kernel has nothing to do.
SETTLED = f"""panel => new Promise(done => {{
  let before = '', since = performance.now();
  const timer = setInterval(() => {{
    const now = panel.innerHTML, idle = {NOTEBOOK}.sessionContext.session.kernel.status === 'idle';
    if (now !== before || !idle) {{ before = now; since = performance.now(); }}
    if (performance.now() - since > 500) {{ clearInterval(timer); done(); }}
  }}, 50);
}})"""
# Committed outputs carry execution counts; without clearing, a run would look finished before it began.
CLEAR = "async () => { await jupyterapp.commands.execute('notebook:clear-all-cell-outputs') }"
SHUT_DOWN = f"async () => {{ await (window.jupyterapp && {NOTEBOOK}?.sessionContext.shutdown()) }}"
RESTART = f"async () => {{ await {NOTEBOOK}.sessionContext.session.kernel.restart() }}"


class Notebook:
    """One notebook open in a page; what a person does with it."""

    def __init__(self, page, lab: Lab, name: str, pictures: Path) -> None:
        self.page, self.name, self._pictures = page, name, pictures
        page.set_default_timeout(PATIENCE)
        page.goto(lab.url(name))
        page.wait_for_function(READY)

    def start_all(self) -> None:
        """Run > Run All Cells."""
        self.page.evaluate(CLEAR)
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()

    def run_all(self) -> None:
        """Run > Run All Cells, and wait for the last one."""
        self.start_all()
        self.page.wait_for_function(FINISHED, timeout=RUN_LIMIT)

    def outputs(self) -> list[dict]:
        """Of every code cell: source, tags and outputs."""
        return self.page.evaluate(OUTPUTS)

    def errors(self) -> list[str]:
        """What went wrong in any cell: exceptions, and anything on standard error."""
        found = []
        for cell in self.outputs():
            if "raises-exception" in cell["tags"]:
                continue
            for output in cell["outputs"]:
                if output["output_type"] == "error":
                    found.append(f"{output['ename']}: {output['evalue']} in {cell['source'][:120]!r}")
                elif output.get("name") == "stderr":
                    found.append(f"standard error: {str(output['text'])[:300]} in {cell['source'][:120]!r}")
        return found

    def widget(self, name: str):
        """The panel of that name; there must be one."""
        panel = self.page.locator(f".pruner-lab-{name}").first
        panel.wait_for()
        panel.scroll_into_view_if_needed()
        return panel

    def settled(self, panel) -> None:
        """Wait until a panel shows what it was asked for and stays so."""
        panel.evaluate(SETTLED)

    def picture(self, label: str, panel=None) -> Path:
        """A screenshot, kept as an artefact."""
        self._pictures.mkdir(parents=True, exist_ok=True)
        path = self._pictures / f"{Path(self.name).stem}-{label}.png"
        if panel is not None:
            self.settled(panel)
        (panel or self.page).screenshot(path=path)
        return path

    def restart(self) -> None:
        """Start the kernel anew, as Kernel > Restart does."""
        self.page.evaluate(RESTART)
        self.page.wait_for_function(READY)
