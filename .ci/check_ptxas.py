# SPDX-License-Identifier: Apache-2.0
"""Compile the CUDA kernels and refuse those that spill registers or use local memory.

    python .ci/check_ptxas.py [--archs 80 90] [--jobs 2]

Needs nvcc, no GPU. Every kernel named in KERNELS must be among those that ptxas reports, once at least
for every architecture, with 0 bytes of stack and of spills.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_ROOT = Path(__file__).parents[1]
_ALL_ARCHS = ["80", "89", "90", "100", "120"]

KERNELS = [
    "activations_kernel",
    "add_outputs_kernel",
    "chunks_kernel",
    "combine_kernel",
    "contribution_kernel",
    "count_kernel",
    "energy_totals_kernel",
    "expert_sums_kernel",
    "expert_totals_kernel",
    "input_energy_kernel",
    "multiply_kernel",
    "outputs_kernel",
    "place_kernel",
    "read_kernel",
    "route_kernel",
    "row_changes_kernel",
    "row_facts_kernel",
    "row_norms_kernel",
    "scan_kernel",
    "second_moment_kernel",
    "statistics_outputs_kernel",
    "stream_activations_kernel",
    "stream_outputs_kernel",
    "tile_table_kernel",
    "totals_kernel",
]


def main() -> int:
    """Compile every file for every architecture; return the number of things wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--archs", nargs="+", default=_ALL_ARCHS)
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    sources = [*sorted((_ROOT / "csrc/cuda").rglob("*.cu")), _ROOT / "benchmarks/gpu_ceilings.cu"]
    work = [(source, arch) for arch in arguments.archs for source in sources]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        reports = list(pool.map(lambda item: _compile(*item), work))

    problems = []
    seen: dict[tuple[str, str], int] = {}
    for (source, arch), report in zip(work, reports, strict=True):
        for entry, frame, registers in _functions(report):
            kernel = next((k for k in sorted(KERNELS, key=len)[::-1] if k in entry), None)
            if kernel is None:
                problems.append(f"{source.name}, sm_{arch}: {entry} is not in KERNELS")
                continue
            seen[kernel, arch] = max(seen.get((kernel, arch), 0), registers)
            if any(frame):
                problems.append(
                    f"{source.name}, sm_{arch}, {kernel}: stack, spill stores and spill loads "
                    f"must be 0 bytes, got {frame}"
                )
    for kernel in KERNELS:
        registers = [str(seen.get((kernel, arch), "-")) for arch in arguments.archs]
        print(f"{kernel:28} registers {' '.join(registers)}")
        problems += [
            f"sm_{arch}: {kernel} was not compiled"
            for arch in arguments.archs
            if (kernel, arch) not in seen
        ]
    print("\n".join(problems) or f"no spills, no stack: sm_{' sm_'.join(arguments.archs)}")
    return min(len(problems), 1)


def _compile(source: Path, arch: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(
            [
                "nvcc",
                "-std=c++20",
                "-O3",
                f"-gencode=arch=compute_{arch},code=sm_{arch}",
                f"-I{_ROOT / 'csrc'}",
                f"-I{_ROOT / 'csrc/include'}",
                "-Xptxas=-v",
                "-cubin",
                str(source),
                "-o",
                f"{folder}/out.cubin",
            ],
            capture_output=True,
            text=True,
        )
    if result.returncode != 0:
        sys.exit(f"{source}, sm_{arch}:\n{result.stderr}")
    return result.stderr


def _functions(report: str) -> list[tuple[str, tuple[int, int, int], int]]:
    """Entry name, (stack, spill stores, spill loads) and registers of every kernel."""
    found = []
    for part in report.split("Compiling entry function '")[1:]:
        entry = part.split("'")[0]
        frame = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        )
        registers = re.search(r"Used (\d+) registers", part)
        if frame is None or registers is None:
            sys.exit(f"ptxas says nothing about {entry}:\n{part}")
        stack, stores, loads = (int(number) for number in frame.groups())
        found.append((entry, (stack, stores, loads), int(registers[1])))
    return found


if __name__ == "__main__":
    sys.exit(main())
