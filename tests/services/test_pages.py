"""What a person sees and gets: the form, the pages of a run in Prefect and MLflow, messages, and runs on new data."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from flows.servers import server
from tests.pipelines import eventually
from tests.services import browser, workspaces
from tests.services.serving import Served

STAGES = ["sizes", "prepare", "pretrain", "embed", "cluster", "linear", "adapt", "report"]


@contextmanager
def _mlflow(root: Path) -> Iterator[str]:
    """The address of MLflow's UI on the store of a workspace."""
    port = server._free_port()
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", f"sqlite:///{root}/mlflow.db"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    log = (root / "state/mlflow.log").open("wb")
    process = subprocess.Popen(
        workspaces.as_user(command),
        cwd=root,
        env=workspaces.environment(root),
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        site = f"http://127.0.0.1:{port}"
        assert eventually(lambda: _answers(site), 300)
        yield site
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # told to end, it takes more than half a minute
        process.wait()
        log.close()


def _answers(site: str) -> bool:
    try:
        return httpx.get(f"{site}/health", timeout=5, trust_env=False).is_success
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def served(
    make_workspace: Callable[..., Path], serving: Callable[..., AbstractContextManager[Served]]
) -> Iterator[Served]:
    with serving(make_workspace()) as found:
        yield found


@pytest.mark.skipif(browser.CHROMIUM is None, reason="no chromium here")
def test_a_run_is_started_from_the_form_and_its_pages_show_what_it_did(served: Served) -> None:
    root = served.root
    with browser.opened() as page:
        site = served.url.removesuffix("/api")
        browser.log_in(page, site, served.auth)
        browser.open_form(page, site)
        browser.choose(page)
        assert page.get_by_role("option").all_inner_texts() == STAGES
        page.keyboard.press("Escape")
        browser.fill_form(page, ["report"], "pretrain.swav.epochs=1")
        page.get_by_role("button", name="Submit").click()
        page.get_by_text("scheduled to start now").first.wait_for()
        number = served.request("flow_runs/filter", {})[0]["id"]
        name = "report · swav.epochs=1"
        run = served.ended(number)
        assert (run["name"], run["state"]["type"]) == (name, "COMPLETED"), served.logs(number)

        with page.expect_response("**/graph-v2*") as graph:
            page.goto(f"{site}/runs/flow-run/{number}")
        nodes = {node["label"] for _, node in graph.value.json()["nodes"]}
        encoders = [f"{stage}@{encoder}" for stage in STAGES[2:-1] for encoder in ("pixels", "swav")]
        assert nodes == {"sizes", "prepare", *encoders, "report"}
        page.locator("canvas").first.wait_for()
        page.get_by_text("Running stage 'sizes':").first.wait_for()  # in the logs
        for key, text in (("comparison", "cluster ACC"), ("results", f"{root}/artifacts/report/report.html")):
            found = served.request("artifacts/filter", {"artifacts": {"key": {"any_": [key]}}})
            page.goto(f"{site}/artifacts/artifact/{found[0]['id']}")
            page.get_by_text(text).first.wait_for()

        with _mlflow(root) as mlflow:
            browser.open_mlflow(page, mlflow, name)
            page.get_by_role("link", name="pretrain@swav").click()
            page.get_by_role("link", name="Parent run").or_(page.get_by_text("Parent run")).first.wait_for()
            page.get_by_text("Model metrics", exact=True).click()
            page.get_by_text("loss").first.wait_for()
            page.goto(f"{mlflow}/#/models/deepclust-swav?workflowType=machine_learning")
            page.get_by_text("@ champion").wait_for()


@contextmanager
def _webhook() -> Iterator[tuple[str, list[str]]]:
    """An address, and what is posted there."""
    posted: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            posted.append(f"{self.path} {json.loads(body)['text']}")
            self.send_response(200)
            self.end_headers()

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as receiver:
        threading.Thread(target=receiver.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{receiver.server_port}", posted
        receiver.shutdown()


_BLOCK = """
from prefect.blocks.notifications import CustomWebhookNotificationBlock
CustomWebhookNotificationBlock(
    name="alerts", url="{url}/hook?token={{{{token}}}}", json_data={{"text": "{{{{subject}}}}\\n{{{{body}}}}"}},
    secrets={{"token": "s3cret"}},
).save("alerts")
"""


def test_a_failed_run_is_told_and_changed_data_start_a_run(served: Served) -> None:
    def command(*words: str) -> str:
        return workspaces.run(served.root, *words, **served.environment).stdout

    def automate(*words: str) -> str:
        return command("python", "-m", "flows.automations", *words)

    with _webhook() as (url, posted):
        command("python", "-c", _BLOCK.format(url=url))
        automate("notify", "custom-webhook/alerts")
        failed = served.ended(served.start("pretrain-and-eval/local", encoders=["nobody"]))
        assert eventually(lambda: bool(posted), 60)
    page = f"{served.url.removesuffix('/api')}/runs/flow-run/{failed['id']}"
    message = f"all stages · nobody: {failed['state']['message']}"
    assert posted == [f"/hook?token=s3cret pretrain-and-eval: Failed\n{message}\n{page}"]

    automate("rerun")
    prepared = served.start("pretrain-and-eval/local", stages=["prepare"])
    assert served.ended(prepared)["state"]["type"] == "COMPLETED"
    assert automate("check") == "nothing has changed\n"
    image = next((served.root / "images").rglob("*.png"))
    image.with_name("another.png").write_bytes(image.read_bytes())
    before = len(served.request("flow_runs/filter", {}))
    assert automate("check").startswith("changed: images")
    assert eventually(lambda: len(served.request("flow_runs/filter", {})) > before, 60)
    begun = served.request("flow_runs/filter", {"sort": "START_TIME_DESC"})[0]
    assert begun["created_by"]["type"] == "AUTOMATION"
    assert eventually(lambda: served.run(begun["id"])["state"]["type"] == "RUNNING", 120)
    served.cancel(begun["id"])
    served.ended(begun["id"])
