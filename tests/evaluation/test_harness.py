"""lm-evaluation-harness on tasks from local files, of models in memory."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")
pytest.importorskip("typer")

from transformers.utils import logging

import gramian.cli
from gramian.distillation import distill
from gramian.evaluation import EvaluationReport, HarnessError, Measure, evaluate_harness
from gramian.models import ByteTokenizer, GramianConfig, GramianForCausalLM

WORDS = ["state", "order", "pole", "residue", "Hankel", "memory", "filter", "gain", "zero", "tap"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files: a choice between words, a text, and words to be written."""
    place = tmp_path_factory.mktemp("tasks")
    choices = [
        {"question": f"Spell {word}: ", "choices": [word, word[::-1] + "q"], "gold": index % 2}
        for index, word in enumerate(WORDS)
    ]
    draw = random.Random(0)
    texts = [{"text": " ".join(draw.choices(WORDS, k=3 + index))} for index in range(6)]
    for name, rows in (("choices", choices), ("texts", texts)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (place / f"{name}.jsonl").write_text(lines)
    head = "dataset_path: json\ntest_split: test\ndataset_kwargs: {data_files: {test: %s}}\n"
    (place / "choice.yaml").write_text(
        "task: local_choice\noutput_type: multiple_choice\n"
        + head % (place / "choices.jsonl")
        + 'doc_to_text: "{{question}}"\ndoc_to_choice: choices\ndoc_to_target: gold\n'
        'target_delimiter: ""\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n'
    )
    (place / "text.yaml").write_text(
        "task: local_text\noutput_type: loglikelihood_rolling\n"
        + head % (place / "texts.jsonl")
        + 'doc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list: [{metric: bits_per_byte}, {metric: byte_perplexity}]\n"
    )
    (place / "writing.yaml").write_text(
        "task: local_writing\noutput_type: generate_until\n"
        + head % (place / "choices.jsonl")
        + 'doc_to_text: "{{question}}"\ndoc_to_target: "{{choices[0]}}"\n'
        'generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}\n'
        "metric_list: [{metric: exact_match}]\n"
    )
    torch.manual_seed(0)
    model = GramianForCausalLM(
        GramianConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_heads=3,
            filter={"type": "implicit", "frequency": 1.0},
            max_position_embeddings=64,
            initializer_range=0.4,
        )
    ).eval()
    small, _ = distill(model, order=2)
    for name, one in (("original", model), ("small", small)):
        one.save_pretrained(place / "models" / name)
        ByteTokenizer().save_pretrained(place / "models" / name)
    return place


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)


def model(folder: Path, name: str) -> Any:
    return GramianForCausalLM.from_pretrained(folder / "models" / name).eval()


@torch.no_grad()
def log_likelihood(model: Any, before: str, text: str) -> float:
    """Of a text after another; after nothing, after the end mark, as the harness has it."""
    ids = list(before.encode()) or [256]
    due = list(text.encode())
    logits = model(torch.tensor([ids + due])).logits[0].double().log_softmax(-1)
    return float(sum(logits[len(ids) - 1 + i, token] for i, token in enumerate(due)))


def test_nothing_is_scored_of_a_model_of_nan(folder: Path) -> None:
    """The harness takes the first of equal answers, and NaN for equal to everything."""
    one = model(folder, "original")
    with torch.no_grad():
        one.model.norm.weight.fill_(math.nan)
    tasks = ["local_choice", "local_text"]
    measures = evaluate_harness(one, ByteTokenizer(), tasks, include_path=folder)
    names = {(measure.task, measure.metric) for measure in measures}
    assert {("local_choice", "acc"), ("local_text", "bits_per_byte")} <= names
    assert all(math.isnan(measure.value) for measure in measures)
    with pytest.raises(HarnessError, match="logits are not finite") as caught:
        evaluate_harness(one, ByteTokenizer(), ["local_writing"], include_path=folder)
    assert "\n" not in str(caught.value)


def test_scores_are_those_of_the_definitions(folder: Path) -> None:
    for name in ("original", "small"):
        one = model(folder, name)
        tasks = ["local_choice", "local_text", "local_writing"]
        measures = {
            (measure.task, measure.metric): measure
            for measure in evaluate_harness(
                one, ByteTokenizer(), tasks, include_path=folder, batch_size=3
            )
        }
        rows = [json.loads(line) for line in (folder / "choices.jsonl").open()]
        right = []
        for row in rows:
            scores = [log_likelihood(one, row["question"], word) for word in row["choices"]]
            right.append(float(scores.index(max(scores)) == row["gold"]))
        accuracy = measures["local_choice", "acc"]
        assert accuracy.value == pytest.approx(sum(right) / len(right))
        assert accuracy.units == len(right) and accuracy.higher_is_better
        assert accuracy.influence is not None and accuracy.error is not None

        bits = measures["local_text", "bits_per_byte"]
        assert bits.influence is not None and bits.error is not None
        assert bits.higher_is_better is False
        assert math.log2(measures["local_text", "byte_perplexity"].value) == pytest.approx(
            bits.value
        )
        written = []
        for row in rows:
            ids = torch.tensor([list(row["question"].encode())])
            new = one.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
            text = ByteTokenizer().decode(new, skip_special_tokens=True).split("\n")[0]
            written.append(float(text == row["choices"][0]))
        assert measures["local_writing", "exact_match"].value == sum(written) / len(written)


def test_bits_per_byte_of_short_texts(folder: Path, tmp_path: Path) -> None:
    one = model(folder, "original")
    texts = ["pole zero", "gain", "taps of a filter"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "short.jsonl").write_text(lines)
    (tmp_path / "short.yaml").write_text(
        "task: short\noutput_type: loglikelihood_rolling\ndataset_path: json\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'short.jsonl'}}}}}\n"
        'doc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list: [{metric: bits_per_byte}]\n'
    )
    (measure,) = evaluate_harness(one, ByteTokenizer(), ["short"], include_path=tmp_path)
    # The harness puts the tokenizer's mark of a beginning, or of an end, before a text.
    marks = ByteTokenizer()
    assert (marks.bos_token_id, marks.eos_token_id) == (256, 257)
    nats = -sum(log_likelihood(one, "", text) for text in texts)
    assert measure.value == pytest.approx(nats / math.log(2) / sum(map(len, texts)), rel=1e-5)
    (few,) = evaluate_harness(one, ByteTokenizer(), ["short"], include_path=tmp_path, limit=2)
    assert few.units == 2


def test_before_and_after_a_distillation(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "text.txt").write_text("poles and zeros " * 20)
    models = folder / "models"
    command = (
        f"gramian evaluate {models / 'small'} --against {models / 'original'} --task local_choice "
        f"--task local_text --include-path {folder} --text text.txt --window 32 --json --output out"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", command.split())
    capfd.readouterr()
    with pytest.raises(SystemExit, match="0"):
        gramian.cli.main()
    report = json.loads(capfd.readouterr().out)
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == report
    assert "| before | after | difference |" in (tmp_path / "out" / "evaluation.md").read_text()
    expected = [
        evaluate_harness(
            model(folder, name),
            ByteTokenizer(),
            ["local_choice", "local_text"],
            include_path=folder,
        )
        for name in ("original", "small")
    ]
    pairs = EvaluationReport("a", tuple(expected[1]), "b", tuple(expected[0])).comparisons
    found = {(one["task"], one["metric"]): one for one in report["comparisons"]}
    assert len(pairs) == 4 and len(found) == 9
    for pair in pairs:
        line = found[pair.after.task, pair.after.metric]
        assert line["before"] == pytest.approx(pair.before.value, rel=1e-6)
        assert line["after"] == pytest.approx(pair.after.value, rel=1e-6)
        assert line["error"] == pytest.approx(pair.error, rel=1e-4, abs=1e-9)
    bits = found["local_text", "bits_per_byte"]
    assert bits["difference"] != 0 and bits["error"] > 0


def test_long_texts_are_not_said_to_end_in_errors(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = ByteTokenizer(model_max_length=4)
    logging.set_verbosity_warning()
    logging.add_handler(caplog.handler)
    evaluate_harness(
        model(folder, "small"), tokenizer, ["local_text"], include_path=folder, limit=1
    )
    assert "indexing errors" not in caplog.text
    tokenizer.deprecation_warnings.clear()
    tokenizer("a long text")
    logging.remove_handler(caplog.handler)
    assert "indexing errors" in caplog.text


@pytest.mark.slow  # the harness reads its thousands of task files to know their names
def test_unknown_tasks_are_told_with_the_nearest(folder: Path) -> None:
    with pytest.raises(HarnessError, match=r"'local_choise'.*Did you mean 'local_choice'"):
        evaluate_harness(
            model(folder, "small"), ByteTokenizer(), ["local_choise"], include_path=folder
        )


def test_the_harness_is_imported_when_it_is_used() -> None:
    program = (
        "import sys, gramian.evaluation, gramian.cli\n"
        "print('lm_eval' in sys.modules, 'accelerate' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_values_without_documents_keep_the_harness_errors() -> None:
    from gramian.evaluation._harness import _measure

    plain = Measure("group", "acc", 0.5, 0.01, 0, True)
    assert _measure("group", "acc", 0.5, 0.01, True, []) == plain
    other = _measure("task", "f1", 0.7, 0.02, True, [0.0, 1.0])  # no mean of these
    assert other.influence is None and (other.value, other.error) == (0.7, 0.02)
