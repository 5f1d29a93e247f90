"""Takes the recipes of pipelines/ into the package, where an installed `relief-export recipes` finds them.

Everything else is in pyproject.toml, which has no word for files from outside the package.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """Copies pipelines/*.toml into the built package; an editable install reads them where they are."""

    def run(self) -> None:
        """Build the package, then add the recipes."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "relief_export", "pipelines")
            target.mkdir(parents=True, exist_ok=True)
            for recipe in sorted(Path("pipelines").glob("*.toml")):
                shutil.copy(recipe, target)


setup(cmdclass={"build_py": BuildWithRecipes})
