"""Define the configuration of a Gramian model, whose blocks may hold any mixers and filters.

`mixers` names the mixers, and `filter` describes the filters with which they convolve. Both are
given once for all layers or once per layer. After distillation, for example, the filters of every
layer have different orders. The configuration determines the shapes of all parameters before any
weight is read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from gramian._checks import check_choice, check_probability, check_sizes
from gramian._nearest import unknown
from gramian.mixers import Mixer, registry
from gramian.mixers.registry import options_of, takes
from gramian.models.layers import BLOCKS
from gramian.models.norms import FINAL_NORMS
from gramian.models.remote_code import AUTO_MAP, write_module

__all__ = ["MIXERS", "POOLING", "GramianConfig"]

_FAMILIES = {"attention": "attention", "linear_recurrence": "recurrence"}
"""The fields that hold arguments of mixers, and the family of mixers that each field is for."""

MIXERS: dict[str, type[Mixer]] = registry.MIXERS
"""The names that `GramianConfig.mixers` accepts: the mixers registered in `gramian.mixers`."""

POOLING = ("mean", "last")


class GramianConfig(PreTrainedConfig):
    """The configuration of `GramianModel` and of models with a head, such as `GramianForCausalLM`.

    The constructor also accepts the keyword arguments of any configuration of transformers, such as
    `num_labels` and `problem_type`.

    Attributes:
        vocab_size: number of token ids. The default, 259, is `ByteTokenizer`'s: 256 bytes and three
            special tokens.
        hidden_size: width of the residual stream.
        num_hidden_layers: number of blocks.
        num_heads: number of heads of `multi_hyena` and `softmax_attention` mixers and of linear
            recurrences; it must divide `hidden_size`. `s6` has no heads. An entry of `mixers` may
            give its layers another number, `{"type": "multi_hyena", "heads": 256}`.
        mixers: name of the mixer: `"multi_hyena"`, `"hyena"`, `"long_convolution"`,
            `"softmax_attention"`; a linear recurrence, that is, `"linear_attention"`,
            `"weighted_linear_attention"`, `"gated_linear_attention"`, `"s6"`, `"gla_s6"` or
            `"gated_delta_net"`; or another registered mixer (`gramian.mixers.register`). In place
            of the name, `{"type": name, ...}` gives further arguments of that mixer. A list has one
            such entry for each layer.
        filter: configuration of the mixers' filters, `{"type": name, ...}`, as for
            `gramian.filters.build`. A list has one configuration for each layer. Its entries for
            layers without a filter are ignored and may be None.
        attention: further arguments of `gramian.mixers.SoftmaxAttention`, such as `kv_heads`,
            `window` and `rotary_base`, for all `softmax_attention` layers.
        linear_recurrence: further arguments of the linear recurrences in `gramian.mixers`, such as
            `state_size` and `temperature`. Each layer uses the arguments that its mixer accepts; an
            argument that no layer uses is an error.
        max_position_embeddings: `max_length` of the filters. The input may be longer. Past this
            length, the kernel of an FIR filter is zero, and the kernel of a rational filter
            continues. There is no positional embedding, except for the rotations inside attention,
            which have no limit either.
        hyena_order: order N of `hyena` mixers, which have N - 1 long convolutions; at least 2.
        short_kernel: number of taps of the mixers' short convolutions.
        hyena_input_dropout: probability of dropping, in training, an element of the input of a long
            convolution of `hyena` mixers, as in Hyena-RTF.
        hyena_mimo_size: width of the map across channels before the output projection of `hyena`
            mixers, as in Hyena-RTF. By default, there is no map across channels.
        block: kind of the blocks. `"mlp"` is a mixer and an MLP, each with a norm before it and a
            residual connection, as in language models. `"glu"` is a `gramian.mixers.Block`, in
            which one gated linear map follows a mixer, as in models of long continuous sequences.
            `"mixer"` is a mixer without a norm or a residual connection, as in the linear models of
            the Delay task. `register_block` adds further kinds.
        norm: norm of the blocks. `"mlp"` blocks accept `"rms"`, `"layer"` and `"rms_plus_eps"`, the
            norm of StripedHyena, which adds the epsilon to the root and not under it. `"glu"`
            blocks accept `"rms"`, `"layer"` and `"batch"`. `GramianForCausalLM` does not accept
            `"batch"`, because its statistics depend on later tokens.
        final_norm: norm after the last block: `"rms"`, `"rms_plus_eps"`, `"layer"` or `"none"`. The
            default is the value of `norm` after `"mlp"` blocks, `"rms"` after `"glu"` blocks and
            `"none"` after `"mixer"` blocks.
        prenorm: whether the norm of a `"glu"` block comes before its mixer. If not, it comes after
            the residual connection.
        tied_dropout: whether the dropout of `"glu"` blocks drops a channel over the whole length.
        bidirectional: whether the outputs of mixers also depend on later positions. All mixers must
            then be `long_convolution`, and their filters have 2 × `hidden_size` channels.
            `GramianForCausalLM` does not accept this option.
        input_size: number of features of a continuous input, for example 1 for the samples of a
            signal or the pixels of a gray image. The model reads this input as `input_values`
            through a linear map. By default, the model reads token ids. `GramianForCausalLM` does
            not accept an `input_size`.
        pooling: how `GramianForSequenceClassification` pools the hidden states: `"mean"` is their
            mean over the real tokens, and `"last"` is the hidden state of the last real token.
        dropout: probability of dropping, in training, an element of the output of a mixer or MLP
            before it is added to the residual stream.
        embedding_dropout: probability of dropping, in training, an element of the embeddings.
        kernel_dropout: probability of dropping, in training, a tap of a long convolution.
        residual_in_fp32: whether the residual stream between `"mlp"` blocks, and thus the hidden
            states, are in single precision when the weights are in half precision.
        intermediate_size: inner width of the MLP of `"mlp"` blocks. The default is 4 ×
            `hidden_size`, or 8/3 × `hidden_size` if the MLP is gated, rounded up to a multiple of
            16.
        gated_mlp: whether the MLP computes `act(W₁ x) ∘ W₂ x` or only `act(W₁ x)`. In both cases,
            a projection follows.
        mlp_bias: whether the linear maps in the MLP have biases.
        hidden_act: activation of the MLP, or a list with one activation for each layer. `"linear"`
            is the identity.
        rms_norm_eps: number added to the mean square or the variance in norms of every kind.
        initializer_range: standard deviation of the initial embeddings and projections.
        use_cache: whether a forward pass without gradients returns its cache.
        tie_word_embeddings: whether the output projection is the embedding matrix.
        pad_token_id: id of the padding token; None by default.
        bos_token_id: id of the token that begins a text; None by default.
        eos_token_id: id of the token that ends a text, or a list of such ids; None by default.

    Raises:
        ValueError: if a mixer, pooling, block, norm or activation is unknown; a filter's
            configuration has no type; a list does not have exactly one entry for each layer; a size
            is below 1; `num_heads` does not divide `hidden_size`; an option of one kind of blocks
            is set for blocks of another kind; a dropout is not a probability below 1;
            `bidirectional` is set with mixers other than `long_convolution`; `SoftmaxAttention`
            does not accept an argument in `attention`; or none of the model's recurrences accepts
            an argument in `linear_recurrence`.
    """

    model_type = "gramian"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 (the Trainer needs a list)
    attribute_map = {"num_attention_heads": "num_heads"}  # noqa: RUF012
    auto_map = AUTO_MAP  # tools such as TRL read it from a configuration

    vocab_size: int = 259
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_heads: int = 8
    mixers: str | dict[str, Any] | list[str | dict[str, Any]] = "multi_hyena"
    filter: dict[str, Any] | list[dict[str, Any] | None] | None = None
    attention: dict[str, Any] | None = None
    linear_recurrence: dict[str, Any] | None = None
    max_position_embeddings: int = 2048
    hyena_order: int = 2
    short_kernel: int = 3
    hyena_mimo_size: int | None = None
    hyena_input_dropout: float = 0.0
    block: str = "mlp"
    norm: str = "rms"
    final_norm: str | None = None
    prenorm: bool = True
    tied_dropout: bool = False
    bidirectional: bool = False
    input_size: int | None = None
    pooling: str = "mean"
    dropout: float = 0.0
    embedding_dropout: float = 0.0
    kernel_dropout: float = 0.0
    residual_in_fp32: bool = False
    intermediate_size: int | None = None
    gated_mlp: bool = True
    mlp_bias: bool = False
    hidden_act: str | list[str] = "silu"
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.filter is None:
            self.filter = {"type": "implicit"}
        if isinstance(self.mixers, tuple):
            self.mixers = list(self.mixers)
        if isinstance(self.filter, tuple):
            self.filter = list(self.filter)
        if isinstance(self.hidden_act, tuple):
            self.hidden_act = list(self.hidden_act)
        self._validate_block(kwargs)
        if self.final_norm is None:
            self.final_norm = BLOCKS[self.block].default_final_norm(self.norm)
        self._validate()
        if self.intermediate_size is None:
            inner = 8 * self.hidden_size / 3 if self.gated_mlp else 4 * self.hidden_size
            self.intermediate_size = 16 * -int(-inner // 16)
        kwargs.pop("auto_map", None)  # a file may have one, but `save_pretrained` writes its own
        super().__post_init__(**kwargs)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write `config.json`, and beside it the module with which transformers loads the folder.

        If this package has not been imported, the Auto classes load the folder only with
        `trust_remote_code=True`.

        Args:
            save_directory: the folder. It is created if it does not exist.
            push_to_hub: whether to upload the folder to the Hugging Face Hub.
            kwargs: further arguments of `save_pretrained` of transformers' configurations.
        """
        if not os.path.isfile(save_directory):  # the call below refuses a file
            os.makedirs(save_directory, exist_ok=True)
            write_module(Path(save_directory))
        self.auto_map = AUTO_MAP  # a file holds what belongs to the instance
        try:
            super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        finally:
            del self.auto_map

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing, because saved folders import this package and hold no copy of its source."""

    @property
    def layer_types(self) -> list[str]:
        """The kind of every layer by transformers' name. `mixers` has the names of the mixers."""
        return ["linear_attention"] * self.num_hidden_layers

    def mixer_of(self, layer: int) -> str:
        """Return the name of a layer's mixer."""
        return str(self._mixer(layer)["type"])

    def activation_of(self, layer: int) -> str:
        """Return the name of the activation in the MLP of layer `layer`."""
        if not isinstance(self.hidden_act, list):
            return self.hidden_act
        return str(self._entry("hidden_act", self.hidden_act, layer))

    def filter_of(self, layer: int) -> dict[str, Any] | None:
        """Return a copy of the configuration of a layer's filter, or None if it has no filter."""
        if not takes(self.mixer_of(layer), "filter"):
            return None
        assert self.filter is not None
        given = self.filter
        one = given if isinstance(given, Mapping) else self._entry("filter", given, layer)
        assert one is not None
        return dict(one)

    def mixer_config(self, layer: int) -> dict[str, Any]:
        """Return the configuration of a layer's mixer, for `gramian.mixers.build`.

        The configuration joins three sources, and earlier sources take precedence: the entry in
        `mixers`; the arguments in `attention` or `linear_recurrence` that the mixer accepts; and
        the fields that are named after the mixer, such as `hyena_order`.
        """
        own = self._mixer(layer)
        kind = own["type"]
        options = options_of(kind)
        found = {name: getattr(self, f"{kind}_{name}", None) for name in options}
        found = {name: value for name, value in found.items() if value is not None}
        for field, family in _FAMILIES.items():
            if MIXERS[kind].family == family:
                given = getattr(self, field) or {}
                found |= {name: given[name] for name in options if name in given}
        return found | own

    def _mixer(self, layer: int) -> dict[str, Any]:
        given = self.mixers
        one = self._entry("mixers", given, layer) if isinstance(given, list) else given
        return {"type": one} if isinstance(one, str) else dict(one)

    def _entry(self, name: str, given: Sequence[Any], layer: int) -> Any:
        """Return the entry of a layer. `num_hidden_layers` may have been raised after the check."""
        if layer >= len(given):
            raise ValueError(
                f"{name} must have one entry for each of the {self.num_hidden_layers} layers; got "
                f"{len(given)}."
            )
        return given[layer]

    def _validate(self) -> None:
        sizes = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_heads": self.num_heads,
            "max_position_embeddings": self.max_position_embeddings,
            "short_kernel": self.short_kernel,
        }
        optional = {
            "intermediate_size": self.intermediate_size,
            "input_size": self.input_size,
            "hyena_mimo_size": self.hyena_mimo_size,
        }
        sizes |= {name: value for name, value in optional.items() if value is not None}
        check_sizes(**sizes)
        if not isinstance(self.hyena_order, int) or self.hyena_order < 2:
            raise ValueError(
                f"hyena_order must be an integer of at least 2; got {self.hyena_order!r}."
            )
        self._validate_activations()
        for name, accepted in {"final_norm": FINAL_NORMS, "pooling": POOLING}.items():
            check_choice(name, getattr(self, name), accepted)
        if self.residual_in_fp32 and self.final_norm == "none":
            raise ValueError("residual_in_fp32 needs a final_norm, which ends it; got 'none'.")
        for name in ("dropout", "embedding_dropout", "kernel_dropout", "hyena_input_dropout"):
            check_probability(name, getattr(self, name))
        _validate_mixers(self.mixers, self.num_hidden_layers)
        names = [self.mixer_of(layer) for layer in range(self.num_hidden_layers)]
        _validate_filter(self.filter, names)
        for field, family in _FAMILIES.items():
            _validate_options(field, getattr(self, field), family, names)
        self._validate_layers(names)

    def _validate_activations(self) -> None:
        given = self.hidden_act if isinstance(self.hidden_act, list) else [self.hidden_act]
        if isinstance(self.hidden_act, list) and len(given) != self.num_hidden_layers:
            raise ValueError(
                f"hidden_act must name one activation for each of the {self.num_hidden_layers} "
                f"layers; got {len(given)}."
            )
        for name in given:
            if not isinstance(name, str) or name not in ACT2FN:
                raise ValueError(
                    f"hidden_act must be among {', '.join(sorted(ACT2FN))}; got {name!r}."
                )

    def _validate_layers(self, names: list[str]) -> None:
        others = sorted({name for name in names if not takes(name, "bidirectional")})
        if self.bidirectional and others:
            able = " or ".join(repr(name) for name in MIXERS if takes(name, "bidirectional"))
            raise ValueError(
                f"bidirectional needs the mixer {able} in every layer; got "
                f"{', '.join(map(repr, others))}."
            )
        for layer, name in enumerate(names):
            options = self.mixer_config(layer)
            heads = options.get("heads", self.num_heads)
            check_sizes(heads=heads)
            if MIXERS[name].splits_width(options) and self.hidden_size % heads:
                given = "heads" if "heads" in options else "num_heads"
                raise ValueError(
                    f"{given} must divide hidden_size for {name} mixers; got {heads} "
                    f"heads and width {self.hidden_size}."
                )

    def _validate_block(self, others: Mapping[str, Any]) -> None:
        """Check the fields that concern the blocks.

        Args:
            others: the keyword arguments that are not fields of the configuration. They may be
                options of registered blocks.

        Raises:
            ValueError: if the block or the norm is unknown, or an option of another kind of blocks
                is set.
        """
        check_choice("block", self.block, BLOCKS)
        block = BLOCKS[self.block]
        check_choice("norm", self.norm, block.norms, f" in {self.block!r} blocks")
        for kind, other in BLOCKS.items():
            foreign = [name for name in other.options if name not in block.options]
            given = {name: others.get(name, getattr(self, name, None)) for name in foreign}
            if any(value != _default(name) for name, value in given.items()):
                are = "are options" if len(foreign) > 1 else "is an option"
                raise ValueError(
                    f"{' and '.join(foreign)} {are} of block={kind!r}; got "
                    f"{'them' if len(foreign) > 1 else 'it'} with block={self.block!r}."
                )


def _default(field: str) -> Any:
    return getattr(GramianConfig, field, None)


def _validate_mixers(mixers: Any, layers: int) -> None:
    accepted = ", ".join(map(repr, MIXERS))
    if not isinstance(mixers, str | list | Mapping):
        raise ValueError(
            f"mixers must be one of {accepted} or a list of them; got {type(mixers).__name__}."
        )
    if isinstance(mixers, list) and len(mixers) != layers:
        raise ValueError(
            f"mixers must name one mixer for each of the {layers} layers; got {len(mixers)}."
        )
    for one in mixers if isinstance(mixers, list) else [mixers]:
        name = one.get("type") if isinstance(one, Mapping) else one
        if name not in tuple(MIXERS):
            raise ValueError(f"mixers must be among {accepted}; got {name!r}.")
        keys = [*options_of(name), *(["heads"] if takes(name, "heads") else [])]
        for key in one if isinstance(one, Mapping) else ():
            if key != "type" and key not in keys:
                raise ValueError(unknown(f"key of a mixer {name!r}", key, keys))


def _validate_filter(filter_config: Any, mixers: list[str]) -> None:
    if isinstance(filter_config, list) and len(filter_config) != len(mixers):
        raise ValueError(
            f"filter must have one configuration for each of the {len(mixers)} layers; got "
            f"{len(filter_config)}."
        )
    listed = filter_config if isinstance(filter_config, list) else [filter_config] * len(mixers)
    for one, name in zip(listed, mixers, strict=True):
        if not takes(name, "filter") and (one is None or isinstance(one, Mapping)):
            continue
        if not isinstance(one, Mapping) or not isinstance(one.get("type"), str):
            raise ValueError(
                "filter must be a dict such as {'type': 'implicit'}, or a list with one per layer; "
                f"got {one!r}."
            )


def _validate_options(field: str, given: Any, family: str, names: list[str]) -> None:
    """Check that the mixers of a family accept the arguments that are given for the family.

    Each argument must be accepted by a mixer of the model that belongs to the family. If the model
    has no mixer of the family, any mixer of the family may accept it.

    Args:
        field: name of the field that holds the arguments.
        given: value of the field.
        family: family of mixers that the field is for.
        names: name of the mixer in every layer.

    Raises:
        ValueError: if the field is not a dictionary, or no mixer accepts one of the arguments.
    """
    if given is None:
        return
    kinds = [name for name, kind in MIXERS.items() if kind.family == family]
    present = [name for name in kinds if name in names] or kinds
    accepted = list(dict.fromkeys(option for name in present for option in options_of(name)))
    if not isinstance(given, Mapping):
        raise ValueError(
            f"{field} must be a dict with some of {', '.join(accepted)}; got {given!r}."
        )
    for key in given:
        if key not in accepted:
            raise ValueError(unknown(f"key of {field}", key, accepted))
