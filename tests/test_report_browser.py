"""The report in a real browser, headless Chromium: sorting, filtering, tooltips by key, the way from a point to its cells, a phone's width, both
colour schemes, and nothing on the console. Left out where there is no Chromium."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from report_cells import GRID, write_experiment

from pipeline import report
from pipeline.cell import grid

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")]
PROBE = """
<script>
window.addEventListener("load", () => {
  const found = {errors: window.seen}, body = document.getElementById("comparison").tBodies[0];
  const names = () => [...body.rows].filter((row) => !row.hidden).map((row) => row.cells[0].dataset.value);
  found.start = names();
  const heads = [...document.querySelectorAll("#comparison thead tr:last-child th")];
  const memory = heads.find((head) => head.textContent.startsWith("Peak"));
  memory.querySelector("button").click();
  found.sorted = names(); found.order = memory.getAttribute("aria-sort");
  const filter = document.getElementById("filter");
  filter.value = "reparam fp32"; filter.dispatchEvent(new Event("input"));
  found.filtered = names(); found.shown = document.getElementById("shown").textContent;
  filter.value = ""; filter.dispatchEvent(new Event("input"));
  found.whole = names().length;
  const point = document.querySelector(".charts svg.vega a [data-tip]"), tip = document.getElementById("tip");
  point.focus(); point.dispatchEvent(new FocusEvent("focusin", {bubbles: true}));
  found.tip = tip.hidden ? null : tip.textContent; found.label = point.getAttribute("aria-label"); found.tabbed = point.tabIndex >= 0;
  document.dispatchEvent(new KeyboardEvent("keydown", {key: "Escape"}));
  found.escaped = tip.hidden;
  const link = document.querySelector("#comparison tbody th a");
  link.click();
  window.dispatchEvent(new HashChangeEvent("hashchange"));
  found.opened = document.getElementById(link.getAttribute("href").slice(1)).open;
  found.width = [document.documentElement.scrollWidth, document.documentElement.clientWidth];
  found.page = getComputedStyle(document.body).backgroundColor || getComputedStyle(document.documentElement).backgroundColor;
  found.ink = getComputedStyle(document.querySelector("h1")).color;
  document.title = "FOUND" + JSON.stringify(found) + "END";
});
</script>
"""
EARLY = "<script>window.seen = []; window.addEventListener('error', (e) => seen.push(String(e.message))); console.error = (t) => seen.push(String(t));</script>"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:  # before `undrawn`, which is a test's: charts are rendered
    home = tmp_path_factory.mktemp("home")
    (home / "experiments" / "quick").mkdir(parents=True)
    (home / "experiments" / "quick" / "params.yaml").write_text(yaml.safe_dump({"experiment": "quick", "grid": GRID}))
    write_experiment(home / "results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "experiments", lambda: home / "experiments")
        assert report.main(["experiments=quick", f"paths.results={home}/results", f"paths.report={home}/report"]) == 0
    return (home / "report" / "quick" / "index.html").read_text()


def seen(page: str, folder: Path, width: int, dark: bool) -> dict[str, Any]:
    """What the probe found on the page, shown in a frame of this width (Chromium's window is never narrower than 500)."""
    (folder / "page.html").write_text(page.replace("<style>", f"{EARLY}<style>", 1).replace("</body>", f"{PROBE}</body>"))
    inner = f"<iframe id=f src=page.html style='border:0;width:{width}px;height:900px'></iframe>"
    late = "<script>onload = () => setTimeout(() => document.title = document.getElementById('f').contentDocument.title, 200)</script>"
    (folder / "frame.html").write_text(f"<body style='margin:0'>{inner}{late}")
    assert CHROMIUM
    done = subprocess.run([
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--allow-file-access-from-files", f"--user-data-dir={folder}/profile",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--window-size={max(600, width)},900", "--virtual-time-budget=4000", "--dump-dom",
        f"file://{folder}/frame.html",
    ], capture_output=True, text=True, timeout=120)
    actual = re.search(r"FOUND(.*?)END", done.stdout, re.S)
    assert actual, done.stdout[:500] + done.stderr[-500:]
    return json.loads(actual[1].replace("&quot;", '"').replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_the_page_does_what_it_should(page: str, tmp_path: Path, width: int, dark: bool) -> None:
    actual = seen(page, tmp_path, width, dark)
    assert actual["errors"] == []
    assert actual["order"] == "descending" and sorted(actual["sorted"]) == sorted(actual["start"]) and actual["sorted"] != actual["start"]
    assert set(actual["filtered"]) < set(actual["start"]) and "lora" in actual["filtered"]
    assert actual["shown"] == f"{len(actual['filtered'])} of {len(actual['start'])}" and actual["whole"] == len(actual["start"])
    assert actual["tip"] and actual["label"] == actual["tip"].replace("\n", ", ") and actual["tabbed"] and actual["escaped"]
    assert actual["opened"] is True
    assert actual["width"][0] <= actual["width"][1], "nothing reaches beyond the page"
    bright = [sum(map(int, re.findall(r"\d+", actual[part])[:3])) for part in ("page", "ink")]
    assert (bright[0] < bright[1]) is dark
