"""The service on Ray.

Importing this package turns Ray's usage statistics off, before anything below it imports ray: Ray would
otherwise also probe a cloud metadata address.
"""

import os

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
