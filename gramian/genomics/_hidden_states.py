"""Yield hidden states of any layer, chunk by chunk, for sequences of any length.

A layer is given by a number or a name. The numbers are those of `hidden_states` in transformers: 0
means the embeddings, `i` the output of block `i - 1`, which is the input of block `i`, and the last
number the output of the last norm, after all blocks. A name is the dotted name of a module, and
means the output of this module.

With a cache and without gradients, a block runs the recurrence of its mixer, which calls none of
the modules inside the mixer. If the output of such a module is requested, gradients are enabled, so
that the mixers themselves are called, from the same states and on the same chunks. Since no
parameter then requires a gradient, no graph is recorded.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, overload

import torch
from torch import Tensor, nn

from gramian.genomics._likelihood import evaluating
from gramian.genomics._sequences import Alphabet
from gramian.genomics._tokenizers import tokenizer_of
from gramian.mixers import Mixer
from gramian.models import GramianCache, GramianPreTrainedModel
from gramian.tasks import Document, genomes

__all__ = ["Taps", "hidden_states", "read_layer"]

Layer = int | str


@overload
def hidden_states(
    model: GramianPreTrainedModel,
    sequence: Tensor | str | Document,
    *,
    layers: Layer,
    tokenizer: Any = ...,
    chunk_size: int = ...,
) -> Iterator[Tensor]: ...


@overload
def hidden_states(
    model: GramianPreTrainedModel,
    sequence: Tensor | str | Document,
    *,
    layers: list[Layer] | tuple[Layer, ...],
    tokenizer: Any = ...,
    chunk_size: int = ...,
) -> Iterator[dict[Layer, Tensor]]: ...


def hidden_states(
    model: GramianPreTrainedModel,
    sequence: Tensor | str | Document,
    *,
    layers: Layer | list[Layer] | tuple[Layer, ...],
    tokenizer: Any = None,
    chunk_size: int = 16_384,
) -> Iterator[Tensor] | Iterator[dict[Layer, Tensor]]:
    """Yield the hidden states of a sequence chunk by chunk, with memory for one chunk only.

    Together, the chunks are the hidden states of the whole sequence, because the state of every
    layer is carried from one chunk to the next.

    Args:
        model: a Gramian model that reads tokens. It may be inside an adapter of peft.
        sequence: token ids (length) or (batch, length), without padding; or nucleotides, as text or
            a document, which `tokenizer` encodes.
        layers: a layer, or several layers. A number has the meaning that it has in `hidden_states`
            of transformers: 0 means the embeddings, `i` the output of the first `i` blocks, and the
            number of blocks (or -1) the output of the last norm. A text is the dotted name of a
            module, such as `"model.layers.3.mlp"`, and means the output of this module.
        tokenizer: the model's tokenizer, with one token for each nucleotide. It is needed for
            nucleotides only.
        chunk_size: largest number of tokens that are read at once.

    Yields:
        The hidden states of a chunk: (batch, tokens, width) if the token ids are (batch, length),
        and (tokens, width) otherwise. If `layers` are several, a dictionary from each layer to its
        hidden states.

    Raises:
        TypeError: if the model is not a Gramian model.
        ValueError: if the sequence is empty or not made of token ids or nucleotides, if the model
            is bidirectional or reads no tokens, if a layer does not exist, or if its output is not
            one vector for each token.
    """
    model = base_of(model)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1; got {chunk_size}.")
    ids = _ids(model, sequence, tokenizer)
    several = not isinstance(layers, int | str)
    wanted: list[Layer] = list(layers) if not isinstance(layers, int | str) else [layers]
    taps = Taps(model, wanted)
    batched = isinstance(sequence, Tensor) and sequence.ndim == 2
    return _chunks(taps, ids, wanted, several, batched, chunk_size)


def _chunks(
    taps: Taps,
    ids: Tensor,
    wanted: list[Layer],
    several: bool,
    batched: bool,
    chunk_size: int,
) -> Iterator[Any]:
    cache = GramianCache(taps.model.config)
    for begin in range(0, ids.shape[1], chunk_size):
        found = taps(ids[:, begin : begin + chunk_size], None, cache)
        found = found if batched else [states[0] for states in found]
        yield dict(zip(wanted, found, strict=True)) if several else found[0]


def _ids(model: Any, sequence: Tensor | str | Document, tokenizer: Any) -> Tensor:
    """Return ids (batch, length) on the model's device."""
    if not isinstance(sequence, Tensor):
        tokenizer = tokenizer_of(model) if tokenizer is None else tokenizer
        text = sequence.text if isinstance(sequence, Document) else sequence
        codes = genomes.clean(text.encode(), "the sequence", numbers=False)
        sequence = torch.from_numpy(Alphabet(tokenizer, model.config.vocab_size).ids(codes))
    if sequence.ndim not in (1, 2) or sequence.is_floating_point() or not sequence.numel():
        raise ValueError(
            "ids must be (length) or (batch, length) of integers, with at least one token; got "
            f"{tuple(sequence.shape)} of {sequence.dtype}."
        )
    ids = sequence if sequence.ndim == 2 else sequence[None]
    return ids.to(next(model.parameters()).device)


def base_of(model: Any) -> GramianPreTrainedModel:
    """Return the model itself or, if it is an adapter of peft, the model inside the adapter.

    Raises:
        TypeError: if the model is not a Gramian model.
        ValueError: if the model reads no tokens, or is bidirectional.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if not isinstance(model, GramianPreTrainedModel):
        raise TypeError(f"model must be a Gramian model; got {type(model).__name__}.")
    if model.config.bidirectional:
        raise ValueError("a bidirectional model looks ahead, so it cannot be read in chunks.")
    if model.config.input_size is not None:
        raise ValueError(
            f"model must read tokens; this one takes inputs of {model.config.input_size} numbers."
        )
    return model


def read_layer(text: str) -> Layer:
    """Return the layer that a text means: its number if the text is one, otherwise its name."""
    return int(text) if text.removeprefix("-").isdecimal() else text


class Taps:
    """A function that calls a model and returns the hidden states of chosen layers.

    Args:
        model: the model.
        layers: numbers and names of layers.

    Attributes:
        padded: whether the rows of a batch may differ in length. They may not if a layer is inside
            a mixer, because a mixer can move the padding.
        shapes: for each layer, the dtype and the width of its vectors.

    Raises:
        ValueError: if a layer does not exist, or its output is not one vector for each token.
    """

    def __init__(self, model: GramianPreTrainedModel, layers: Sequence[Layer]) -> None:
        if not layers:
            raise ValueError("layers must hold at least one layer; got none.")
        self.model = model
        self.backbone: Any = model.base_model
        self._layers = [self._resolved(layer) for layer in layers]
        inside = {
            id(part)
            for mixer in model.modules()
            if isinstance(mixer, Mixer)
            for part in mixer.modules()
        }
        self.padded = not any(id(part) in inside for part in self._layers)
        self._checked: list[tuple[int, torch.dtype]] | None = None
        self._names = [str(layer) for layer in layers]
        self.shapes = self._probe()

    def __call__(self, ids: Tensor, mask: Tensor | None, cache: GramianCache) -> list[Tensor]:
        """Read more tokens, and return the hidden states of each layer, (batch, tokens, width).

        Args:
            ids: (batch, tokens) token ids.
            mask: (batch, tokens), 1 for a real token and 0 for padding; None if there is no
                padding.
            cache: the model's state before these tokens. It is updated in place.
        """
        found: list[list[Any]] = [[] for _ in self._layers]
        with evaluating(self.model), ExitStack() as stack:
            if not self.padded:
                stack.enter_context(_without_parameters(self.model))
                stack.enter_context(torch.enable_grad())
            blocks = self.backbone.layers
            for place, layer in enumerate(self._layers):
                if isinstance(layer, nn.Module):
                    handle = layer.register_forward_hook(_keeper(found[place]))
                elif layer < len(blocks):
                    handle = blocks[layer].register_forward_pre_hook(_input_keeper(found[place]))
                else:
                    continue
                stack.callback(handle.remove)
            outputs = self.backbone(
                input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True
            )
        for place, layer in enumerate(self._layers):
            if isinstance(layer, int) and layer == len(blocks):
                found[place].append(outputs.last_hidden_state)
        return [self._only(place, states, ids) for place, states in enumerate(found)]

    def _resolved(self, layer: Layer) -> int | nn.Module:
        count = len(self.backbone.layers)
        if isinstance(layer, int):
            if not -count - 1 <= layer <= count:
                raise ValueError(
                    f"layer must lie from 0, the embeddings, to {count}, the output of the last "
                    f"norm; got {layer}."
                )
            return layer % (count + 1)
        modules = dict(self.model.named_modules())
        if layer not in modules:
            close = difflib.get_close_matches(layer, modules, n=3, cutoff=0.5)
            meant = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise ValueError(
                f"the model has no module {layer!r}.{meant} A number from 0 to {count} is accepted "
                "too."
            )
        return modules[layer]

    def _only(self, place: int, states: list[Any], ids: Tensor) -> Tensor:
        name = self._names[place]
        found = states[0] if states else None
        found = found[0] if isinstance(found, tuple) else found
        if states and not (
            isinstance(found, Tensor) and found.ndim == 3 and found.shape[:2] == ids.shape
        ):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"layer {name} must give (batch, tokens, width); for {tuple(ids.shape)} tokens it "
                f"gives {got}."
            )
        if len(states) != 1:
            raise ValueError(
                f"layer {name} must be called once for the tokens that are read; it was called "
                f"{len(states)} times."
            )
        assert isinstance(found, Tensor)
        return found.detach()

    def _probe(self) -> list[tuple[torch.dtype, int]]:
        """Read two tokens and then three, and return the dtype and the width of each layer.

        A dimension of the output that follows both lengths is the number of tokens. With one
        length, another dimension could have the same size by chance.
        """
        device = next(self.model.parameters()).device
        for length in (2, 3):
            ids = torch.zeros(1, length, dtype=torch.long, device=device)
            found = self(ids, None, GramianCache(self.model.config))
        return [(states.dtype, states.shape[-1]) for states in found]


def _keeper(found: list[Any]) -> Any:
    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        found.append(output)

    return keep


def _input_keeper(found: list[Any]) -> Any:
    def keep(module: nn.Module, arguments: Any) -> None:
        found.append(arguments[0])

    return keep


@contextmanager
def _without_parameters(model: nn.Module) -> Iterator[None]:
    """Let no parameter require a gradient, so that no graph is recorded."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
