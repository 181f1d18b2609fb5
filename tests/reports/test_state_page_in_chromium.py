"""The page of state-sizes in a real browser: drawn, hovered and clicked, without a network."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from gramian.analysis import LayerState, StateReport
from gramian.reports import save_state_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
POSITIONS = tuple(range(0, 16, 2))
TOKENS = tuple(["</script>", "<b>", "\n", "é"] * 4)

# Appended to the page: it moves the pointer as a user would and notes what is on the screen.
_PROBE = r"""
<pre id="seen"></pre>
<script>
"use strict";
{
const failures = [];
window.onerror = message => { failures.push(String(message)); };
function send(target, kind, x, y) {
  const event = new MouseEvent(kind, { clientX: x, clientY: y, bubbles: true, view: window });
  target.dispatchEvent(event);
}
function place(id, across, down) {
  const box = document.getElementById(id).getBoundingClientRect();
  return [box.left + 150 + (box.width - 150) * across, box.top + down];
}
function colours(id) {
  const canvas = document.getElementById(id);
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  const found = new Set();
  for (let k = 0; k < pixels.length; k += 4) found.add(pixels.slice(k, k + 3).join());
  return found.size;
}
const tip = document.getElementById("tip"), shown = () => getComputedStyle(tip).display;
const canvases = ["layers", "heads", "curves", "layersScale", "headsScale", "textScale"];
const seen = { colours: canvases.map(colours) };
const heads = document.getElementById("heads");
send(heads, "mousemove", ...place("heads", 5.5 / 8, 4));
seen.heads = tip.textContent; seen.during = shown();
seen.inside = [tip.getBoundingClientRect().right <= window.innerWidth,
  tip.getBoundingClientRect().left >= 0];
send(heads, "mouseleave", 0, 0);
seen.after = shown();
send(document.getElementById("curves"), "mousemove", ...place("curves", 0.5, 50));
seen.curves = tip.textContent;
const token = document.querySelectorAll("#text span")[6];
send(token, "mousemove", 10, 10);
seen.token = tip.textContent;
seen.marked = [...document.querySelectorAll("#text span.near")].map(span => span.textContent);
seen.text = [...document.querySelectorAll("#text span")].map(span => span.textContent);
send(document.getElementById("layers"), "click", ...place("layers", 0.5, 27));
seen.clicked = document.getElementById("headsTitle").textContent;
const value = document.getElementById("value");
value.value = "use"; value.dispatchEvent(new Event("change"));
send(heads, "mousemove", ...place("heads", 5.5 / 8, 4));
seen.second = tip.textContent;
const model = document.getElementById("model");
model.value = "1"; model.dispatchEvent(new Event("change"));
seen.title = document.getElementById("title").textContent;
seen.requests = performance.getEntriesByType("resource").map(entry => entry.name);
seen.failures = failures;
document.getElementById("seen").textContent = JSON.stringify(seen);
}
</script>
"""


def make(model: str) -> StateReport:
    generator = torch.Generator().manual_seed(len(model))
    layers = []
    for k in range(2):
        ess = 8 * torch.rand(2 + k, len(POSITIONS), generator=generator)
        tss = torch.full_like(ess, 8.0)
        channels = tuple(range(2 + k))
        layers.append(LayerState(f"m.{k}.mix", "Mix", "recurrence", channels, 2 + k, ess, tss))
    return StateReport(model, tuple(layers), POSITIONS, TOKENS, "entropy", None, None, (), 1.0)


class Seen(HTMLParser):
    """What the probe wrote."""

    inside = False
    text = ""

    def handle_starttag(self, tag, attrs) -> None:
        self.inside = tag == "pre" and ("id", "seen") in attrs

    def handle_data(self, data) -> None:
        if self.inside:
            self.text += data
            self.inside = False


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_hovering_tells_token_layer_head_and_values(tmp_path: Path) -> None:
    reports = [make("first"), make("the other")]
    page = save_state_page(reports, tmp_path / "page.html")
    page.write_text(page.read_text().replace("</body>", _PROBE + "</body>"))
    assert CHROMIUM is not None
    options = "--headless --no-sandbox --disable-gpu --no-first-run --disable-sync --disable-quic"
    options += " --disable-background-networking --disable-component-update --dump-dom"
    done = subprocess.run(
        [
            CHROMIUM,
            *options.split(),
            "--host-resolver-rules=MAP * ~NOTFOUND",  # no name resolves: the page is offline
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1200,900",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    parser = Seen()
    parser.feed(done.stdout)
    seen = json.loads(parser.text)
    assert seen["failures"] == [] and seen["requests"] == []
    assert min(seen["colours"]) > 5
    first, second = reports[0].layers
    assert seen["during"] == "block" and seen["after"] == "none" and all(seen["inside"])
    for words in (
        f"position 10, before token {json.dumps(TOKENS[10], ensure_ascii=False)}",
        "layer m.0.mix, head or channel 0",
        f"ESS {float(first.ess[0, 5]):.3f}   TSS 8.0",
    ):
        assert words in seen["heads"]
    assert "mean" in seen["curves"]
    assert f"ESS {float(first.ess[:, 3].mean()):.3f}" in seen["token"]
    assert seen["text"] == list(TOKENS) and seen["marked"] == [TOKENS[6]]
    assert re.match(r"m\.1\.mix \(Mix\): 3 of 3", seen["clicked"])
    assert f"ESS {float(second.ess[0, 5]):.3f}" in seen["second"]
    assert seen["title"].endswith("the other")
