"""Prefect's and MLflow's pages in a headless Chromium, as a person goes through them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Page, sync_playwright

CHROMIUM = shutil.which("chromium")
# Nothing outside of this machine is asked for anything.
_FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"),
    *("--disable-component-update", "--disable-default-apps", "--no-first-run", "--proxy-server=direct://"),
]


@contextmanager
def opened(width: int = 1280, height: int = 800) -> Iterator[Page]:
    """An empty page."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=_FLAGS)
        try:
            page = browser.new_page(viewport={"width": width, "height": height})
            page.set_default_timeout(120_000)  # of one click, on a busy machine
            yield page
        finally:
            browser.close()


def log_in(page: Page, site: str, auth: str) -> None:
    """Give Prefect's login page what it asks for, and wait for the dashboard."""
    page.goto(f"{site}/login")
    page.get_by_placeholder("admin:pass").fill(auth)
    page.get_by_role("button", name="Login").click()
    page.wait_for_url(lambda url: "login" not in url)


def open_form(page: Page, site: str, deployment: str = "local") -> None:
    """Go to the form that starts a run of a deployment of pretrain-and-eval."""
    page.goto(f"{site}/deployments")
    page.get_by_role("link", name=deployment, exact=True).first.click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("Custom run").click()
    page.get_by_text("No items selected").wait_for()


def choose(page: Page, *stages: str) -> None:
    """Choose stages in the form; the choices stay open."""
    page.locator(".p-select-button__control").first.press("ArrowDown")  # a click would open and close them
    for stage in stages:
        page.get_by_role("option", name=stage, exact=True).click()


def fill_form(page: Page, stages: list[str], override: str) -> None:
    """Choose stages, and enter an override."""
    choose(page, *stages)
    page.get_by_text("Parameters", exact=True).click()  # closes the choices
    page.get_by_role("button", name="Add item").nth(1).click()
    page.locator("textarea").last.fill(override)


def open_mlflow(page: Page, site: str, run: str) -> None:
    """Go to the list of runs, and show the stages of a pipeline's run under it."""
    page.goto(f"{site}/#/experiments/1/runs?workflowType=machine_learning")
    page.get_by_role("button", name="Close", exact=True).click()  # the assistant, which covers a third of the page
    page.get_by_role("gridcell").filter(has_text=run).get_by_role("button").first.click()
