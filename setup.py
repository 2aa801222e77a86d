"""The one thing pyproject.toml cannot say: put data/manifest.json into the built package."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithManifest(build_py):
    """Copies the manifest beside the modules; an editable install reads it where it stands."""

    def run(self) -> None:
        """Build as usual, then copy."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "pruner_lib", "data")
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path("data", "manifest.json"), target)


setup(cmdclass={"build_py": BuildWithManifest})
