"""The figures that the documentation quotes are those of benchmarks/results/*.json."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks import _published_page as published
from benchmarks import ecosystem, serving
from benchmarks._coverage_page import fill, summary
from benchmarks._pages import fill_marks
from benchmarks._trained_filters_page import blocks as order_tables
from gramian.tasks import IGNORED
from tests.docs.benchmark_figures import FIGURES, load, machine

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/results/benchmarks.md").read_text(encoding="utf-8")
SECTIONS = {
    section.split("\n", 1)[0]: section for section in re.split(r"^## ", PAGE, flags=re.M)[1:]
}


def rows(section: str) -> list[list[str]]:
    """The cells of a section's table, below its head."""
    lines = [line for line in SECTIONS[section].splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_every_section_is_checked() -> None:
    assert list(SECTIONS) == list(FIGURES)


@pytest.mark.parametrize("section", FIGURES)
def test_figures_and_machines_are_those_of_the_results(section: str) -> None:
    expected = []
    for file, text in FIGURES[section]:
        results = load(file) if file else {}
        expected.append([text(results), machine(results) if file else "not kept"])
    assert [row[1:] for row in rows(section)] == expected


def test_every_script_has_a_section_with_its_command() -> None:
    scripts = {path.name for path in (ROOT / "benchmarks").glob("[a-z]*.py")}
    commands = set(re.findall(r"^python benchmarks/(\S+)", PAGE, flags=re.M))
    assert commands == scripts
    for section in SECTIONS.values():
        assert "\npython benchmarks/" in section


def test_the_page_on_coverage_is_made_from_the_results() -> None:
    page = (ROOT / "docs/results/coverage.md").read_text(encoding="utf-8")
    results = load("coverage")
    assert fill(page, results) == page
    assert summary(results["rows"]) == results["summary"]


def test_the_page_on_published_results_is_made_from_the_tables() -> None:
    page = published.PAGE.read_text(encoding="utf-8")
    assert fill_marks(page, published.blocks()) == page
    for table in (table for paper in published.tables().values() for table in paper):
        widths = {len(row) for row in (*table["rows"], *table["ours"])}
        assert widths == {len(table["columns"]) + 1}, table["name"]
        # Of Gramian's values there is a file of results, or nothing.
        for cell in (cell for row in table["ours"] for cell in row[1:]):
            assert cell is None or published.measured(cell)


def test_the_tables_of_the_page_on_tools_and_of_the_guide_to_serving_are_made_from_results() -> (
    None
):
    page = (ROOT / "docs/results/ecosystem.md").read_text(encoding="utf-8")
    assert fill_marks(page, ecosystem.blocks(ecosystem.kept_rows())) == page
    guide = (ROOT / "docs/guides/serve.md").read_text(encoding="utf-8")
    table = serving.serving_table(load("serving")["rows"])
    assert fill_marks(guide, {"serving": table}) == guide


def test_the_page_on_distillation_is_made_from_the_results() -> None:
    page = (ROOT / "docs/results/distillation.md").read_text(encoding="utf-8")
    assert fill_marks(page, order_tables(load("trained_filters"))) == page


def test_the_page_on_planning_has_the_tables_of_the_results() -> None:
    pytest.importorskip("transformers")
    from benchmarks.fitted_recurrences import tables as fitted_tables
    from benchmarks.planning import tables

    page = (ROOT / "docs/results/planning.md").read_text(encoding="utf-8")
    for table in tables(load("planning")).split("\n\n")[1:]:
        assert table in page
    for table in fitted_tables(load("fitted_recurrences")).split("\n\n")[1:]:
        assert table in page


def test_the_page_on_modulation_has_the_tables_of_the_results() -> None:
    pytest.importorskip("transformers")
    from benchmarks import state_modulation

    found = load("state_modulation_twins")
    assert found["correlations"] == state_modulation.correlations(found["runs"])
    page = (ROOT / "docs/results/state_modulation.md").read_text(encoding="utf-8")
    assert fill_marks(page, state_modulation.tables(found)) == page


def test_the_page_on_hybrids_has_the_tables_of_the_results() -> None:
    pytest.importorskip("transformers")
    from benchmarks import hybrid_topology

    found = load("hybrid_topology")
    page = (ROOT / "docs/results/hybrid_topology.md").read_text(encoding="utf-8")
    assert fill_marks(page, hybrid_topology.blocks(found["runs"])) == page
    for behind, mark in hybrid_topology.BEHIND.items():
        runs = hybrid_topology.of_set(found["runs"], behind)
        assert found["correlations"][mark] == hybrid_topology.correlations(runs)


@pytest.mark.parametrize("place", [1, 3, None])
@pytest.mark.parametrize("behind", [False, True])
def test_hybrids_have_attention_at_its_place_and_a_size_for_each_layer(
    place: int | None, behind: bool
) -> None:
    pytest.importorskip("transformers")
    from benchmarks import hybrid_topology as hybrids
    from gramian.mixers import LongConvolution, SoftmaxAttention

    model = hybrids.model_of(hybrids.Setting(place, behind, 0, 0))
    mixers = [layer.mixer for layer in model.model.layers]
    assert [isinstance(mixer, LongConvolution) for mixer in mixers[:-4]] == [True] * behind
    attention = [isinstance(mixer, SoftmaxAttention) for mixer in mixers[-4:]]
    assert attention == [number == place for number in (1, 2, 3, 4)]
    x, y = hybrids.tokens(np.random.default_rng(0), 2, hybrids.PAIRS)
    assert ((y != IGNORED).sum(1) == hybrids.PAIRS).all()
    sizes = hybrids.state_sizes(model, x)
    assert len(sizes) == hybrids.LAYERS
    recurrent = [size for size, one in zip(sizes, attention, strict=True) if not one]
    assert max(recurrent) <= hybrids.STATE
    assert all(size > hybrids.STATE for size, one in zip(sizes, attention, strict=True) if one)


@pytest.mark.parametrize("name", ["ess_tasks", "ess_s6", "ess_collapse"])
def test_the_page_on_memory_in_use_has_the_tables_of_the_results(name: str) -> None:
    pytest.importorskip("transformers")
    module = importlib.import_module(f"benchmarks.{name}")
    page = (ROOT / "docs/results/ess_effects.md").read_text(encoding="utf-8")
    assert fill_marks(page, module.blocks(load(name)["runs"])) == page


@pytest.mark.parametrize("task", ["recall", "copying", "compression"])
@pytest.mark.parametrize("pairs", [4, 8])
def test_small_trainings_draw_as_many_answers_as_there_are_items(task: str, pairs: int) -> None:
    pytest.importorskip("transformers")
    from benchmarks._ess_trainings import Setting, tokens

    setting = Setting(task=task, mixer="LA", state=4, pairs=pairs, length=32, steps=0, seed=0)
    x, y = tokens(setting, np.random.default_rng(0), 16, pairs)
    assert x.shape == y.shape
    assert ((y != IGNORED).sum(1) == pairs).all()
    x, y = tokens(setting, np.random.default_rng(0), 64, 1)
    counts = (y != IGNORED).sum(1)
    assert counts.min() == (pairs if task == "compression" else 1)
    assert counts.max() == pairs


def test_the_page_on_distillation_has_the_tables_of_the_results() -> None:
    pytest.importorskip("transformers")
    from benchmarks.ess_students import TABLES

    page = (ROOT / "docs/results/ess_distillation.md").read_text(encoding="utf-8")
    cells = load("ess_students")["cells"]
    assert fill_marks(page, {name: table(cells) for name, table in TABLES.items()}) == page


def test_headline_figures_are_those_of_the_results() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    speed = load("reduction")["speed"]
    decoding = load("decoding_transformer")["batch 16, context 4096"]["ratio_to_dynamic"]
    attention = load("ess_attention")["attention"]["tokens_512"]
    error = f"{attention['largest_relative_error']:.0e}".replace("e-0", "e-")
    against_pymor = FIGURES["Reduction"][1][1](load("reduction"))
    for cell in (
        f"to order 16, with errors {against_pymor} of pyMOR's |",
        f"| **{speed['filters_per_second']:.0f} a second**, "
        f"pyMOR {speed['pymor_filters_per_second']:.2f} |",
        f"| **{decoding['hyena']:.0f} times** the tokens per second |",
        f"| **{attention['seconds']:.0f} s**, within {error} of SVDs |",
    ):
        assert cell in readme
