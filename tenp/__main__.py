# SPDX-License-Identifier: Apache-2.0
"""`python -m tenp` is the command `tenp`."""

from tenp.cli import main

main()
