# SPDX-License-Identifier: Apache-2.0
"""The rest is in pyproject.toml, which cannot say where a .pth file goes: beside the module."""

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPyWithPth(build_py):
    """Copies the .pth file too."""

    def run(self) -> None:
        """Build."""
        super().run()
        self.copy_file("tenp_autoload.pth", self.build_lib)


setup(cmdclass={"build_py": BuildPyWithPth})
