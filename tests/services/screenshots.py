"""The pictures of docs/operations.md, of a workspace that is served and has run whole.

python -m tests.services.screenshots WORKSPACE PREFECT MLFLOW    the addresses: http://127.0.0.1:4200 http://127.0.0.1:5000

MLflow's is that of `mlflow ui` on the store of the workspace.
"""

from __future__ import annotations

import sys
from pathlib import Path

import httpx
from playwright.sync_api import Page

from flows.servers import access
from tests.paths import ROOT
from tests.services import browser

FOLDER = ROOT / "docs/images"


def take(page: Page, name: str) -> None:
    """Take a picture of what the page shows once it is drawn, which graphs and curves are a little at a time."""
    page.mouse.move(0, 0)
    page.wait_for_timeout(5_000)  # pages that ask again and again are never at rest
    page.screenshot(path=FOLDER / f"{name}.png")


def main() -> None:
    """Go through the pages in the order of the documentation."""
    workspace, prefect, mlflow = sys.argv[1:]
    auth = (Path(workspace) / access.FILE).read_text(encoding="utf-8").strip()

    def asked(what: str, **wanted: object) -> list[dict[str, str]]:
        reply = httpx.post(
            f"{prefect}/api/{what}/filter", json=wanted, headers={"Authorization": access.authorization(auth)}
        )
        found: list[dict[str, str]] = reply.raise_for_status().json()
        return found

    FOLDER.mkdir(exist_ok=True)
    whole = {"flow_runs": {"name": {"like_": "all stages"}, "state": {"type": {"any_": ["COMPLETED"]}}}}
    run = asked("flow_runs", sort="START_TIME_DESC", **whole)[0]
    of_run = {"flow_runs": {"id": {"any_": [run["id"]]}}, "artifacts": {"key": {"any_": ["comparison"]}}}
    comparison = asked("artifacts", **of_run)[0]
    with browser.opened() as page:
        browser.log_in(page, prefect, auth)
        browser.open_form(page, prefect)
        browser.choose(page, "linear", "report")
        take(page, "form")
        page.goto(f"{prefect}/runs/flow-run/{run['id']}")
        take(page, "run")
        page.goto(f"{prefect}/artifacts/artifact/{comparison['id']}")
        take(page, "comparison")
        browser.open_mlflow(page, mlflow, run["name"])
        take(page, "mlflow-runs")
        page.get_by_role("link", name="pretrain@swav").first.click()
        page.wait_for_url("**/runs/*")
        page.goto(f"{page.url.partition('?')[0]}/model-metrics?workflowType=machine_learning")
        take(page, "mlflow-curves")
        page.goto(f"{mlflow}/#/models/deepclust-swav?workflowType=machine_learning")
        take(page, "mlflow-model")


if __name__ == "__main__":
    main()
