"""Model cards: what the Hub reads from them, and that the code in them runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from gramian.models import (
    ByteTokenizer,
    GramianConfig,
    GramianForCausalLM,
    GramianForPairClassification,
    GramianForSequenceClassification,
    write_card,
)

MakeConfig = Callable[..., GramianConfig]


@pytest.mark.parametrize(
    ("kind", "pipeline"),
    [
        (GramianForCausalLM, "text-generation"),
        (GramianForSequenceClassification, "text-classification"),
        (GramianForPairClassification, None),
    ],
)
def test_the_hub_reads_the_card_and_its_code_runs(
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[GramianForCausalLM],
    pipeline: str | None,
) -> None:
    model = kind(make_config(vocab_size=259))
    model.save_pretrained(tmp_path / "small")
    ByteTokenizer().save_pretrained(tmp_path / "small")
    write_card(tmp_path / "small", model, "It was *made*.", "error 0.1")
    card = ModelCard.load(tmp_path / "small/README.md")
    assert card.data.library_name == "transformers" and card.data.tags == ["gramian"]
    assert card.data.pipeline_tag == pipeline
    assert "# small\n\nIt was *made*.\n\n## Results\n\n```text\nerror 0.1\n```" in card.text
    (code,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code, names)
    assert type(names["model"]) is kind


def test_a_card_takes_the_license_and_the_base_from_that_of_the_base(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    model = GramianForCausalLM(make_config())
    base, folder = tmp_path / "base", tmp_path / "made"
    for path in (base, folder):
        model.save_pretrained(path)

    def data() -> dict[str, object]:
        write_card(folder, model, "About.", base=base)
        found: dict[str, object] = ModelCard.load(folder / "README.md").data.to_dict()
        return found

    plain = data()
    assert plain.keys() == {"library_name", "pipeline_tag", "tags"}
    (base / "README.md").write_text(
        "---\nlicense: mit\nlanguage: [en]\nbase_model: a/b\ntags: [other]\n---\n# Base\n"
    )
    assert data() == plain | {"license": "mit", "language": ["en"], "base_model": "a/b"}
    (base / "README.md").write_text("---\nlicense: [\n---\n")
    assert data() == plain
    write_card(folder, model, "About.", base="owner/model", name="other")
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "owner/model" and "# other\n" in card.text
