"""Turn the inputs of `analyze` into one sequence, and run the model on it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from operator import index
from typing import Any

import torch
from torch import Tensor, nn

from gramian.analysis._keeping import kept
from gramian.ops.devices import has_float64
from gramian.tasks import Document, Encoder, documents_in

__all__ = [
    "SEQUENCES",
    "ModelInputs",
    "check_causal",
    "check_inputs",
    "check_model",
    "model_name",
    "positions_in",
    "read_inputs",
    "run_model",
    "token_texts",
]

SEQUENCES = ("input_ids", "inputs_embeds", "input_values")
_OFFSET = 8  # the most rows by which a table of positions differs from the number of positions
_ANSWERS = ("labels", "shift_labels")  # what a row has beside its inputs: nothing to read


@dataclass(frozen=True, eq=False)
class ModelInputs:
    """One sequence without padding, as a model reads it.

    Attributes:
        sequence: token ids (1, L) or floating-point numbers (1, L, size).
        key: the argument of the model that takes the sequence; None for the model's main input.
        options: further arguments with one integer for each token, (…, L), such as `position_ids`.
    """

    sequence: Tensor
    key: str | None = None
    options: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """The number of tokens."""
        return self.sequence.shape[1]

    @property
    def numbers(self) -> bool:
        """Whether the sequence is of floating-point numbers instead of token ids."""
        return self.sequence.is_floating_point()

    def first(self, length: int | None) -> ModelInputs:
        """Return the inputs of the first tokens; None returns all."""
        if length is None or length == self.length:
            return self
        options = {name: value[..., :length] for name, value in self.options.items()}
        return ModelInputs(self.sequence[:, :length], self.key, options)

    def repeated(self, length: int) -> ModelInputs:
        """Return inputs of `length` tokens: the first ones, repeated if there are too few.

        Options that increase by 1 from token to token continue to do so.
        """
        if length <= self.length:
            return self.first(length)
        times = -(-length // self.length)
        sequence = self.sequence.repeat(1, times, *[1] * (self.sequence.ndim - 2))
        options = {}
        for name, value in self.options.items():
            if bool((value.diff() == 1).all()):
                options[name] = value[..., :1] + torch.arange(length, device=value.device)
            else:
                options[name] = value.repeat(*[1] * (value.ndim - 1), times)[..., :length]
        return ModelInputs(sequence[:, :length], self.key, options)


def read_inputs(inputs: Any, tokenizer: Any) -> ModelInputs:
    """Return the one sequence that the inputs of `analyze` hold.

    Raises:
        TypeError: if the inputs have another type.
        ValueError: if they are empty, padded, or several sequences; if a text is given without a
            tokenizer; or if a mapping has a key that no sequence has.
    """
    if isinstance(inputs, ModelInputs):
        return inputs
    if isinstance(inputs, str | Document):
        return ModelInputs(_of_text(inputs, tokenizer))
    if isinstance(inputs, Mapping) or hasattr(inputs, "input_ids"):
        return _of_mapping(inputs if isinstance(inputs, Mapping) else vars(inputs))
    return ModelInputs(_one_sequence(_tensor(inputs)))


def _of_text(text: str | Document, tokenizer: Any) -> Tensor:
    if tokenizer is None:
        raise ValueError("a text needs a tokenizer: give `tokenizer`, or token ids.")
    documents = documents_in(text) if isinstance(text, str) else [text]
    if len(documents) > 1:
        raise ValueError(
            f"one sequence is needed; the text is {len(documents)} FASTA records, which "
            "`analyze_texts` reads one by one."
        )
    return _one_sequence(_tensor(Encoder(tokenizer)(documents[0]) if documents else []))


def _of_mapping(inputs: Mapping[str, Any]) -> ModelInputs:
    """Read a mapping such as tokenizers return."""
    given = {key: value for key, value in inputs.items() if value is not None}
    found = [key for key in SEQUENCES if key in given]
    if len(found) != 1:
        raise ValueError(
            f"a mapping must have one of {', '.join(SEQUENCES)}; got {', '.join(given) or 'none'}."
        )
    (key,) = found
    sequence = _one_sequence(_tensor(given.pop(key)), size=key != "input_ids")
    length = sequence.shape[1]
    mask = given.pop("attention_mask", None)
    if mask is not None:
        _check_mask(torch.as_tensor(mask), length)
    options = {name: _per_token(name, value, length) for name, value in given.items()}
    positions = options.get("position_ids")
    if mask is None and positions is not None and bool((positions.diff() != 1).any()):
        raise ValueError(
            "position_ids that do not increase by 1 from token to token need an attention_mask of "
            "ones: without a mask, some models read several packed sequences from them."
        )
    return ModelInputs(sequence, None if key == "input_ids" else key, options)


def _check_mask(mask: Tensor, length: int) -> None:
    shape = tuple(mask.shape)
    if shape not in ((length,), (1, length)):
        raise ValueError(
            f"attention_mask must have one number for each of the {length} tokens, ({length}) or "
            f"(1, {length}), because a model's own masks are measured; got shape {shape}."
        )
    if bool((mask != 1).any()):
        raise ValueError(
            "one sequence without padding is needed: the attention mask must be 1 everywhere; "
            "`analyze_texts` reads padded rows."
        )


def _per_token(name: str, value: Any, length: int) -> Tensor:
    """Return an argument that accompanies the tokens as a tensor (…, L)."""
    if name in _ANSWERS:
        raise ValueError(f"{name} are no inputs of a model; leave them out.")
    try:
        numbers = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        numbers = torch.empty(0)
    whole = not (numbers.is_floating_point() or numbers.is_complex())
    if not whole or not numbers.ndim or numbers.shape[-1] != length:
        raise ValueError(
            f"{name} cannot be read: besides the tokens and their mask, a mapping may have "
            f"integers for each of the {length} tokens, such as position_ids; got "
            f"{type(value).__name__} of shape {tuple(getattr(value, 'shape', ()))}."
        )
    alone = numbers.ndim > 1 or name == "cache_position"  # which has no dimension of the batch
    return numbers if alone else numbers[None]


def _tensor(values: Any) -> Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            "a text, token ids or continuous inputs are needed; got "
            f"{type(values).__name__}: {error}"
        ) from error


def _one_sequence(sequence: Tensor, size: bool | None = None) -> Tensor:
    """Return a sequence with a leading dimension of size 1.

    Args:
        sequence: (L), (1, L), (L, size) or (1, L, size).
        size: whether the elements are vectors. None means that floating-point numbers are.
    """
    if sequence.numel() == 0:
        raise ValueError("there is nothing to analyze: the input has no tokens.")
    vectors = sequence.is_floating_point() if size is None else size
    if vectors != sequence.is_floating_point() or sequence.is_complex():
        raise ValueError(
            f"token ids are integers and continuous inputs floating-point numbers; got "
            f"{sequence.dtype}."
        )
    dimensions = 2 if vectors else 1
    if sequence.ndim == dimensions:
        sequence = sequence[None]
    if sequence.ndim != dimensions + 1 or len(sequence) != 1:
        raise ValueError(
            "one sequence is needed, token ids (L) or (1, L) or numbers (L, size) or (1, L, size); "
            f"got shape {tuple(sequence.shape)}; `analyze_texts` reads several rows."
        )
    return sequence


def positions_in(
    at: Sequence[int] | range | None, every: int | None, number: int | None, length: int
) -> list[int]:
    """Return the positions at which to measure a sequence of a length.

    Args:
        at: The positions.
        every: A distance between positions, of which the first is 0.
        number: A number of positions, evenly spread over the sequence.
        length: The length of the sequence.

    Raises:
        TypeError: if a position is not an integer.
        ValueError: if more than one of these is given, or if one is out of range.
    """
    if sum(choice is not None for choice in (at, every, number)) > 1:
        raise ValueError(
            "give one of `at` (positions), `every` (a distance) and `positions` (a number), not "
            "several."
        )
    if every is not None and every < 1:
        raise ValueError(f"every must be at least 1; got {every}.")
    if number is not None and number < 1:
        raise ValueError(f"positions must be at least 1; got {number}.")
    if number is not None:
        count = min(number, length)
        return [(2 * k + 1) * length // (2 * count) for k in range(count)]
    try:
        positions = list(range(0, length, every or 1)) if at is None else list(map(index, at))
    except TypeError as error:
        raise TypeError(f"positions must be integers; got {at!r}.") from error
    if not positions or min(positions) < 0 or max(positions) >= length:
        raise ValueError(
            f"positions must lie in 0 … {length - 1} for {length} tokens, and there must be one; "
            f"got {positions}."
        )
    return positions


def check_model(model: nn.Module) -> None:
    """Check that a model can run, and that it reads one sequence.

    Raises:
        TypeError: if the model is not a module.
        ValueError: if the model is an encoder-decoder, if it has no weights in memory, or if their
            device has no double precision.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a model to analyze must be a torch module; got {type(model).__name__}.")
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder model; a causal model of one sequence "
            "is needed, such as a decoder-only language model."
        )
    weights = list(model.parameters())
    offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())
    if weights and all(weight.is_meta for weight in weights) and not offloaded:
        raise ValueError(
            f"the weights of {type(model).__name__} are on the device 'meta', which holds no "
            "numbers; load them first."
        )
    for device in {weight.device for weight in weights}:
        if not has_float64(device):
            raise ValueError(
                f"an analysis measures in float64, which the device '{device}' does not have; move "
                "the model to the CPU: model.to('cpu')."
            )


def run_model(model: Any, inputs: ModelInputs, *, last_logits_only: bool = True) -> Any:
    """Run a model on a sequence without a cache, and return its output.

    Args:
        model: the model.
        inputs: the sequence.
        last_logits_only: whether the head of a language model computes the logits of the last token
            only. Everything before the head sees the whole sequence.

    Raises:
        ValueError: if the model reads other inputs, or fewer tokens, or another vocabulary.
    """
    check_model(model)
    name = getattr(model, "main_input_name", None)
    device = _device(model)
    sequence = inputs.sequence.to(device)
    options: dict[str, Any] = {key: value.to(device) for key, value in inputs.options.items()}
    if name is None:
        if options or inputs.key not in (None, "input_values"):
            raise _unread(model, [inputs.key or "", *options])
        return model(sequence)
    check_inputs(model, inputs)
    name = inputs.key or name
    accepted = inspect.signature(model.forward).parameters
    unread = [key for key in (name, *options) if key not in accepted]
    if unread and not (unread == [name] and inputs.key is None):
        raise _unread(model, unread)
    if _caches(model, accepted):
        options["use_cache"] = False
    if not inputs.numbers and "attention_mask" in accepted:
        options["attention_mask"] = torch.ones_like(sequence)
    if "input_ids_2" in accepted:  # the base model of a classifier of pairs reads one sequence
        model = model.base_model
    with ExitStack() as stack:
        if last_logits_only:
            stack.enter_context(_last_logits_only(model))
        stack.enter_context(_known_length(model, inputs.length))
        return model(**{name: sequence}, **options)


def check_causal(model: nn.Module, inputs: ModelInputs) -> None:
    """Check that a model's first outputs do not depend on the last token.

    Models whose outputs are no tensor with one row for each token are not checked.

    Raises:
        ValueError: if they do.
    """
    length = inputs.length
    if length < 2:
        return
    sequence = inputs.sequence.clone()
    last = sequence[0, -1]
    others = sequence[0, :-1]
    differs = others[(others != last).reshape(length - 1, -1).any(-1)]
    if not len(differs):
        return
    sequence[0, -1] = differs[0]
    changed = ModelInputs(sequence, inputs.key, inputs.options)
    seen: list[Tensor] = []
    for given in (inputs, changed):
        with kept(model):
            found = _rows(run_model(model, given, last_logits_only=False), length)
        if found is None:
            return
        seen.append(found[:, :-1])
    one, other = (found.double() for found in seen)
    rounding = torch.finfo(seen[0].dtype).eps
    if float((one - other).norm()) > 10 * rounding * float(one.norm()):
        raise ValueError(
            f"{type(model).__name__} is not causal: its outputs depend on later tokens, as those "
            "of encoders do; a causal model is needed."
        )


def _rows(output: Any, length: int) -> Tensor | None:
    """Return the first tensor of an output that has a row for each token, (1, L, …)."""
    if isinstance(output, Tensor):
        fits = output.ndim >= 2 and output.shape[:2] == (1, length) and output.is_floating_point()
        return output if fits else None
    values = output.values() if isinstance(output, Mapping) else output
    if isinstance(values, Mapping | str) or not hasattr(values, "__iter__"):
        return None
    return next((one for one in (_rows(v, length) for v in values) if one is not None), None)


def _device(model: nn.Module) -> torch.device:
    """Return the device of the first weights that are in memory."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def check_inputs(model: Any, inputs: ModelInputs) -> None:
    """Check that a model reads such a sequence, of this length and vocabulary.

    Raises:
        ValueError: if it does not.
    """
    name = getattr(model, "main_input_name", None)
    if name is None:
        return
    embedded = inputs.key == "inputs_embeds"
    if not embedded and name == ("input_ids" if inputs.numbers else "input_values"):
        kinds = ("token ids", "continuous inputs")
        wanted, given = kinds if inputs.numbers else kinds[::-1]
        raise ValueError(f"this {type(model).__name__} reads {wanted}; it was given {given}.")
    _check_vocabulary(model, inputs)
    _check_length(model, inputs.length)


def _check_vocabulary(model: Any, inputs: ModelInputs) -> None:
    find: Any = getattr(model, "get_input_embeddings", None)
    try:
        embedding = find() if find is not None and not inputs.numbers else None
    except NotImplementedError:  # transformers' way to say that there is none
        embedding = None
    known = getattr(embedding, "num_embeddings", None)
    if known is None:
        return
    low, high = int(inputs.sequence.min()), int(inputs.sequence.max())
    if not 0 <= low <= high < known:
        raise ValueError(
            f"token ids must lie in 0 … {known - 1}, the model's vocabulary; got {low} … {high}."
        )


def _check_length(model: Any, length: int) -> None:
    """Check that a sequence is not longer than the model's table of positions."""
    limit = _limit(model)
    if limit is None or length <= limit - _OFFSET:
        return
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if not isinstance(module, nn.Embedding) or not ("pos" in name or name == "wpe"):
            continue
        if limit <= module.num_embeddings <= limit + _OFFSET:
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1
            known = min(limit, module.num_embeddings - skipped)
            if length > known:
                raise _too_long(model, length, known)


@contextmanager
def _known_length(model: Any, length: int) -> Iterator[None]:
    """Explain the errors of a model that is given more tokens than it has positions for."""
    limit = _limit(model)
    try:
        yield
    except (IndexError, RuntimeError) as error:
        if limit is not None and length > limit and "alloc" not in str(error):
            raise _too_long(model, length, limit) from error
        raise


def _limit(model: Any) -> int | None:
    """Return the number of tokens that a configuration names as the most, or None."""
    config = getattr(model, "config", None)
    values = [getattr(config, key, None) for key in ("max_position_embeddings", "max_seq_len")]
    return next((value for value in values if isinstance(value, int)), None)


def _too_long(model: Any, length: int, limit: int) -> ValueError:
    return ValueError(
        f"{type(model).__name__} has positions for at most {limit:,} tokens; got {length:,}; "
        "`horizon` limits how many are read."
    )


def _unread(model: Any, names: list[str]) -> ValueError:
    wanted = ", ".join(name for name in names if name)
    return ValueError(
        f"{type(model).__name__} does not read {wanted}, so the result would not depend on it; "
        "leave it out of the inputs."
    )


def _caches(model: Any, accepted: Mapping[str, inspect.Parameter]) -> bool:
    """Return whether a model takes `use_cache`, itself or as an argument that it passes on."""
    if "use_cache" in accepted:
        return True
    passes_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    return passes_on and any(hasattr(config, "use_cache") for config in _configs(model.config))


def _configs(config: Any) -> Iterator[Any]:
    """Yield a configuration and the configurations inside it."""
    yield config
    for key in getattr(config, "sub_configs", None) or ():
        inner = getattr(config, key, None)
        if inner is not None:
            yield from _configs(inner)


@contextmanager
def _last_logits_only(model: Any) -> Iterator[None]:
    """Give the head of a language model the last token only.

    The option `logits_to_keep` of transformers does not serve here, because some models then run
    their last layers on the last token only.
    """
    find: Any = getattr(model, "get_output_embeddings", None)
    try:
        head = None if find is None else find()
    except (AttributeError, NotImplementedError):
        head = None
    if not isinstance(head, nn.Linear):
        yield
        return

    def cut(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        one = len(args) == 1 and isinstance(args[0], Tensor) and args[0].ndim == 3
        return (args[0][:, -1:],) if one else None

    handle = head.register_forward_pre_hook(cut)
    try:
        yield
    finally:
        handle.remove()


def model_name(model: nn.Module) -> str:
    """Return the last part of the name under which a model was opened, or its class."""
    path = getattr(getattr(model, "config", None), "_name_or_path", "")
    return str(path).rstrip("/").rsplit("/", 1)[-1] or type(model).__name__


def token_texts(inputs: ModelInputs, tokenizer: Any) -> list[str]:
    """Return the text of every token. Without a tokenizer it is the number of the token."""
    if inputs.numbers:
        return [str(i) for i in range(inputs.length)]
    ids = inputs.sequence[0].tolist()
    return [str(i) if tokenizer is None else tokenizer.decode([i]) for i in ids]
