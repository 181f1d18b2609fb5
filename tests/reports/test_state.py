"""Figures and the page of state-sizes hold what the report holds."""

import base64
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread
from matplotlib.text import Text

from gramian.analysis import LayerState, StateReport, compare_reports
from gramian.reports import (
    plot_depth_comparison,
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


def test_the_map_of_sizes_veils_where_the_cap_binds() -> None:
    report = make()
    image, veil = plot_state_map(report, "ess").axes[0].images
    np.testing.assert_allclose(np.asarray(image.get_array()), report.layer_curves())
    opaque = np.asarray(veil.get_array())[..., 3] > 0
    for row, layer in zip(opaque, report.layers, strict=True):
        for p, i in enumerate(report.positions):
            there = i if layer.kind == "attention" else 8
            assert row[p] == (min(i, HORIZON - i) < there)


def test_the_map_of_changes_divides_by_both_sides() -> None:
    report = make(every=1)
    (image,) = plot_state_map(report).axes[0].images
    drawn = np.ma.getdata(image.get_array())
    curves = report.layer_curves().numpy()
    for row, curve in zip(drawn, curves, strict=True):
        assert np.isnan(row[[0, -1]]).all()
        for p in range(1, HORIZON - 1):
            reach = min(8, p, HORIZON - 1 - p)
            near = [curve[p + sign * d] for d in range(1, reach + 1) for sign in (-1, 1)]
            assert row[p] == pytest.approx(curve[p] / (sum(near) / len(near)))
    ramp = torch.arange(float(HORIZON)).expand(1, -1).clone()
    straight = LayerState("m", "Mix", "attention", (0,), 1, ramp, ramp)
    flat = replace(report, layers=(straight,))
    (image,) = plot_state_map(flat).axes[0].images
    np.testing.assert_allclose(np.ma.getdata(image.get_array())[0, 1:-1], 1)
    with pytest.raises(ValueError, match="change, in_use, ess or None; got 'tss'"):
        plot_state_map(report, "tss")


def test_the_map_of_shares_leaves_out_heads_without_a_usable_state() -> None:
    report = make()
    (image,) = plot_state_map(report, "in_use").axes[0].images
    drawn = np.ma.getdata(image.get_array())
    for row, layer in zip(drawn, report.layers, strict=True):
        for p, i in enumerate(report.positions):
            shares = [
                float(ess[p]) / min(float(tss[p]), i, HORIZON - i)
                for ess, tss in zip(layer.ess, layer.tss, strict=True)
                if min(float(tss[p]), i, HORIZON - i) > 0
            ]
            assert (
                np.isnan(row[p])
                if not shares
                else row[p] == pytest.approx(100 * sum(shares) / len(shares))
            )
    few = make(every=12)
    assert few.positions == (0, 12)
    assert "share" in plot_state_map(few).axes[0].get_title("left")


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


def test_bars_are_the_shares_in_use() -> None:
    report = make()
    axes = plot_utilization(report).axes[0]
    for bar, line, layer in zip(axes.patches, axes.lines, report.layers, strict=True):
        assert bar.get_width() == pytest.approx(100 * layer.in_use)
        heads = [
            100 * replace(report, layers=(one_head(layer, h),)).layers[0].in_use
            for h in range(len(layer.channels))
        ]
        assert list(line.get_xdata()) == pytest.approx([min(heads), max(heads)])


def one_head(layer: LayerState, h: int) -> LayerState:
    return replace(
        layer, channels=(h,), ess=layer.ess[h : h + 1], tss=layer.tss[h : h + 1], error=None
    )


@pytest.mark.parametrize("seed", range(3))
def test_every_place_gives_the_same_share_in_use(seed: int, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    report = make(layers=2 + seed, every=1 + seed)
    shares = [layer.in_use for layer in report.layers]
    values = json.loads(report.to_json())
    assert [layer["in_use"] for layer in values["layers"]] == shares
    ranked = {one["name"]: one["in_use"] for one in values["ranking"]}
    assert [ranked[layer.name] for layer in report.layers] == shares
    (page,) = json.loads(Page(state_page(report)).scripts[0])
    assert [layer["in_use"] for layer in page["layers"]] == shares
    assert {one["layer"]: one["in_use"] for one in page["ranking"]} == dict(enumerate(shares))
    frame = pandas.read_csv(report.to_csv(tmp_path / "states.csv"))
    by_layer = [frame[frame.layer == layer.name].in_use.mean() for layer in report.layers]
    assert by_layer == pytest.approx(shares, rel=1e-6)
    assert list(report.to_frame("layer").in_use) == shares
    bars = [bar.get_width() for bar in plot_utilization(report).axes[0].patches]
    assert bars == pytest.approx([100 * share for share in shares])
    rows = str(report).splitlines()[1 : 1 + len(shares)]
    assert [row.split("\t")[-1] for row in rows] == [f"{100 * share:.1f} %" for share in shares]
    compared = compare_reports([replace(report, unread=())] * 2)
    assert compared.in_use[0].tolist() == pytest.approx(shares)
    assert report.in_use == page["in_use"] == values["in_use"] == pytest.approx(np.mean(shares))


def test_models_are_compared_on_one_text() -> None:
    reports = {"one": make(), "two": make("b", 2)}
    figure = plot_state_comparison(reports)
    for axes, over in zip(figure.axes, ("average", "total"), strict=True):
        for line, report in zip(axes.lines, reports.values(), strict=True):
            expected = getattr(report, over)(over_positions=False)
            np.testing.assert_allclose(np.asarray(line.get_ydata(), dtype=float), expected)
    with pytest.raises(ValueError, match="no reports"):
        plot_state_comparison({})


def test_models_are_compared_over_depth() -> None:
    reports = [replace(report, unread=()) for report in (make(), make("b", 2))]
    comparison = compare_reports(reports, ["one", "two $x$"])
    figure = plot_depth_comparison(comparison)
    for line, report in zip(figure.axes[0].lines, reports, strict=True):
        sizes = [float(layer.ess.double().mean()) for layer in report.layers]
        np.testing.assert_allclose(line.get_ydata(), [*sizes, sizes[-1]])
        np.testing.assert_allclose(line.get_xdata(), np.linspace(0, 100, len(sizes) + 1))
    for line, report in zip(figure.axes[1].lines, reports, strict=True):
        np.testing.assert_allclose(
            line.get_ydata()[:-1], [100 * one.in_use for one in report.layers]
        )


LONG = "/a/path/of/checkpoints/" + "with_many_words_in_it/" * 9 + "W" * 150 + " $x$ 模型"


@pytest.mark.parametrize(
    "plot",
    [
        plot_state_map,
        lambda report: plot_state_map(report, "in_use"),
        lambda report: plot_state_map(report, "ess"),
        plot_state_curves,
        plot_utilization,
        lambda report: plot_state_comparison({LONG: report, "b": make("b")}),
        lambda report: plot_depth_comparison(compare_reports([report, make("b", 2)])),
    ],
    ids=["map", "map of shares", "map of sizes", "curves", "bars", "comparison", "depth"],
)
@pytest.mark.filterwarnings("ignore:Glyph")
def test_titles_and_legends_are_inside_and_cover_no_line(plot) -> None:  # type: ignore[no-untyped-def]
    figure = plot(make(LONG))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    whole = figure.bbox
    legends = [*figure.legends, *(a.get_legend() for a in figure.axes if a.get_legend())]
    texts = [*figure.texts, *(axes._left_title for axes in figure.axes), *legends]
    if figure._suptitle is not None:
        texts.append(figure._suptitle)
    for artist in texts:
        box = artist.get_window_extent(renderer)
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1
        assert whole.y0 - 1 <= box.y0 and box.y1 <= whole.y1 + 1
    for legend in legends:
        for axes in figure.axes:
            assert not legend.get_window_extent(renderer).overlaps(axes.get_window_extent())
    said = "".join(text.get_text() for text in figure.findobj(Text))
    assert "".join(LONG.split()) in "".join(said.split()).replace("\\$", "$")


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


def unpacked(packed: dict[str, Any], width: int) -> np.ndarray:
    """The rows of numbers that the page's program reads."""
    steps = np.frombuffer(base64.b64decode(packed["data"]), "<u2").reshape(-1, width)
    return steps * np.array(packed["units"])[:, None]


def test_the_page_holds_the_numbers() -> None:
    first = make()
    estimated = replace(first.layers[1], error=0.1 * first.layers[1].ess)
    reports = [replace(first, layers=(first.layers[0], estimated)), make("other", 2)]
    data = json.loads(Page(state_page(reports)).scripts[0])
    for held, report in zip(data, reports, strict=True):
        assert held["model"] == report.model and held["tokens"] == list(TOKENS)
        assert held["positions"] == list(report.positions)
        width = len(report.positions)
        for layer, original in zip(held["layers"], report.layers, strict=True):
            np.testing.assert_allclose(unpacked(layer["ess"], width), original.ess, atol=1e-4)
            rows = unpacked(layer["tss"], width)
            np.testing.assert_array_equal(rows[layer["tss_row"]], original.tss)
            if original.error is None:
                assert layer["error"] is None
            else:
                found = unpacked(layer["error"], width)
                np.testing.assert_allclose(found, original.error, atol=1e-4)
    with pytest.raises(ValueError, match="no reports"):
        state_page([])


def test_a_page_of_thirty_layers_and_a_thousand_tokens_is_small() -> None:
    generator = torch.Generator().manual_seed(0)
    positions = torch.arange(1024).float()
    cap = torch.minimum(positions, 1024 - positions)
    layers = []
    for k in range(30):
        ess = cap * torch.rand(9, 1024, generator=generator)
        tss = positions.expand(9, -1).clone()
        error = torch.rand(9, 1024, generator=generator)
        layers.append(
            LayerState(f"m.{k}", "Mix", "attention", (*range(9),), 9, ess, tss, "attention", error)
        )
    tokens = tuple(f" token{k}" for k in range(1024))
    report = StateReport(
        "m", tuple(layers), (*range(1024),), tokens, "entropy", None, None, (), 0.1
    )
    assert len(state_page(report).encode()) < 5e6


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
  return { id, children, style: {}, value: id === "value" ? "change" : "0",
    clientWidth: 1150, offsetWidth: 10, offsetHeight: 10,
    get textContent() { return content; }, set textContent(t) { content = t; children.length = 0; },
    appendChild(c) { children.push(c); }, querySelectorAll: () => children, getContext: () => pen,
    classList: { add() {}, remove() {} }, getBoundingClientRect: () => ({ left: 0, top: 0 }) };
}
const document = { getElementById: id => made[id] ||= element(id), createElement: t => element(t) };
document.getElementById("data").textContent = scripts[0];
const window = { devicePixelRatio: 1, innerWidth: 1200, innerHeight: 800 };
vm.runInNewContext(scripts[1], { document, window, atob });
const spans = made.text.children.map(s => s.textContent);
const move = { clientX: 150 + 1000 / 12 * 5.5, clientY: 2 };
made.heads.onmousemove(move);
const hover = made.tip.textContent, visible = made.tip.style.display;
made.heads.onmouseleave();
made.layers.onclick({ clientX: 400, clientY: 20 });
const clicked = made.headsTitle.textContent;
for (const value of ["use", "ess", "change"]) { made.value.value = value; made.value.onchange(); }
const ranked = made.ranking.children.map(row => row.children.map(cell => cell.textContent));
made.ranking.children[0].onclick();
const first = made.headsTitle.textContent;
made.model.value = "1"; made.model.onchange();
process.stdout.write(JSON.stringify({ title: made.title.textContent, rects: calls.fillRect, spans,
  hover, visible, hidden: made.tip.style.display, clicked, ranked, first,
  unread: made.unread.children.length, layers: made.layer.children.length }));
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
    share = f"{100 * reports[0].layers[1].in_use:.1f} % in use"
    assert seen["clicked"].endswith(share)
    ranking = list(reports[0].ranking())
    assert seen["ranked"] == [
        [one.label, f"{100 * one.in_use:.1f} %", one.suggestion] for one in ranking
    ]
    assert seen["first"].startswith(ranking[0].name)
