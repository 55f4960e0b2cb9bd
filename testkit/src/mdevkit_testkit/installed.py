"""The suites for one installed distribution, as a test module: what ``python -m mdevkit_testkit DIST`` lets pytest collect.

The distribution comes by an environment variable: pytest imports this module like any other and passes nothing.
"""

from __future__ import annotations

import os

from mdevkit.plugins import PARENTS

from mdevkit_testkit.selection import VARIABLE, plugins_of, suites

for _plugin in plugins_of(os.environ[VARIABLE], PARENTS):
    for _number, _suite in enumerate(suites(_plugin)):
        globals()[f"Test_{_plugin.name}_{_number}"] = _suite
