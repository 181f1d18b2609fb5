"""Define the interface of formats of checkpoints, and check a checkpoint before it is loaded."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping
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
    """A checkpoint of one format. Its subclasses are the formats.

    Names of tensors are stripped, which means that they lack the prefixes of wrappers.

    Args:
        shapes: shapes of all tensors, by stripped name.
        config: the checkpoint's configuration.

    Raises:
        ValueError: from the constructor, on a configuration that lacks an entry, describes a model
            that our models cannot express, or contradicts the tensors' shapes.
    """

    name: ClassVar[str]
    """The name of the format in `load`."""

    embedding: ClassVar[str]
    """The stripped name of the embedding; the model has its dtype by default."""

    layers: int
    """The number of layers."""

    reads_states: ClassVar[bool] = False
    """Whether files of the format hold byte streams beside their tensors, for `read_states`."""

    def __init__(self, shapes: Shapes, config: Mapping[str, Any]) -> None:
        self.shapes = shapes

    @classmethod
    @abc.abstractmethod
    def strip(cls, names: Iterable[str]) -> dict[str, str] | None:
        """Return the stripped name of each tensor, by the checkpoint's own name.

        Tensors that are not part of the model are left out. If the names are those of another
        format, None is returned.
        """

    @classmethod
    def meant_by(cls, config: Mapping[str, Any]) -> bool:
        """Return whether a configuration is of this format, not of another with the same keys."""
        return False

    def read_states(self, states: Mapping[str, bytes | None], fp8: bool | None) -> None:  # noqa: B027
        """Read what files hold beside tensors; called before `model_config`.

        Most formats have nothing to read there.

        Args:
            states: byte streams by stripped name.
            fp8: whether maps that were trained in 8-bit floating point are computed in it; None:
                where the model needs it.

        Raises:
            ValueError: on a state that is needed and missing or damaged.
        """

    @abc.abstractmethod
    def expected(self) -> Shapes:
        """Return the shapes of exactly the tensors that the checkpoint must have, by name."""

    @abc.abstractmethod
    def translate(self, weights: dict[str, Tensor], progress: Progress) -> dict[str, Tensor]:
        """Return the state dict of the Gramian model, and remove the used tensors from `weights`.

        Args:
            weights: the checkpoint's tensors, by stripped name.
            progress: a function to call as `progress(layers done, all layers)` after each layer.
        """

    @abc.abstractmethod
    def model_config(self, weights: Mapping[str, Tensor]) -> GramianConfig:
        """Return the configuration of the Gramian model. `load` calls this before `translate`."""

    def model_class(self) -> type[GramianPreTrainedModel]:
        """Return the class of our model, a language model unless the format has others too."""
        return GramianForCausalLM

    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        """Return the tokenizer of the checkpoint, if the format has one."""
        return None


FORMATS: dict[str, type[Format]] = {}
"""The formats that can be read, by name."""

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
    """Raise a ValueError that names the tensors that do not fit, unless all are as expected.

    Args:
        source: name of the checkpoint in the message.
        names: stripped names of the tensors, by the checkpoint's own names.
        shapes: shapes of the tensors, by stripped name.
        expected: shapes of the required tensors, by stripped name.
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
        default: value that is returned if the setting is missing or None; optional.

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
    """Return a setting that must be an integer of at least 1; arguments are those of `setting`."""
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
    """Return whether a checkpoint has a tensor, `head`, for its output projection.

    Raises:
        ValueError: if it has none, although its configuration says that the output projection is
            not the embedding.
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

    This is so if the checkpoint has no output projection, or if both tensors are equal and the
    configuration does not say that they are separate.

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
    """Return the setting that says that the output projection is not the embedding, or None."""
    names = ("tie_word_embeddings", "tie_embeddings")
    return next((name for name in names if config.get(name) is False), None)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
