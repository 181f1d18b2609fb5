"""Write model cards: the README.md of a folder, which the Hugging Face Hub shows and searches."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError

from gramian._staging import staged_file
from gramian.models.adapters import is_adapter
from gramian.models.pretrained import GramianPreTrainedModel
from gramian.models.remote_code import AUTO_MAP

__all__ = ["write_card"]

CARD = "README.md"
_PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForTimeSeriesPrediction": "time-series-forecasting",
}
_INHERITED = ("license", "license_name", "license_link", "language", "datasets", "base_model")
_NAME_ON_HUB = re.compile(r"[\w.-]+/[\w.-]+")


def write_card(
    folder: str | Path,
    model: Any,
    about: str,
    results: object = "",
    *,
    base: str | Path | None = None,
    name: str | None = None,
) -> None:
    """Write the model card of a saved model, so that the folder is ready for the Hub.

    The card says how the model was made and how it is loaded. The license, the languages, the data
    sets and the base model are those in the card of the model from which it was made, if this model
    has a card.

    Args:
        folder: folder of the saved model. Its README.md is replaced.
        model: the model in the folder.
        about: sentences on how the model was made, in Markdown.
        results: the numbers of the model; a printed report, for example.
        base: folder, or name on the Hub, of the model from which the model was made.
        name: title of the card; by default the name of the folder.
    """
    folder = Path(folder)
    name = folder.name if name is None else name
    auto, adapted = _auto_class(model), is_adapter(folder)
    metadata = ModelCardData(
        library_name="peft" if adapted else "transformers",
        pipeline_tag=_PIPELINES.get(auto or ""),
        tags=["gramian"],
        **_inherited(base),
    )
    parts = [f"# {name}", about]
    if str(results):
        parts += ["## Results", f"```text\n{results}\n```"]
    parts += ["## Use", *_use(model, auto, name, "adapters" if adapted else "models")]
    text = "\n\n".join(parts)
    with staged_file(folder / CARD) as stage:
        stage.write_text(f"---\n{metadata.to_yaml()}\n---\n\n{text}\n", encoding="utf-8")


def _auto_class(model: Any) -> str | None:
    """Return the Auto class that loads a model, or None for a class of ours that none loads."""
    if not isinstance(model, GramianPreTrainedModel):
        return "AutoModelForCausalLM"
    kind = f".{type(model).__name__}"
    return next((auto for auto, path in AUTO_MAP.items() if path.endswith(kind)), None)


def _inherited(base: str | Path | None) -> dict[str, Any]:
    """Return what the card of a model that was made from another takes from that model's card."""
    if base is None:
        return {}
    card = Path(base) / CARD
    if card.is_file():
        try:
            found = ModelCard.load(card).data.to_dict()
        except (ValueError, YAMLError):  # the head of the card cannot be read
            return {}
        return {key: found[key] for key in _INHERITED if key in found}
    is_name = isinstance(base, str) and not Path(base).exists() and _NAME_ON_HUB.fullmatch(base)
    return {"base_model": base} if is_name else {}


def _use(model: Any, auto: str | None, name: str, extra: str) -> list[str]:
    """Return paragraphs on how a model is loaded."""
    if not isinstance(model, GramianPreTrainedModel):
        return [f'```python\nmodel = transformers.{auto}.from_pretrained("{name}")\n```']
    load = [f'model = gramian.models.load_any("{name}")']
    if auto is not None:
        load = [
            f'model = transformers.{auto}.from_pretrained("{name}")',
            f'tokenizer = transformers.AutoTokenizer.from_pretrained("{name}")',
        ]
    lines = ["import gramian.models  # registers the model", "import transformers", "", *load]
    if auto is None:
        del lines[1]
    parts = [
        f'The model needs Gramian: `pip install "gramian[{extra}]"`.',
        "```python\n" + "\n".join(lines) + "\n```",
    ]
    if auto is not None:
        parts.append(
            "A program that does not import Gramian itself passes `trust_remote_code=True` to both."
        )
    return parts
