# SPDX-License-Identifier: Apache-2.0
"""The C++ library as another project meets it: installed, found by CMake, linked and run."""

import importlib.util
import os
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CONSUMER = ROOT / "examples" / "cpp_consumer"

# Token 0: expert 0, relu(2) * (1, 2). Token 1: expert 1, 0.5 * (4 * (1, 0) + 1 * (0, 3)).
# Token 2 names no expert.
EXPECTED = ["2 4", "2 1.5", "0 0"]


def find_cmake() -> str | None:
    """The build requirement's CMake, since a system's may be too old, else the one on PATH."""
    if importlib.util.find_spec("cmake") is None:
        return shutil.which("cmake")
    import cmake

    return str(Path(cmake.CMAKE_BIN_DIR) / "cmake")


CMAKE = find_cmake()

pytestmark = [
    pytest.mark.skipif(CMAKE is None, reason="needs CMake"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler"),
]


def run(*command: object) -> str:
    """Run a command and return what it prints, errors last; show its output when it fails."""
    environment = {"CMAKE_BUILD_PARALLEL_LEVEL": "2", **os.environ}
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def build_and_run_consumer(build: Path, *options: str) -> list[str]:
    """Configure, build and run the example; return its lines."""
    run(CMAKE, "-S", CONSUMER, "-B", build, "-DCMAKE_BUILD_TYPE=Release", *options)
    run(CMAKE, "--build", build)
    return run(build / "consumer").splitlines()


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="needs the source tree")
def test_a_program_finds_and_links_the_installed_library(tmp_path: Path) -> None:
    build = tmp_path / "tenp"
    options = [
        "-DCMAKE_BUILD_TYPE=Debug",  # compiles in a third of the time
        "-DTENP_BUILD_CUDA=OFF",
        "-DTENP_BUILD_TESTS=OFF",
    ]
    for kind, shared in (("static", "OFF"), ("shared", "ON")):  # of the same objects
        prefix = tmp_path / kind
        run(CMAKE, "-S", ROOT, "-B", build, f"-DBUILD_SHARED_LIBS={shared}", *options)
        run(CMAKE, "--build", build)
        run(CMAKE, "--install", build, "--prefix", prefix)
        found = f"-DCMAKE_PREFIX_PATH={prefix}"
        lines = build_and_run_consumer(tmp_path / f"consumer-{kind}", found)
        assert lines == [f"tenp {version('tenp')}", *EXPECTED]


def test_a_program_finds_and_links_the_library_of_a_wheel(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("tenp")
    assert spec is not None and spec.origin is not None
    config = Path(spec.origin).parent / "lib" / "cmake" / "tenp"
    if not config.exists():
        pytest.skip("an editable install has no C++ package")
    lines = build_and_run_consumer(tmp_path, f"-Dtenp_DIR={config}")
    assert lines == [f"tenp {version('tenp')}", *EXPECTED]


@pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="needs the source tree")
@pytest.mark.parametrize(("wanted", "warned"), [([], True), (["-DTENP_BUILD_CUDA=OFF"], False)])
def test_a_gpu_without_a_compiler_is_warned_of(
    tmp_path: Path, wanted: list[str], warned: bool
) -> None:
    gpu = ["-DCMAKE_CUDA_ARCHITECTURES=native", "-DCMAKE_CUDA_COMPILER=NOTFOUND"]
    said = run(CMAKE, "-S", ROOT, "-B", tmp_path, "-DTENP_BUILD_TESTS=OFF", *gpu, *wanted)
    assert ("There is a GPU but no CUDA compiler" in said) == warned
