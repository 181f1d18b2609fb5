"""Convert checkpoints to folders of Gramian models, layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gramian._json import to_json
from gramian._staging import staged_directory
from gramian.checkpoints._format import Progress
from gramian.checkpoints._load import choose_dtype, find_tokenizer, open_source, translated
from gramian.checkpoints.files import hash_weights
from gramian.models.cards import write_card
from gramian.models.saving import empty_model, save_parts

__all__ = ["ConversionReport", "convert"]


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` has converted.

    Attributes:
        checkpoint: the absolute path of the checkpoint.
        sha256: a mapping from the names of the checkpoint's files of weights to their SHA-256.
        format: the name of the checkpoint's format in `FORMATS`.
        model: the name of the model's class.
        layers: number of layers.
        width: size of the hidden states.
        vocabulary: size of the vocabulary.
        filter_length: number of taps of the filters.
        parameters: number of parameters.
        fp8_projections: number of layers whose projections are computed in 8-bit floating point.
        tokenizer: the name of the tokenizer's class, or None if no tokenizer is known.
    """

    checkpoint: str
    sha256: dict[str, str]
    format: str
    model: str
    layers: int
    width: int
    vocabulary: int
    filter_length: int
    parameters: int
    fp8_projections: int
    tokenizer: str | None

    @property
    def summary(self) -> str:
        """The report in one or two sentences."""
        text = (
            f"{self.format}: {self.layers} layers of width {self.width:,}, "
            f"{self.parameters:,} parameters, filters of {self.filter_length:,} taps; "
            f"{self.tokenizer or 'no tokenizer'}."
        )
        if self.fp8_projections:
            text += (
                f" The projections of {self.fp8_projections} layers are computed in emulated FP8, "
                "with the scales of the checkpoint."
            )
        return text

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by name."""
        return dataclasses.asdict(self)


def convert(
    path: str | Path,
    folder: str | Path,
    *,
    config: Mapping[str, Any] | str | Path | None = None,
    format: str | None = None,
    dtype: torch.dtype | None = None,
    fp8: bool | None = None,
    max_shard_size: int | str = "5GB",
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert a published checkpoint to a new folder with a Gramian model and its tokenizer.

    The folder is the one that `save_pretrained` would write for the model of `load`. But no model
    is built. The tensors of one layer are read, translated and written, and then those of the next
    one. So the memory that is needed is that of the largest layer, or of the embedding and the
    output projection, and a checkpoint may be much larger than the memory. It may consist of one
    file, several, or a file in parts. PyTorch 2.6 maps pickled files, which then must be smaller
    than the memory. The folder also contains `conversion.json`, which holds the
    report, and a model card. If an error is raised, there is no folder.

    Args:
        path: a checkpoint file, or a folder that holds a checkpoint.
        folder: the new folder.
        config: the checkpoint's configuration, as for `load`.
        format: name of the format, as for `load`.
        dtype: dtype of the weights, as for `load`.
        fp8: whether projections are computed in 8-bit floating point, as for `load`.
        max_shard_size: largest size of a file of weights, in bytes or as text such as "5GB".
        progress: a function that is called as `progress(layers done, all layers)`.

    Raises:
        FileExistsError: if the folder exists.
        FileNotFoundError, ValueError: in the same cases as `load`.
    """
    path = Path(path)
    with staged_directory(Path(folder)) as stage:
        source, weights = open_source(path, config, format, fp8)
        dtype = choose_dtype(source, weights, dtype)
        model = empty_model(source.model_class(), source.model_config(weights), dtype)
        tokenizer = find_tokenizer(source, path, model)
        save_parts(model, translated(source, weights, progress), stage, max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(stage)
        settings = model.config
        report = ConversionReport(
            checkpoint=str(path.absolute()),  # links of the Hub's cache lead to files without names
            sha256=hash_weights(path),
            format=source.name,
            model=type(model).__name__,
            layers=settings.num_hidden_layers,
            width=settings.hidden_size,
            vocabulary=settings.vocab_size,
            filter_length=settings.max_position_embeddings,
            parameters=model.num_parameters(),
            fp8_projections=sum(
                settings.mixer_config(layer).get("fp8_scales") is not None
                for layer in range(settings.num_hidden_layers)
            ),
            tokenizer=None if tokenizer is None else type(tokenizer).__name__,
        )
        write_card(
            stage,
            model,
            f"A `{report.model}` converted from the published checkpoint `{path.name}` "
            "(`gramian convert`).",
            report.summary,
            base=path,
            name=Path(folder).name,
        )
        text = to_json(report.to_dict(), indent=2) + "\n"
        (stage / "conversion.json").write_text(text, encoding="utf-8")
    return report
