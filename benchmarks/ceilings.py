# SPDX-License-Identifier: Apache-2.0
"""What the CPU can do at most: read memory, and multiply and add in registers.

Compiled by the C++ compiler of the machine for the machine (`CXX`, or c++), into a temporary directory.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from pathlib import Path

import torch

from tenp import ops


class Ceilings:
    """Work of a given size that does nothing else, to be timed beside work of the same size."""

    def __init__(self, memory_bytes: int = 1 << 30) -> None:
        """Compile, and make memory to read.

        Args:
            memory_bytes: So much that no cache holds it.
        """
        with tempfile.TemporaryDirectory() as directory:
            library = Path(directory) / "ceilings.so"
            source = Path(__file__).with_suffix(".cpp")
            compiler = os.environ.get("CXX", "c++")
            flags = ["-std=c++20", "-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
            subprocess.run([compiler, *flags, source, "-o", library], check=True)
            self._library = ctypes.CDLL(str(library))
        self._library.tenp_tile_multiply_add.restype = ctypes.c_bool
        # Of torch, as the weights are, so that both have pages of the same size.
        self._memory = torch.ones(memory_bytes, dtype=torch.uint8)
        self._at = 0
        self.has_tiles = self._library.tenp_tile_multiply_add(ctypes.c_double(0), 1)

    def read(self, num_bytes: int) -> None:
        """Read so many bytes, other ones than in the last calls, on the threads of tenp."""
        while num_bytes > 0:
            piece = min(num_bytes, self._memory.numel() - self._at)
            address = ctypes.c_void_p(self._memory.data_ptr() + self._at)
            self._library.tenp_read(address, ctypes.c_int64(piece), ops.num_threads())
            self._at = (self._at + piece) % self._memory.numel() // 4096 * 4096
            num_bytes -= piece

    def multiply_add(self, flops: float) -> None:
        """Do so many floating-point operations in float32 vectors."""
        self._library.tenp_multiply_add(ctypes.c_double(flops), ops.num_threads())

    def tile_multiply_add(self, flops: float) -> None:
        """Do so many in tiles of bfloat16 (AMX); only if `has_tiles`."""
        self._library.tenp_tile_multiply_add(ctypes.c_double(flops), ops.num_threads())
