r"""Read Hyena language models of safari (`SimpleLMHeadModel`, layer `hyena`) and HyenaDNA.

Both models consist of an embedding, prenorm blocks with layer norms, a last layer norm and a tied
head. A block has a Hyena mixer and an MLP with tanh-GELU and biases. The models differ in three
points that their configurations do not state. The `shift` of the filter's window is 0.05 in
HyenaDNA and 0 in safari. HyenaDNA always adds the filter's bias. If the order is above 2, safari
numbers filters by channel and then by gate, and HyenaDNA by gate and then by channel. The dropout
inside a published layer is `hyena_input_dropout`.

Folders of a fine-tuned HyenaDNA have a linear head `score` in place of the output projection. The
published `HyenaDNAForSequenceClassification` applies the head to every position and returns the
logits of one position. If padding follows the tokens, this is the position before the first padding
token; otherwise it is the last position. In both cases it is the last real token. Gramian finds
the same token from the mask, with `pooling="last"`. The published model does not mask padding on
the left, which its tokenizer makes by default, so this padding changes the logits. In Gramian, the
logits are the same as without padding. There is no published class for tokens. Users call their own
class `HyenaDNAForTokenClassification`; its linear head is named `score` or `classifier`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from gramian.checkpoints._format import (
    Format,
    Shapes,
    has_head,
    refuse_unless,
    register,
    setting,
    size,
    tied,
)
from gramian.checkpoints.tokenizers import DNATokenizer
from gramian.models import (
    GramianConfig,
    GramianForCausalLM,
    GramianForSequenceClassification,
    GramianForTokenClassification,
    GramianPreTrainedModel,
)

__all__ = ["HyenaDNA", "SafariHyena"]

EMBEDDING = "backbone.embeddings.word_embeddings.weight"
HEAD = "lm_head.weight"
_PREFIXES = ("", "model.", "hyena.")
_METRICS = ("train_torchmetrics.", "val_torchmetrics.", "test_torchmetrics.")
_DNA_TOKENS = 12
_KINDS = ("weight", "bias")
_CLASSES: dict[str, type[GramianPreTrainedModel]] = {
    "HyenaDNAForCausalLM": GramianForCausalLM,
    "HyenaDNAForSequenceClassification": GramianForSequenceClassification,
    "HyenaDNAForTokenClassification": GramianForTokenClassification,
}
_SCORES = {
    GramianForSequenceClassification: ("score",),
    GramianForTokenClassification: ("score", "classifier"),
}
"""For each class of classifiers, the possible names of its linear head in a checkpoint."""


@register
class SafariHyena(Format):
    """The format of safari's `SimpleLMHeadModel` with implicit filters."""

    name = "safari"
    embedding = EMBEDDING
    filter_class: ClassVar[str] = "hyena-filter"
    default_shift: ClassVar[float] = 0.0

    def __init__(self, shapes: Shapes, config: Mapping[str, Any]) -> None:
        super().__init__(shapes, config)
        config = self._as_safari(config)
        layer = setting(config, "layer", Mapping)
        self.config, self.layer = config, layer
        refuse_unless(layer, "_name_", "hyena")
        refuse_unless(layer, "filter_cls", self.filter_class)
        refuse_unless(layer, "activation", "id", "identity", "linear")
        for name in ("num_heads", "inner_factor", "num_blocks"):
            refuse_unless(layer, name, 1)
        for name in ("outer_mixing", "post_order_ffn", "bidirectional", "linear_mixer"):
            refuse_unless(layer, name, False)
        refuse_unless(config, "max_position_embeddings", 0)
        refuse_unless(config, "attn_layer_idx", [])
        self.width = size(config, "d_model")
        self.layers = size(config, "n_layer")
        self.inner = size(config, "d_inner", 4 * self.width)
        self.tokens = size(config, "vocab_size")
        multiple = size(config, "pad_vocab_size_multiple", 1)
        self.vocabulary = -(-self.tokens // multiple) * multiple
        self.order = size(layer, "order", 2)
        self.length = size(layer, "l_max")
        self.short = size(layer, "short_filter_order", 3)
        self.filters = (self.order - 1) * self.width

    @classmethod
    def strip(cls, names: Iterable[str]) -> dict[str, str] | None:
        names = list(names)
        prefix = next((p for p in _PREFIXES if p + EMBEDDING in names), None)
        if prefix is None:
            return None
        stripped = {}
        for name in names:
            if not name.startswith(_METRICS):  # counters that Lightning stores beside the weights
                short = name.removeprefix(prefix)
                # The wrapper of a module that recomputes its activations calls the module `layer`.
                for part in (".mixer.layer.", ".mlp.layer."):
                    short = short.replace(part, part.removesuffix("layer."))
                stripped[name] = short
        return stripped if cls._owns(stripped.values()) else None

    @classmethod
    def _owns(cls, names: Iterable[str]) -> bool:
        return not any(".filter_fn.ab" in name for name in names)

    def _as_safari(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the part of a configuration that describes the model, with safari's names."""
        inner = config.get("model")
        return inner if "layer" not in config and isinstance(inner, Mapping) else config

    def expected(self) -> Shapes:
        width, inner = self.width, self.inner
        shapes: Shapes = {EMBEDDING: (self.vocabulary, width)}
        for i in range(self.layers):
            block = f"backbone.layers.{i}."
            for norm in ("norm1", "norm2"):
                shapes |= _affine(f"{block}{norm}", width)
            shapes |= _affine(f"{block}mlp.fc1", inner, width)
            shapes |= _affine(f"{block}mlp.fc2", width, inner)
            shapes |= self._mixer_shapes(f"{block}mixer.")
        shapes |= _affine("backbone.ln_f", width)
        return shapes | self._head_shapes()

    def _head_shapes(self) -> Shapes:
        head = has_head(self.config, self.shapes, HEAD)
        return {HEAD: (self.vocabulary, self.width)} if head else {}

    def _mixer_shapes(self, mixer: str) -> Shapes:
        width, projected = self.width, (self.order + 1) * self.width
        return {
            **_affine(f"{mixer}in_proj", projected, width),
            f"{mixer}short_filter.weight": (projected, 1, self.short),
            f"{mixer}short_filter.bias": (projected,),
            **self._filter_shapes(f"{mixer}filter_fn."),
            **_affine(f"{mixer}out_proj", width, width),
        }

    def _filter_shapes(self, filter: str) -> Shapes:
        features = size(self.layer, "emb_dim", 3)
        hidden = size(self.layer, "filter_order", 64)
        shapes: Shapes = {
            f"{filter}bias": (self.filters,),
            f"{filter}pos_emb.z": (1, self.length, features),
            f"{filter}pos_emb.t": (1, self.length, 1),
            f"{filter}modulation.deltas": (1, 1, self.filters),
        }
        last = 2 * self._hidden_layers
        for i in range(0, last, 2):
            shapes |= _affine(
                f"{filter}implicit_filter.{i}", hidden, features if i == 0 else hidden
            )
        shapes[f"{filter}implicit_filter.{last}.weight"] = (self.filters, hidden)
        frequencies = self._frequencies(filter, self.shapes)
        return shapes | dict.fromkeys(frequencies, (1, hidden))

    def _frequencies(self, filter: str, found: Iterable[str]) -> list[str]:
        """Return the names of the frequencies of a filter's sines.

        All layers of a filter share one tensor of frequencies. `torch.save` keeps the name of this
        tensor in every layer, but safetensors keeps only one of the names. So the names in `found`
        are returned, or all names if `found` has none of them.

        Args:
            filter: prefix of the filter's names.
            found: names of the tensors in the checkpoint.
        """
        if not self._trains_frequency:
            return []
        numbers = range(1, 2 * self._hidden_layers, 2)
        names = [f"{filter}implicit_filter.{i}.freq" for i in numbers]
        found = set(found)
        return [name for name in names if name in found] or names

    @property
    def _hidden_layers(self) -> int:
        return setting(self.layer, "num_inner_mlps", int, 2) + 1

    @property
    def _trains_frequency(self) -> bool:
        return setting(self.layer, "train_freq", bool, True)

    @property
    def _has_bias(self) -> bool:
        return setting(self.layer, "bias", bool, True)

    def _filter_config(self) -> dict[str, Any]:
        layer, number = self.layer, (int, float)
        trained = setting(layer, "lr_pos_emb", number, 1e-5) != 0
        return {
            "type": "implicit",
            "embedding_features": size(layer, "emb_dim", 3),
            "hidden": size(layer, "filter_order", 64),
            "inner_layers": self._hidden_layers - 1,
            "frequency": setting(layer, "w", number, 1),
            "train_frequency": self._trains_frequency,
            "fast_decay": setting(layer, "fast_decay_pct", number, 0.3),
            "slow_decay": setting(layer, "slow_decay_pct", number, 1.5),
            "decay_target": setting(layer, "target", number, 1e-2),
            "shift": setting(layer, "shift", number, self.default_shift),
            "modulate": setting(layer, "modulate", bool, True),
            "normalized": setting(layer, "normalized", bool, False),
            "bias": self._has_bias,
            "trainable_time": trained,
            "stored_time": not trained,
            "lr": setting(layer, "lr", number, None),
        }

    def model_config(self, weights: Mapping[str, Tensor]) -> GramianConfig:
        config, number = self.config, (int, float)
        return GramianConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            mixers="hyena",
            filter=self._filter_config(),
            max_position_embeddings=self.length,
            hyena_order=self.order,
            hyena_input_dropout=setting(self.layer, "dropout", number, 0.0),
            short_kernel=self.short,
            norm="layer",
            rms_norm_eps=setting(config, "layer_norm_epsilon", number, 1e-5),
            dropout=setting(config, "resid_dropout", number, 0.0),
            embedding_dropout=setting(config, "embed_dropout", number, 0.1),
            residual_in_fp32=setting(config, "residual_in_fp32", bool, False),
            intermediate_size=self.inner,
            gated_mlp=False,
            mlp_bias=True,
            hidden_act="gelu_pytorch_tanh",
            tie_word_embeddings=tied(self.config, weights, EMBEDDING, HEAD),
            **self._more_config(),
        )

    def _more_config(self) -> dict[str, Any]:
        """Return the arguments of the configuration that only some formats have."""
        return {}

    def translate(self, weights: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        yield {"model.embed_tokens.weight": weights[EMBEDDING]}
        yield self._translate_head(weights)
        yield {f"model.norm.{kind}": weights[f"backbone.ln_f.{kind}"] for kind in _KINDS}
        for i in range(self.layers):
            yield self._translate_layer(weights, i)

    def _translate_head(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if tied(self.config, weights, EMBEDDING, HEAD):
            return {}
        return {"lm_head.weight": weights[HEAD]}

    def _translate_layer(self, weights: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
        block, ours = f"backbone.layers.{layer}.", f"model.layers.{layer}."
        names = {
            "norm1": "mixer_norm",
            "norm2": "mlp_norm",
            "mlp.fc1": "mlp.up_proj",
            "mlp.fc2": "mlp.down_proj",
            "mixer.in_proj": "mixer.in_proj",
            "mixer.out_proj": "mixer.out_proj",
        }
        state = {
            f"{ours}{name}.{kind}": weights[f"{block}{theirs}.{kind}"]
            for theirs, name in names.items()
            for kind in _KINDS
        }
        # In Gramian, tap 0 acts on the present input; in safari, the last tap does.
        taps = weights[f"{block}mixer.short_filter.weight"]
        state[f"{ours}mixer.short.weight"] = taps.squeeze(1).flip(-1)
        state[f"{ours}mixer.short.bias"] = weights[f"{block}mixer.short_filter.bias"]
        return state | self._translate_mixer(weights, f"{block}mixer.", f"{ours}mixer.")

    def _translate_mixer(
        self, weights: Mapping[str, Tensor], theirs: str, ours: str
    ) -> dict[str, Tensor]:
        """Translate the filter of a layer, and the parts of its mixer that not every Hyena has.

        Args:
            weights: the checkpoint's tensors.
            theirs: prefix of the mixer's names in the checkpoint.
            ours: prefix of the mixer's names in the Gramian model.
        """
        theirs, ours = f"{theirs}filter_fn.", f"{ours}filter."
        _check_time(weights[f"{theirs}pos_emb.t"], f"{theirs}pos_emb.t")
        channels = self._channel_order()
        deltas = weights[f"{theirs}modulation.deltas"]
        state = {
            f"{ours}features": weights[f"{theirs}pos_emb.z"][0],
            f"{ours}decay": deltas.abs().flatten()[channels],
        }
        last = 2 * self._hidden_layers
        for i in range(0, last, 2):
            for kind in _KINDS:
                name = f"{ours}layers.{i // 2}.{kind}"
                state[name] = weights[f"{theirs}implicit_filter.{i}.{kind}"]
        names = self._frequencies(theirs, weights)
        frequencies = [weights[name].flatten() for name in names]
        if frequencies:
            if not all(torch.equal(frequencies[0], other) for other in frequencies):
                raise ValueError(
                    f"{theirs}implicit_filter has sines of different frequencies; one set of them "
                    "is shared by all layers of a published filter."
                )
            state[f"{ours}frequency"] = frequencies[0]
        else:
            frequency = float(setting(self.layer, "w", (int, float), 1))
            hidden = len(state[f"{ours}layers.0.bias"])
            state[f"{ours}frequency"] = torch.full((hidden,), frequency)
        output = weights[f"{theirs}implicit_filter.{last}.weight"]
        state[f"{ours}output.weight"] = output[channels]
        if self._has_bias:
            state[f"{ours}bias"] = weights[f"{theirs}bias"][channels]
        return state

    def _channel_order(self) -> Tensor:
        """Return for each filter of the Gramian model its index in the checkpoint.

        In the Gramian model, the filter for channel c and gate n has the index `c (order - 1) + n`.
        """
        return torch.arange(self.filters)


@register
class HyenaDNA(SafariHyena):
    """The format of HyenaDNA, in Lightning checkpoints and in Hugging Face folders.

    A folder may hold a language model or a classifier. The entry `architectures` of the
    configuration says which.
    """

    name = "hyenadna"
    default_shift = 0.05

    @classmethod
    def meant_by(cls, config: Mapping[str, Any]) -> bool:
        """Return whether the configuration of a Hyena language model describes a HyenaDNA.

        A configuration describes a HyenaDNA if its `model_type` is "hyenadna". If there is no
        `model_type`, the size of the vocabulary must be the size of the DNA tokenizer's vocabulary.
        """
        inner = config.get("model")
        config = inner if "layer" not in config and isinstance(inner, Mapping) else config
        kind = config.get("model_type")
        return kind == "hyenadna" or (kind is None and config.get("vocab_size") == _DNA_TOKENS)

    def _as_safari(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        if "max_seq_len" not in config:
            return super()._as_safari(config)
        refuse_unless(config, "layer_norm_epsilon", 1e-5)  # the norms of the blocks always use 1e-5
        return {
            "d_model": size(config, "d_model", 256),
            "n_layer": size(config, "n_layer", 12),
            "d_inner": config.get("d_inner"),
            "vocab_size": size(config, "vocab_size", _DNA_TOKENS),
            "pad_vocab_size_multiple": size(config, "pad_vocab_size_multiple", 8),
            "embed_dropout": config.get("embed_dropout"),
            "residual_in_fp32": True,
            "tie_word_embeddings": config.get("tie_word_embeddings"),
            "layer": {
                "order": size(config, "hyena_order", 2),
                "dropout": config.get("hyena_dropout"),
                "l_max": config["max_seq_len"],
                "emb_dim": size(config, "emb_dim", 3),
                "filter_order": size(config, "filter_order", 64),
                "num_inner_mlps": setting(config, "num_inner_mlps", int, 2),
                "short_filter_order": size(config, "short_filter_order", 3),
                "train_freq": setting(config, "train_freq", bool, True),
                "w": setting(config, "activation_freq", (int, float), 1),
                "lr_pos_emb": 0.0,
            },
        }

    def __init__(self, shapes: Shapes, config: Mapping[str, Any]) -> None:
        super().__init__(shapes, config)
        self.given = config
        self.kind = self._class(config)
        if self.short != 3:
            raise ValueError(
                "a HyenaDNA has short filters of 3 taps: with others its published code pads as "
                f"for 3 and is not causal; got short_filter_order={self.short}."
            )

    def _class(self, config: Mapping[str, Any]) -> type[GramianPreTrainedModel]:
        """Return the Gramian class for the class that the configuration names.

        If the configuration names no class, return the class of language models.
        """
        names = setting(config, "architectures", list, [])
        found = next((_CLASSES[name] for name in names if name in _CLASSES), None)
        if names and found is None:
            raise ValueError(
                f"architectures in the checkpoint's configuration must name one of "
                f"{', '.join(_CLASSES)}; got {', '.join(map(str, names))}."
            )
        if found is None and HEAD not in self.shapes and "score.weight" in self.shapes:
            raise ValueError(
                "the checkpoint has score.weight, the head of a classifier, and its configuration "
                "must say of which kind: architectures lacks HyenaDNAForSequenceClassification or "
                "HyenaDNAForTokenClassification."
            )
        if found is GramianForTokenClassification:
            refuse_unless(config, "problem_type", "single_label_classification")
        return found or GramianForCausalLM

    def model_class(self) -> type[GramianPreTrainedModel]:
        return self.kind

    def _labels(self) -> dict[str, Any]:
        """Return the names of the classes.

        Configurations leave out the names if they are transformers' default names of two classes.
        """
        names = setting(self.given, "id2label", Mapping, {})
        if not names:
            count = size(self.given, "num_labels", 2)
            names = {number: f"LABEL_{number}" for number in range(count)}
        wrong = [key for key in names if not str(key).isdecimal()]
        if wrong:
            raise ValueError(
                "id2label in the checkpoint's configuration must have numbers as keys; got "
                f"{wrong[0]!r}."
            )
        numbers = {int(key): str(name) for key, name in names.items()}
        given = setting(self.given, "label2id", Mapping, None)
        back = {name: number for number, name in numbers.items()} if given is None else dict(given)
        return {"id2label": numbers, "label2id": back}

    def _score(self) -> str:
        """Return the name of the classifier's head."""
        names = _SCORES[self.kind]
        return next((name for name in names if f"{name}.weight" in self.shapes), names[0])

    def _head_shapes(self) -> Shapes:
        if self.kind is GramianForCausalLM:
            return super()._head_shapes()
        score, labels = self._score(), len(self._labels()["id2label"])
        shapes: Shapes = {f"{score}.weight": (labels, self.width)}
        if f"{score}.bias" in self.shapes:
            shapes[f"{score}.bias"] = (labels,)
        return shapes

    def _translate_head(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.kind is GramianForCausalLM:
            return super()._translate_head(weights)
        score = self._score()
        weight = weights[f"{score}.weight"]
        bias = weights.get(f"{score}.bias", weight.new_zeros(len(weight)))
        return {"score.weight": weight, "score.bias": bias}

    @property
    def _has_bias(self) -> bool:
        return True

    def _channel_order(self) -> Tensor:
        return torch.arange(self.filters).reshape(self.order - 1, self.width).T.flatten()

    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        if self.tokens != _DNA_TOKENS:
            return None
        classifies = self.kind is not GramianForCausalLM
        return DNATokenizer(model_max_length=self.length, append_end=classifies)

    def _more_config(self) -> dict[str, Any]:
        more: dict[str, Any] = {}
        if self.tokens == _DNA_TOKENS:
            more |= {"pad_token_id": 4, "bos_token_id": 2, "eos_token_id": 1}
        if self.kind is not GramianForCausalLM:
            problem = setting(self.given, "problem_type", str, None)
            more |= {"pooling": "last", "problem_type": problem, **self._labels()}
        return more


def _affine(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _check_time(time: Tensor, name: str) -> None:
    """Raise a ValueError unless the times of a filter's window run evenly from 0 to 1."""
    expected = torch.linspace(0, 1, time.numel())
    tolerance = 2 * torch.finfo(time.dtype).eps
    if not torch.allclose(time.flatten().float(), expected, rtol=tolerance, atol=tolerance):
        raise ValueError(f"{name} does not run evenly from 0 to 1.")
