"""The report's page in a real browser: it shows what the run's commits hold, and nothing goes wrong in showing it."""

import json
import shutil
from pathlib import Path

import pytest

from tests.lampctl.report.reported_run import call, made

_NAMES = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome", "google-chrome-stable", "chrome")


def find_browser(playwright) -> str:
    """A Chromium: playwright's own, else the system's. Skips the test where there is none."""
    own = Path(playwright.chromium.executable_path)
    found = str(own) if own.exists() else next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        pytest.skip("no Chromium here: `playwright install chromium`, or `apt-get install chromium`")
    return found


def test_the_page_shows_the_runs_numbers(tmp_path, capsys):
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    with made(tmp_path), api.sync_playwright() as playwright:
        # Chromium has no sandbox for root, which is who runs tests in a container.
        browser = playwright.chromium.launch(executable_path=find_browser(playwright), args=["--no-sandbox"])
        call("report", "lamp", "lamp-sparsegpt", "--out", "out", "--prompt", "The quick", "--text-tokens", 4)
        capsys.readouterr()
        call("status", "lamp", "--json")
        state = json.loads(capsys.readouterr().out)

        tab = browser.new_page()
        complaints: list[str] = []
        requests: list[str] = []
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto((tmp_path / "out/index.html").as_uri())

        assert complaints == []
        assert [url for url in requests if not url.startswith("data:")] == [(tmp_path / "out/index.html").as_uri()]
        widths = tab.eval_on_selector_all("img", "all => all.map(image => image.naturalWidth)")
        assert len(widths) == len(list((tmp_path / "out/figures").glob("*.png")))
        assert all(width > 1000 for width in widths)

        rows = tab.locator("#results tbody tr")
        cells = [rows.nth(number).locator("td").all_inner_texts() for number in range(rows.count())]
        assert [row[:2] for row in cells] == [["lamp", "LAMP 60%"], ["lamp-sparsegpt", "SparseGPT 60%"], ["m", "dense"]]
        pruned, dense = (
            next(f"{e['perplexity']:,.2f}" for e in state["evaluations"] if e["which"] == which)
            for which in ("pruned", "dense")
        )
        assert cells[0][2] == pruned
        assert cells[2][2].split("\n")[0] == dense
        assert f"{100 * state['sparsity']:.4f}%" in cells[0]

        # What is folded opens, and holds the losses of each block.
        section = tab.locator("#error-lamp")
        assert not section.locator("table").is_visible()
        section.locator("summary").click()
        table = [row.split("\t") for row in section.locator("tbody tr").all_inner_texts()]
        trainings = next(block["trainings"] for block in state["blocks"] if block["block"] == 1)
        losses = next(training for training in trainings if training["name"] == "compensation")
        (row,) = (row for row in table if row[:2] == ["1", "compensation"])
        assert row[2:4] == [f"{losses[when]['trained']:.6g}" for when in ("before", "after")]

        with tab.expect_download() as download:
            tab.locator("#error-lamp figcaption a").click()
        assert Path(download.value.path()).read_text() == (tmp_path / "out/figures/lamp-error.csv").read_text()
        browser.close()
