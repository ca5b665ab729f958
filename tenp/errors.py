# SPDX-License-Identifier: Apache-2.0
"""Everything that tenp raises on purpose.

The native module raises these same classes. Each also derives from the built-in
that a caller who does not know tenp would expect.
"""


class TenpError(Exception):
    """Base of every error that tenp raises on purpose."""


class InvalidArgument(TenpError, ValueError):
    """A shape, dtype, device, layout or value that the function does not accept."""


class Unsupported(TenpError, NotImplementedError):
    """A valid request that this build, device or model cannot serve."""


class DeviceError(TenpError, RuntimeError):
    """The device refused: a launch or a runtime call failed."""


class PlanError(TenpError, ValueError):
    """A plan that contradicts itself, its budget or the checkpoint."""


class CheckpointError(TenpError, OSError):
    """A checkpoint that is missing, incomplete or not what it says."""


class DataError(TenpError, ValueError):
    """Calibration or evaluation data that cannot be used."""
