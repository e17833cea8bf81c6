"""When and where: Prefect's flows and their deployments."""

from tasks.shared.outputs import environment

environment.prepare()  # before anything imports Prefect
