"""Figures and the page of state-sizes hold what the report holds."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

from matplotlib.image import imread

from gramian.analysis import LayerState, StateReport
from gramian.reports import (
    plot_state_comparison,
    plot_state_curves,
    plot_state_map,
    plot_utilization,
    save_figure,
    save_state_page,
    state_page,
)

HORIZON = 24
TOKENS = tuple(["</script>", "<b>", "$x$", "\n", "é", '"'] * 4)


def make(model: str = "a model", layers: int = 3, every: int = 2) -> StateReport:
    generator = torch.Generator().manual_seed(layers)
    positions = tuple(range(0, HORIZON, every))
    i = torch.tensor(positions).float()
    made = []
    for k in range(layers):
        attention = k % 2 == 0
        ess = torch.rand(2 + k, len(i), generator=generator) * torch.minimum(i, HORIZON - i)
        tss = i.expand_as(ess) if attention else torch.full_like(ess, 8.0)
        kind = "attention" if attention else "recurrence"
        made.append(
            LayerState(f"m.{k}.mix", "Mix", kind, tuple(range(2 + k)), 2 + k, ess, tss.clone())
        )
    unread = (("m.9.mix", "there is no reader for Odd."),)
    return StateReport(model, tuple(made), positions, TOKENS, "entropy", None, None, unread, 1.0)


def test_the_map_shows_every_layer_and_veils_where_the_cap_binds() -> None:
    report = make()
    image, veil = plot_state_map(report).axes[0].images
    np.testing.assert_allclose(np.asarray(image.get_array()), report.layer_curves())
    opaque = np.asarray(veil.get_array())[..., 3] > 0
    for row, layer in zip(opaque, report.layers, strict=True):
        for p, i in enumerate(report.positions):
            there = i if layer.kind == "attention" else 8
            assert row[p] == (min(i, HORIZON - i) < there)


def test_labels_leave_out_what_all_paths_share() -> None:
    assert make().labels == ("0", "1", "2")
    assert make(layers=1).labels == ("0",)


def test_curves_are_layers_their_average_and_the_cap() -> None:
    report = make()
    lines = plot_state_curves(report).axes[0].lines
    drawn = [np.asarray(line.get_ydata(), dtype=float) for line in lines]
    for k, curve in enumerate(report.layer_curves()):
        np.testing.assert_allclose(drawn[2 * k], curve)
    np.testing.assert_allclose(drawn[-2], report.average(over_positions=False))
    np.testing.assert_allclose(drawn[-1], report.cap)


def test_utilization_is_taken_where_the_cap_does_not_bind() -> None:
    report = make()
    bars = plot_utilization(report).axes[0].patches
    for bar, layer in zip(bars, report.layers, strict=True):
        there = layer.tss[0].numpy()
        free = (report.cap.numpy() >= there) & (there > 0)
        share = (layer.ess.numpy() / np.maximum(there, 1e-9))[:, free]
        assert bar.get_width() == pytest.approx(100 * share.mean(), rel=1e-5)


def test_models_are_compared_on_one_text() -> None:
    reports = {"one": make(), "two": make("b", 2)}
    figure = plot_state_comparison(reports)
    for axes, over in zip(figure.axes, ("average", "total"), strict=True):
        for line, report in zip(axes.lines, reports.values(), strict=True):
            expected = getattr(report, over)(over_positions=False)
            np.testing.assert_allclose(np.asarray(line.get_ydata(), dtype=float), expected)
    with pytest.raises(ValueError, match="no reports"):
        plot_state_comparison({})


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_pictures_are_files(tmp_path: Path, suffix: str) -> None:
    for plot in (plot_state_map, plot_state_curves, plot_utilization):
        path = save_figure(plot(make()), tmp_path / f"{plot.__name__}{suffix}")
        if suffix == ".png":
            assert imread(path).std() > 0
        else:
            assert "<svg" in path.read_text()


class Page(HTMLParser):
    """Elements, their attributes, and what scripts hold."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in ("meta", "link", "br", "img", "input"):
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data


def test_the_page_parses_and_refers_to_nothing_outside() -> None:
    text = state_page([make("<i>&"), make("other", 2)])
    page = Page(text)
    assert not page.open
    names = {name for _, name, _ in page.attributes}
    assert not names & {"src", "href", "srcset", "action", "data", "poster"}
    program = page.scripts[1]
    for outside in ("http:", "https:", "//cdn", "import ", "fetch(", "XMLHttp", "url(", "@import"):
        assert outside not in text.replace(page.scripts[0], ""), outside
    assert "@@" not in text and "innerHTML" not in program
    assert "&lt;i&gt;&amp;" in text


def test_the_page_holds_the_numbers() -> None:
    reports = [make(), make("other", 2)]
    data = json.loads(Page(state_page(reports)).scripts[0])
    for held, report in zip(data, reports, strict=True):
        assert held["model"] == report.model and held["tokens"] == list(TOKENS)
        assert held["positions"] == list(report.positions)
        for layer, original in zip(held["layers"], report.layers, strict=True):
            np.testing.assert_allclose(layer["ess"], original.ess, atol=5e-4)
            np.testing.assert_allclose(layer["tss"], original.tss, atol=5e-4)
    with pytest.raises(ValueError, match="no reports"):
        state_page([])


_BROWSER = r"""
const fs = require("fs"), vm = require("vm");
const text = fs.readFileSync(process.argv[2], "utf8");
const scripts = [...text.matchAll(/<script[^>]*>([\s\S]*?)<\/script>/g)].map(m => m[1]);
const made = {}, calls = { fillRect: 0, fillText: [] };
const pen = new Proxy({}, { get: (_, name) => name === "fillRect" ? () => { calls.fillRect++; }
  : name === "fillText" ? t => { calls.fillText.push(t); } : () => {}, set: () => true });
function element(id) {
  const children = [];
  let content = "";
  return { id, children, style: {}, dataset: {}, value: id === "value" ? "ess" : "0",
    clientWidth: 1150, offsetWidth: 10, offsetHeight: 10,
    get textContent() { return content; }, set textContent(t) { content = t; children.length = 0; },
    appendChild(c) { children.push(c); }, querySelectorAll: () => children, getContext: () => pen,
    classList: { toggle() {} }, getBoundingClientRect: () => ({ left: 0, top: 0 }) };
}
const document = { getElementById: id => made[id] ||= element(id), createElement: t => element(t) };
document.getElementById("data").textContent = scripts[0];
const window = { devicePixelRatio: 1, innerWidth: 1200, innerHeight: 800 };
vm.runInNewContext(scripts[1], { document, window, JSON, Math, Map, String, Number });
const spans = made.text.children.map(s => s.textContent);
const move = { clientX: 150 + 1000 / 12 * 5.5, clientY: 2 };
made.heads.onmousemove(move);
const hover = made.tip.textContent, visible = made.tip.style.display;
made.heads.onmouseleave();
made.layers.onclick({ clientX: 400, clientY: 20 });
const clicked = made.headsTitle.textContent;
made.value.value = "use"; made.value.onchange();
made.model.value = "1"; made.model.onchange();
process.stdout.write(JSON.stringify({ title: made.title.textContent, rects: calls.fillRect, spans,
  hover, visible, hidden: made.tip.style.display, clicked, unread: made.unread.children.length,
  layers: made.layer.children.length }));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="node runs the page's program")
def test_the_pages_program_runs(tmp_path: Path) -> None:
    reports = [make(), make("other", 2)]
    path = save_state_page(reports, tmp_path / "page.html")
    (tmp_path / "browser.js").write_text(_BROWSER)
    done = subprocess.run(
        ["node", str(tmp_path / "browser.js"), str(path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["title"].endswith("other") and seen["layers"] == 2 and seen["unread"] == 1
    assert seen["spans"] == list(TOKENS) and seen["rects"] > 100
    first = reports[0].layers[0]
    assert seen["visible"] == "block" and seen["hidden"] == "none"
    assert f"ESS {float(first.ess[0, 5]):.3f}" in seen["hover"]
    assert "position 10," in seen["hover"] and "head or channel 0" in seen["hover"]
    assert (
        "layer m.0.mix" in seen["hover"]
        and json.dumps(TOKENS[10], ensure_ascii=False) in seen["hover"]
    )
    assert re.match(r"m\.1\.mix \(Mix\): 3 of 3", seen["clicked"])
