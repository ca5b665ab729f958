# SPDX-License-Identifier: Apache-2.0
"""A pruned checkpoint to a running model: `AutoModelForCausalLM.from_pretrained` after `import tenp`.

`experts` holds the module that runs experts of different widths, `loading` registers with
transformers how a pruned checkpoint becomes such modules and back.
"""

from tenp.runtime.experts import TenpExperts
from tenp.runtime.loading import TenpConfig, TenpQuantizer

__all__ = ["TenpConfig", "TenpExperts", "TenpQuantizer"]
