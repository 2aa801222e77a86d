"""The one thing pyproject.toml cannot say: put the files of data/ into the built package."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithData(build_py):
    """Copies them beside the modules; an editable install reads them where they stand."""

    def run(self) -> None:
        """Build as usual, then copy."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "pruner_lib", "data")
            target.mkdir(parents=True, exist_ok=True)
            for name in ("manifest.json", "seed_prompts.jsonl"):
                shutil.copy(Path("data", name), target)


setup(cmdclass={"build_py": BuildWithData})
