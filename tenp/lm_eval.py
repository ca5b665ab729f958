# SPDX-License-Identifier: Apache-2.0
"""`python -m tenp.lm_eval …` is the command of lm-eval with tenp loaded, and nothing more.

lm-eval loads models by name in a process of its own, which would not know pruned checkpoints.
"""

import importlib.util

# Imported for what it does: it registers tenp with transformers.
import tenp  # noqa: F401
from tenp.cli import fail


def main() -> None:
    """Hand the arguments to lm-eval; without lm-eval, one sentence and exit code 2."""
    if importlib.util.find_spec("lm_eval") is None:
        fail(
            "python -m tenp.lm_eval needs the package lm-eval, which is not installed; "
            "install it with: pip install 'tenp[eval]'"
        )
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
