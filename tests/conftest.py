"""Every test runs without telemetry and on a stage's number of threads."""

from tasks import environment

environment.prepare()
