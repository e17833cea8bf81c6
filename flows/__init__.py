"""When and where: Prefect's flows and their deployments."""

import os

from tasks.shared.outputs import environment

# Both before anything imports Prefect.
environment.prepare()
os.environ["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] = "30"  # seconds; by default 180. See automations.py
