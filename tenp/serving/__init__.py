# SPDX-License-Identifier: Apache-2.0
"""Pruned checkpoints in inference servers, without a patch and without an import by the user.

`experts` holds what all servers share: the weights of one layer as one process of a server has
them. `vllm` and `sglang` give it the form that each server calls, and are found by entry points.
"""
