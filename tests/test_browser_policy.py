"""Without a browser the tests in it are skipped, and the summary says so; where one is required they fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("required", "code", "said"),
    [("", 0, "1 skipped"), ("1", 1, "does not allow skipping")],
    ids=["make test", "CI"],
)
def test_no_browser(tmp_path, required, code, said):
    environment = {key: value for key, value in os.environ.items() if key != "PRUNER_LIB_BROWSER"}
    environment |= {"PATH": str(tmp_path), "PRUNER_LIB_REQUIRE_BROWSER": required}
    test = "tests/browser/test_widgets_in_browser.py::test_explorer"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "browser", test],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout
    assert "no chromium found" in done.stdout and said in done.stdout
