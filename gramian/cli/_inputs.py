"""Read and check the inputs of commands: models, texts, tasks and numbers."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from gramian.cli._app import UserError, one_line

if TYPE_CHECKING:
    from torch import Tensor

    from gramian.models import GramianForCausalLM, GramianPreTrainedModel
    from gramian.tasks import Document, Task

__all__ = [
    "SAVE_TOKENIZER",
    "byte_tokenizer",
    "check_models",
    "check_new",
    "check_shard_size",
    "check_tolerance",
    "document_ids",
    "find_tasks",
    "first_windows",
    "fraction",
    "load_any_model",
    "load_model",
    "load_tokenizer",
    "open_genome_model",
    "prompt_ids",
    "quiet_transformers",
    "read_texts",
    "read_training_texts",
    "recall_options",
    "require_training",
    "spread_windows",
]


SAVE_TOKENIZER = "save the one it was trained with there, by its method save_pretrained"
"""The advice for a model that was saved without a tokenizer."""


def check_new(out: Path) -> None:
    """Raise a UserError if a path exists already."""
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists already; name a folder that does not.")


def check_models(names: Sequence[str]) -> None:
    """Raise a UserError unless there is a model of every name."""
    from gramian._hub import check_model_exists

    for name in names:
        try:
            check_model_exists(name)
        except FileNotFoundError as error:
            raise UserError(one_line(error)) from error


def check_shard_size(size: str) -> None:
    """Raise an error unless a text such as "5GB" is a size of files of weights."""
    from huggingface_hub import split_torch_state_dict_into_shards

    try:
        split_torch_state_dict_into_shards({}, max_shard_size=size)
    except ValueError as error:
        raise UserError(f"--max-shard-size: {one_line(error)}") from error


def check_tolerance(tol: float) -> None:
    """Raise a UserError unless a relative error is above 0 and below 1."""
    if not 0 < tol < 1:
        raise UserError(f"the tolerance must lie between 0 and 1, both excluded; got {tol:g}.")


def fraction(name: str, text: str) -> float:
    """Return the positive number that a text such as "0.001" or "0.1%" means."""
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise UserError(f"{name} takes a positive number or percentage; got {text!r}.")
    return value


def require_training() -> None:
    """Raise a UserError if training or its configurations need a package that is missing."""
    for package in ("yaml", "accelerate", "datasets"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f'training needs {package}: pip install "gramian[train]".')


def quiet_transformers() -> None:
    """Keep messages of transformers out of a command's output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_model(folder: Path, device: str = "cpu") -> GramianForCausalLM:
    """Read a Gramian language model, and move it to a device."""
    _require_folder(folder)
    from gramian.models import load

    try:
        model = load(folder)
    except (OSError, ValueError) as error:
        raise UserError(one_line(error)) from error
    move_model(model, device)
    return model


def load_any_model(folder: Path, device: str = "cpu") -> GramianPreTrainedModel:
    """Read a Gramian model of any class, and move it to a device."""
    _require_folder(folder)
    from gramian.models import load_any

    try:
        model = load_any(folder)
    except (OSError, ValueError) as error:
        raise UserError(one_line(error)) from error
    move_model(model, device)
    return model


def move_model(model: Any, device: str) -> None:
    """Move a model to the device that `--device` names."""
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {one_line(error)}") from error


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():  # checked before imports that take seconds
        raise UserError(f"there is no model folder {folder}.")
    quiet_transformers()


def load_tokenizer(folder: Path) -> Any:
    """Read the tokenizer that was saved with a model or an adapter's base, or return None."""
    from gramian.models.adapters import tokenizer_folder

    folder = tokenizer_folder(folder)
    if not (folder / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"the tokenizer in {folder} cannot be read: {one_line(error)}") from error


def byte_tokenizer(folder: Path, model: GramianPreTrainedModel) -> Any:
    """Make a byte tokenizer for a model without a tokenizer, if their vocabularies are equal."""
    from gramian.models import ByteTokenizer

    tokenizer = ByteTokenizer()
    if model.config.vocab_size != len(tokenizer):
        raise UserError(
            f"{folder} has no tokenizer, so its tokens cannot be read or written; {SAVE_TOKENIZER}."
        )
    return tokenizer


def open_genome_model(folder: Path, device: str, *files: Path | None) -> tuple[Any, Any]:
    """Check that all given files exist, and read a Gramian model and its tokenizer."""
    for file in files:
        if file is not None and not file.is_file():
            raise UserError(f"there is no file {file}.")
    if not folder.is_dir():
        raise UserError(f"there is no model folder {folder}.")
    quiet_transformers()
    from gramian.models import ByteTokenizer, load_any

    try:
        model = load_any(folder)
    except (OSError, ValueError) as error:
        raise UserError(one_line(error)) from error
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        tokenizer = ByteTokenizer()
        if model.config.vocab_size != len(tokenizer):
            raise UserError(
                f"{folder} has no tokenizer, so it cannot read a genome; {SAVE_TOKENIZER}."
            )
    move_model(model, device)
    return model, tokenizer


def read_texts(text: Path) -> list[Document]:
    """Read the documents of a file: FASTA records, JSON lines, or one text."""
    from gramian.tasks import read_documents

    try:
        return list(read_documents(text))
    except ValueError as error:
        raise UserError(one_line(error)) from error
    except OSError as error:
        raise UserError(f"the text {text} cannot be read: {error.strerror}.") from error


def read_training_texts(paths: list[Path] | None, rare: int | None) -> list[Document]:
    """Read the documents that --training-text names, and check that --rare has some."""
    if rare is not None and not paths:
        raise typer.BadParameter(f"--rare needs --training-text; got {rare} alone.")
    return [document for path in paths or [] for document in read_texts(path)]


def recall_options(training: list[Document], rare: int | None, tokenizer: Any) -> dict[str, Any]:
    """Return the options of `evaluation.perplexity` that the training texts determine."""
    from gramian.evaluation import count_bigrams

    if not training:
        return {}
    try:
        return {"training_bigrams": count_bigrams(training, tokenizer), "rare": rare}
    except ValueError as error:
        raise UserError(f"--training-text: {one_line(error)}") from error


def first_windows(
    folder: Path, model: GramianPreTrainedModel, text: Path, batch: int, length: int
) -> Tensor:
    """Read (batch, length) tokens from the beginning of a file. No row spans two documents."""
    from gramian.tasks.windows import cut_windows

    documents = _token_ids(folder, model, text)
    windows = cut_windows(documents, length)
    if len(windows) < batch:
        raise UserError(
            f"{text} has {sum(map(len, documents))} tokens in {len(documents)} documents; {batch} "
            f"sequences of {length} need {batch * length}."
        )
    return windows[:batch]


def spread_windows(
    folder: Path, model: GramianPreTrainedModel, text: Path, max_tokens: int
) -> Tensor:
    """Read windows (count, length) that are spread over a file.

    The length is at most the number of taps of the model's filters, and at most 2,048.
    """
    from gramian.tasks import windows

    documents = _token_ids(folder, model, text)
    length = min(model.config.max_position_embeddings, 2048)
    try:
        return windows.spread_windows(documents, length, max_tokens)
    except ValueError as error:
        raise UserError(f"{text}: {one_line(error)}") from error


def _token_ids(folder: Path, model: GramianPreTrainedModel, text: Path) -> list[Tensor]:
    """Encode each document of a file as token ids (count,)."""
    from torch import from_numpy

    from gramian.tasks import Encoder

    encode = Encoder(load_tokenizer(folder) or byte_tokenizer(folder, model))
    try:
        return [from_numpy(encode(document)) for document in read_texts(text)]
    except ValueError as error:
        raise UserError(one_line(error)) from error


def prompt_ids(tokenizer: Any, prompt: str) -> Tensor:
    """Encode a prompt, which may be a FASTA record, as token ids (1, count)."""
    from gramian.tasks import documents_in

    try:
        documents = documents_in(prompt, "the prompt")
    except ValueError as error:
        raise UserError(one_line(error)) from error
    if len(documents) > 1:
        raise UserError(f"the prompt is {len(documents)} FASTA records; give one of them.")
    if not documents:
        raise UserError("the prompt has no tokens; give some text.")
    return document_ids(tokenizer, documents[0])


def document_ids(tokenizer: Any, document: Document) -> Tensor:
    """Encode a document as the token ids (1, count) of a prompt."""
    import torch

    from gramian.tasks import Encoder

    try:
        ids = torch.from_numpy(Encoder(tokenizer)(document))
    except ValueError as error:
        raise UserError(one_line(error)) from error
    if not len(ids):
        raise UserError("the prompt has no tokens; give some text.")
    return ids[None]


def find_tasks(
    names: list[str], settings: list[str], config: Path | None, seed: int | None
) -> tuple[dict[str, Task], int]:
    """Build the named tasks of `gramian.tasks`, and the task of a training configuration.

    Args:
        names: names of tasks. Names that are not in `gramian.tasks` are ignored.
        settings: changes KEY=VALUE to the settings of the task. They are allowed for one task only.
        config: file of a training configuration, or None.
        seed: seed of the tasks' rows. None uses the seed of the configuration or, without one, 0.

    Returns:
        A mapping from names to tasks, and the seed.
    """
    from gramian import tasks

    wanted: list[dict[str, Any]] = []
    try:
        if config is not None:
            require_training()
            from gramian.training.configuration import load_config

            loaded = load_config(config)  # also imports the modules that register its tasks
            wanted.append(dict(loaded.task))
            seed = loaded.seed if seed is None else seed
        ours = [name for name in names if name in tasks.names()]
        wanted[:0] = [{"name": name} for name in ours]
        if settings and len(wanted) != 1:
            raise typer.BadParameter("--set needs one --task of gramian.tasks, or --config.")
        changes: dict[str, Any] = {}
        if settings:
            from gramian.training.configuration import read_change

            changes = dict(read_change(setting) for setting in settings)
        found = {}
        for values in wanted:
            values |= changes
            values.pop("streaming", None)
            name, chosen = values.pop("name"), values.pop("setting", None)
            found[name] = tasks.build(name, chosen, **values)
    except (TypeError, ValueError) as error:
        raise UserError(one_line(error)) from error
    return found, seed or 0
