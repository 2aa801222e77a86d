"""The project's files agree with each other: one list of dependencies, one version of each."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def pins() -> dict[str, str]:
    """Exact versions of constraints.txt; fails on anything else in it."""
    found: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)", line)
        assert match, f"not an exact public version: {line!r}"
        name = canonicalize_name(match[1])
        assert name not in found, f"{name} is pinned twice"
        found[name] = match[2]
    return found


def direct_requirements() -> list[Requirement]:
    """What pyproject.toml asks for itself, extras included, references to itself left out."""
    lines = [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
    return [found for line in lines if (found := Requirement(line)).name != PROJECT["name"]]


@pytest.mark.parametrize("requirement", direct_requirements(), ids=str)
def test_each_direct_dependency_has_a_pin_that_satisfies_it(requirement):
    version = pins().get(canonicalize_name(requirement.name))
    assert version is not None, f"{requirement.name} has no pin in constraints.txt"
    assert requirement.specifier.contains(version), f"{requirement} excludes its pin {version}"


def test_every_dependency_of_the_installed_packages_is_pinned():
    from importlib import metadata

    pinned = pins()
    missing = set()
    for name in pinned:
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # needed on another platform or Python only
        for line in lines:
            needed = Requirement(line)
            applies = needed.marker is None or needed.marker.evaluate({"extra": ""})
            # torch pins the CUDA packages of its own build exactly.
            if applies and name != "torch" and canonicalize_name(needed.name) not in pinned:
                missing.add(f"{name} -> {needed.name}")
    assert missing == set()


def test_all_extra_is_the_union_of_the_others():
    (line,) = EXTRAS["all"]
    assert Requirement(line).extras == set(EXTRAS) - {"all"}


def test_library_alone_needs_no_jupyter_and_no_harness():
    core = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    assert core.isdisjoint(
        {"jupyterlab", "ipywidgets", "matplotlib", "nbval", "lm-eval", "datasets", "pytest"}
    )
    assert {"torch", "transformers", "peft"} <= core


def test_conda_environment_installs_the_same_list_with_the_same_pins():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    plain = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (through_pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert through_pip == ["-c constraints.txt", "-e .[all]"]
    assert plain == [f"python{PROJECT['requires-python']}", "pip"]


def test_makefile_installs_the_same_list_with_the_same_pins():
    installs = re.findall(r"pip install (.*)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert installs == ['-c constraints.txt -e ".[all]"']


def test_makefile_and_pyproject_ask_for_the_same_python():
    minor = int(re.fullmatch(r">=3\.(\d+)", PROJECT["requires-python"])[1])
    assert f"sys.version_info < (3, {minor})" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_ci_runs_everything_in_its_own_environment():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "set -euo pipefail" in script
    assert re.search(r"make VENV=\"\$environment/venv\" lint typecheck test\n$", script)
    assert "\nexport PRUNER_LIB_REQUIRE_BROWSER=1\n" in script, "the checks must not pass without a browser"
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111, ".ci/run is not executable"


def test_make_test_runs_pytest_and_strict_nbval():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = makefile.split("\ntest:")[1].split("\nlint:")[0]
    assert '-m pytest -m "not slow and not real_model and not browser"' in recipe
    assert '-m pytest -m "real_model and not slow"\n' in recipe
    assert "-m pytest -m browser tests/browser\n" in recipe
    assert "-m pytest --nbval --nbval-current-env -n 2 --dist loadfile notebooks" in recipe
    assert "--nbval-lax" not in makefile


def test_make_exhaustive_runs_all_that_make_test_leaves_out():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = makefile.split("\nexhaustive:")[1].split("\nnotebooks:")[0]
    assert '-m pytest -m "slow and not real_model and not browser"' in recipe
    assert '-m pytest -m "slow and real_model"\n' in recipe


def test_licence_is_apache_2_in_full():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert PROJECT["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in text
    assert "9. Accepting Warranty or Additional Liability" in text
    assert "END OF TERMS AND CONDITIONS" in text


@pytest.mark.slow
def test_wheel_carries_every_module_the_manifest_and_the_type_marker(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
    ]
    copied = tmp_path / "source"
    _copy_sources(copied)
    done = subprocess.run([*command, str(copied)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "pruner_lib").rglob("*.py")}
    assert modules - inside == set()
    data = {f"pruner_lib/data/{name}" for name in ("manifest.json", "seed_prompts.jsonl")}
    assert {*data, "pruner_lib/py.typed"} <= inside
    assert not any(name.startswith(("tests/", "data/", "notebooks/")) for name in inside)


def _copy_sources(target: Path) -> None:
    """A copy, so that building leaves no folder in the checkout."""
    import shutil

    target.mkdir()
    for file in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        shutil.copy(ROOT / file, target)
    shutil.copytree(ROOT / "data", target / "data")
    shutil.copytree(ROOT / "pruner_lib", target / "pruner_lib", ignore=shutil.ignore_patterns("__pycache__"))
