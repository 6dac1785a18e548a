"""Only what pyproject.toml cannot say: the wheel carries the run files, recipes and job scripts of the checkout."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("recipes", "slurm", "tools")


class BuildWithRecipes(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # there the checkout itself is used
            for name in SHIPPED:
                target = Path(self.build_lib) / "megatron_r1reward" / "shipped" / name
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(name, target, ignore=shutil.ignore_patterns("__pycache__", "site.sh"))


setup(cmdclass={"build_py": BuildWithRecipes})
