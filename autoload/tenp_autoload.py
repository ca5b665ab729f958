# SPDX-License-Identifier: Apache-2.0
"""Imports tenp in every program that loads models with transformers, so that none needs `import tenp`.

`tenp_autoload.pth` has every Python of the environment call `install` when it starts. All that happens
then is that a finder is put before the others: tenp itself, which needs seconds, is imported right after
the modules of transformers that it extends, and in no other program.
"""

import sys

#: The first that a program imports may be either: some read a checkpoint's quantization alone.
_AWAITED = ("transformers.modeling_utils", "transformers.quantizers")


def install():
    """Wait for transformers."""
    sys.meta_path.insert(0, _Waiting())


class _Waiting:
    """A finder of `sys.meta_path`."""

    running = 0  # awaited modules that are being imported: one imports the other

    def find_spec(self, name, path=None, target=None):
        """Find an awaited module, and have tenp imported after it was."""
        if name not in _AWAITED:
            return None
        from importlib.machinery import PathFinder  # not in every program

        spec = PathFinder.find_spec(name, path, target)
        if spec is not None:
            execute = spec.loader.exec_module

            def execute_and_import_tenp(module):
                self.running += 1
                try:
                    execute(module)
                finally:
                    self.running -= 1
                if self.running == 0 and self in sys.meta_path:
                    sys.meta_path.remove(self)
                    _import_tenp()

            spec.loader.exec_module = execute_and_import_tenp
        return spec


def _import_tenp():
    try:
        import tenp  # noqa: F401 - for what it registers
    except Exception as error:  # of no concern to a program that loads other models
        import warnings

        warnings.warn(
            f"tenp could not be imported, so pruned checkpoints will not load: {error}",
            stacklevel=2,
        )
