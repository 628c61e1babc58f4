"""The ops port of a front door: what scrapers and probes ask, and a page for operators that only shows.

The page is `page`; what it shows is gathered by `lookout` and drawn by `templates/` and `static/`, which come
with the package, so that nothing is ever fetched from elsewhere. Who may see it is in `sessions`.
"""

from scheduler.ops.gpu_time import History
from scheduler.ops.lookout import Lookout
from scheduler.ops.page import OpsPage
from scheduler.ops.server import Checks, OpsServer, ops_server

__all__ = ["Checks", "History", "Lookout", "OpsPage", "OpsServer", "ops_server"]
