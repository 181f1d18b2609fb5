"""Define the interface of checkpoint formats, and check a checkpoint before it is loaded."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from gramian.models import GramianConfig, GramianForCausalLM, GramianPreTrainedModel

__all__ = [
    "FORMATS",
    "Format",
    "Progress",
    "Shapes",
    "compare",
    "has_head",
    "refuse_unless",
    "register",
    "setting",
    "size",
    "tied",
]

Shapes = dict[str, tuple[int, ...]]
Progress = Callable[[int, int], None]


class Format(abc.ABC):
    """A checkpoint of one format. Each subclass is a format.

    Wrappers put prefixes before the names of tensors. A stripped name is the name without these
    prefixes.

    Args:
        shapes: a mapping from the stripped names of all tensors to their shapes.
        config: the checkpoint's configuration.

    Raises:
        ValueError: if the configuration lacks an entry, describes a model that Gramian models
            cannot express, or contradicts the shapes of the tensors.
    """

    name: ClassVar[str]
    """The name of the format in `load`."""

    embedding: ClassVar[str]
    """The stripped name of the embedding. By default, the model has the embedding's dtype."""

    layers: int
    """The number of layers."""

    reads_states: ClassVar[bool] = False
    """Whether files of the format also hold byte streams, which `read_states` reads."""

    def __init__(self, shapes: Shapes, config: Mapping[str, Any]) -> None:
        self.shapes = shapes

    @classmethod
    @abc.abstractmethod
    def strip(cls, names: Iterable[str]) -> dict[str, str] | None:
        """Return a mapping from the names of tensors in a checkpoint to their stripped names.

        Tensors that are not part of the model are left out. If the names belong to another format,
        None is returned.
        """

    @classmethod
    def meant_by(cls, config: Mapping[str, Any]) -> bool:
        """Return whether a configuration belongs to this format.

        If several formats have the same keys, this method selects the format.
        """
        return False

    def read_states(self, states: Mapping[str, bytes | None], fp8: bool | None) -> None:  # noqa: B027
        """Read the byte streams in a checkpoint. `load` calls this before `model_config`.

        The files of most formats hold no byte streams.

        Args:
            states: a mapping from stripped names to byte streams.
            fp8: whether linear maps that were trained in 8-bit floating point are computed in it.
                If `fp8` is None, they are computed in it only if the model needs this.

        Raises:
            ValueError: if a byte stream is needed and is missing or damaged.
        """

    @abc.abstractmethod
    def expected(self) -> Shapes:
        """Return a mapping from the stripped names of the required tensors to their shapes.

        A checkpoint must have exactly these tensors.
        """

    @abc.abstractmethod
    def translate(self, weights: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Yield the state dict of the Gramian model in parts, one for each layer and for the rest.

        Only one part is in memory at a time if the model is converted. So a part should hold the
        tensors of one layer, and no tensor should be kept while the next part is made.

        Args:
            weights: the checkpoint's tensors by their stripped names. They may be read from files
                each time that they are looked up.
        """

    @abc.abstractmethod
    def model_config(self, weights: Mapping[str, Tensor]) -> GramianConfig:
        """Return the configuration of the Gramian model. It is needed before `translate`.

        Args:
            weights: the checkpoint's tensors, as for `translate`.
        """

    def model_class(self) -> type[GramianPreTrainedModel]:
        """Return the class of the Gramian model; by default, the class of language models."""
        return GramianForCausalLM

    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        """Return the tokenizer of the checkpoint, or None if the format has no tokenizer."""
        return None


FORMATS: dict[str, type[Format]] = {}
"""The registered formats by their names."""

_T = TypeVar("_T", bound=type[Format])


def register(format: _T) -> _T:
    """Register a format for `load` under its `name`. This is a class decorator.

    Raises:
        ValueError: if another class is registered under that name.
    """
    if FORMATS.get(format.name, format) is not format:
        raise ValueError(f"the format {format.name!r} is already registered.")
    FORMATS[format.name] = format
    return format


def compare(
    source: str, names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], expected: Shapes
) -> None:
    """Raise a ValueError that names missing, unexpected and misshapen tensors, if there are any.

    Args:
        source: name of the checkpoint in the message.
        names: a mapping from the names of the tensors in the checkpoint to their stripped names.
        shapes: a mapping from the stripped names of the tensors to their shapes.
        expected: a mapping from the stripped names of the required tensors to their shapes.
    """
    original = {stripped: name for name, stripped in names.items()}
    missing = sorted(expected.keys() - shapes.keys())
    unexpected = sorted(original[name] for name in shapes.keys() - expected.keys())
    wrong = [
        f"{original[name]} is {shapes[name]} and not {shape}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    kinds = (("missing", missing), ("not of this format", unexpected), ("of other shapes", wrong))
    parts = [f"{len(found)} {kind} ({_some(found)})" for kind, found in kinds if found]
    if parts:
        raise ValueError(f"{source} does not fit: {'; '.join(parts)}.")


def setting(
    config: Mapping[str, Any], name: str, kind: type | tuple[type, ...], *default: Any
) -> Any:
    """Return `config[name]` after checking that it is of type `kind`.

    Args:
        config: the checkpoint's configuration.
        name: name of the setting.
        kind: accepted type or types.
        default: value that is returned if the setting is missing or None. It may be left out.

    Raises:
        ValueError: if the setting is of another type, or is missing and has no default.
    """
    value = config.get(name)
    if value is None and default:
        return default[0]
    if value is None:
        raise ValueError(f"the checkpoint's configuration lacks {name}.")
    if not isinstance(value, kind) or (isinstance(value, bool) and kind in (int, float)):
        raise ValueError(f"{name} in the checkpoint's configuration cannot be {value!r}.")
    return value


def size(config: Mapping[str, Any], name: str, *default: Any) -> Any:
    """Return a setting that must be an integer of at least 1.

    The arguments and errors are the same as those of `setting`, without `kind`.
    """
    value = setting(config, name, int, *default)
    if isinstance(value, int) and value < 1:
        raise ValueError(
            f"{name} in the checkpoint's configuration must be at least 1; got {value}."
        )
    return value


def refuse_unless(config: Mapping[str, Any], name: str, *accepted: Any) -> None:
    """Raise a ValueError unless a setting is missing, None or one of the accepted values."""
    value = config.get(name)
    if value is not None and value not in accepted:
        raise ValueError(
            f"the checkpoint has {name}={value!r}, which Gramian's models do not express; "
            f"{' or '.join(map(repr, accepted))} is needed."
        )


def has_head(config: Mapping[str, Any], shapes: Mapping[str, Any], head: str) -> bool:
    """Return whether a checkpoint has the tensor `head` of an output projection.

    Raises:
        ValueError: if the tensor is missing, although the configuration says that the output
            projection is not the embedding.
    """
    if head not in shapes and _untied(config):
        raise ValueError(
            f"the checkpoint has no {head}, and its configuration says, with "
            f"{_untied(config)}=False, that this is not the embedding."
        )
    return head in shapes


def tied(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], embedding: str, head: str
) -> bool:
    """Return whether the output projection is the embedding.

    The output projection is the embedding if the checkpoint has no output projection, or if both
    tensors are equal and the configuration does not say that they are separate.

    Args:
        config: the checkpoint's configuration.
        weights: the checkpoint's tensors. Their names lack the prefixes of wrappers.
        embedding: name of the embedding in `weights`.
        head: name of the output projection in `weights`, if it has one.
    """
    if head not in weights:
        return True
    return not _untied(config) and torch.equal(weights[head], weights[embedding])


def _untied(config: Mapping[str, Any]) -> str | None:
    """Return the name of the setting that unties output projection and embedding, or None."""
    names = ("tie_word_embeddings", "tie_embeddings")
    return next((name for name in names if not setting(config, name, bool, True)), None)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
