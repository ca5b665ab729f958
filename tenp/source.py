# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint a file was made from, carried by statistics and plans alike."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """A checkpoint, as far as statistics and plans need to know it.

    Attributes:
        fingerprint: `Checkpoint.fingerprint`; two checkpoints with one fingerprint are the same.
        architecture: The model class of `config.json`, for example `Qwen2MoeForCausalLM`.
        parameters: Parameters of the whole model.
        bytes: Bytes of the whole model when it is read: weights in float8 and MXFP4 count as the bfloat16
            that they stand for, in which a pruned copy has them.
        neuron_parameters: Parameters of one routed neuron: its gate row, up row, down column and
            biases, 3 `H` for a plain SwiGLU expert.
        neuron_bytes: The same of one routed neuron.
    """

    fingerprint: str
    architecture: str
    parameters: int
    bytes: int
    neuron_parameters: int
    neuron_bytes: int
