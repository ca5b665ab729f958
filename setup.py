# SPDX-License-Identifier: Apache-2.0
"""Builds tenp._C by running CMake. Everything else is in pyproject.toml."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import cmake
import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# The packages named in [build-system], not what PATH finds first.
CMAKE = str(Path(cmake.CMAKE_BIN_DIR) / "cmake")
NINJA = str(Path(ninja.BIN_DIR) / "ninja")
# Options for CMake from the environment; they win over those set here.
CMAKE_ARGS = shlex.split(os.environ.get("CMAKE_ARGS", ""))


def cuda_definitions() -> dict[str, str]:
    """Build for this machine: CUDA kernels for its GPU, or none when nothing can run them.

    Compiling for every architecture takes minutes. A wheel for other machines asks for
    it with CMAKE_ARGS=-DTENP_BUILD_CUDA=ON.
    """
    if any(argument.startswith("-DTENP_BUILD_CUDA") for argument in CMAKE_ARGS):
        return {}
    # Containers may see the second GPU alone, and Linux in Windows sees GPUs as /dev/dxg.
    if any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists():
        return {"CMAKE_CUDA_ARCHITECTURES": "native"}
    return {"TENP_BUILD_CUDA": "OFF"}


class CMakeBuild(build_ext):
    """Configures, builds and installs the CMake project into the package folder.

    A wheel also gets the C++ headers, library and CMake package, so that other
    C++ programs can use it; an editable install gets the Python module alone and
    leaves the source tree clean.
    """

    def build_extension(self, ext: Extension) -> None:
        """Put the extension, and in a wheel the C++ package, where setuptools wants it."""
        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = ROOT / "build" / "python"
        definitions = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_INSTALL_LIBDIR": "lib",
            "CMAKE_MAKE_PROGRAM": NINJA,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "TENP_BUILD_PYTHON": "ON",
            "TENP_BUILD_TESTS": "OFF",
            **cuda_definitions(),
        }
        configure = [CMAKE, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        # Left over from an earlier build, which may have looked for a CUDA compiler in vain.
        configure += ["-UTENP_*", "-UCMAKE_CUDA_ARCHITECTURES", "-UCMAKE_CUDA_COMPILER"]
        configure += [f"-D{name}={value}" for name, value in definitions.items()]
        configure += CMAKE_ARGS
        install = [CMAKE, "--install", str(build), "--prefix", str(package)]
        if self.inplace:
            install += ["--component", "python"]
        for command in (configure, [CMAKE, "--build", str(build)], install):
            subprocess.run(command, check=True)


setup(ext_modules=[Extension("tenp._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
