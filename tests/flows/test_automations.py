"""What the server does by itself; that it does is tested in tests/services."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import automations
from flows.pipeline import pretrain_and_eval


def _main(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["automations", *words])
    automations.main()


def test_an_automation_is_made_once_and_a_mistake_is_one_line(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(message: str, *words: str) -> None:
        with pytest.raises(SystemExit) as stop:
            _main(monkeypatch, *words)
        error = capsys.readouterr().err
        assert (stop.value.code, error.count("\n")) == (2, 1)
        assert message in error

    refused("got 'custom-webhook/alerts'", "notify", "custom-webhook/alerts")
    refused("expected the deployment pretrain-and-eval/local, got none", "rerun")
    CustomWebhookNotificationBlock(name="alerts", url="http://127.0.0.1:1").save("alerts")
    with get_client(sync_client=True) as client:
        client.create_deployment(client.create_flow(pretrain_and_eval), name="local")
        for _ in range(2):
            _main(monkeypatch, "notify", "custom-webhook/alerts")
            _main(monkeypatch, "rerun")
        made = client.read_automations()
    assert sorted(each.name for each in made) == ["deepclust: run again", "deepclust: tell custom-webhook/alerts"]
    with temporary_settings({PREFECT_API_URL: None}):
        refused("expected PREFECT_API_URL to name a server", "check")
