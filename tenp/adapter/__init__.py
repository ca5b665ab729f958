# SPDX-License-Identifier: Apache-2.0
"""What tenp knows of transformers: the package to read when a new version breaks something.

About 65 model families keep their routed experts in one kind of module: fused 3-D parameters, a
call `(hidden_states [T, H], top_k_index [T, k], top_k_weights [T, k])`, and flags that describe the
layout. `experts` finds these modules, shows their weights in one orientation whatever the flags
say, and takes their place during calibration; `names` tells which checkpoint tensor feeds which of
them, `configs` which fields set their shape, and `models` loads both.
Written for transformers 5.17 to 5.24, and tested at both ends; no model family is named here.
"""

from tenp.adapter.configs import (
    attention_heads,
    config_of_experts,
    config_of_width,
    expert_groups,
    experts_per_token,
)
from tenp.adapter.experts import Experts, ExpertsFunction, experts_replaced, find_experts
from tenp.adapter.models import (
    empty_model,
    load_config,
    load_model,
    model_of_config,
    stored_dtype,
    vocabulary,
)
from tenp.adapter.names import (
    ExpertTensor,
    expert_tensors,
    model_names,
    single_names,
    stock_tensors,
)

__all__ = [
    "ExpertTensor",
    "Experts",
    "ExpertsFunction",
    "attention_heads",
    "config_of_experts",
    "config_of_width",
    "empty_model",
    "expert_groups",
    "expert_tensors",
    "experts_per_token",
    "experts_replaced",
    "find_experts",
    "load_config",
    "load_model",
    "model_names",
    "model_of_config",
    "single_names",
    "stock_tensors",
    "stored_dtype",
    "vocabulary",
]
