"""Run exported programs on numpy arrays, and carry the state from call to call.

ONNX files run in onnxruntime, and `torch.export` programs run in PyTorch. Besides numpy, no other
package is needed, and no model is built.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gramian.export._generation import Rules

__all__ = ["ExportedModel", "ExportedRecurrence", "ExportedState"]

_Arrays = dict[str, np.ndarray]
_Program = Callable[..., tuple[np.ndarray, _Arrays]]


@dataclass(frozen=True)
class ExportedState:
    """The state of an exported program, which is passed from call to call.

    Attributes:
        tensors: the arrays that `export.json` lists, {name: (batch, …)}.
        taken: number of tokens or samples that the longest sequence has seen, padding excluded. If
            neither it nor `counts` is given, it is read from the state of attention. Without
            attention, it is None.
        counts: number of tokens or samples that each sequence has seen, (batch), integers; by
            default, `taken` for all sequences. It is None if `taken` is None.
    """

    tensors: dict[str, np.ndarray]
    taken: int | None = None
    counts: np.ndarray | None = None

    def __post_init__(self) -> None:
        counts = self.counts
        if counts is None and self.taken is not None:
            counts = np.full(self.batch_size, self.taken)
        if counts is None:
            counts = next((t for n, t in self.tensors.items() if _counts(n, t)), None)
        if counts is not None and len(counts):
            object.__setattr__(self, "counts", counts)
            object.__setattr__(self, "taken", int(counts.max()))

    @property
    def batch_size(self) -> int:
        """The number of sequences."""
        return len(next(iter(self.tensors.values())))

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def _counts(name: str, tensor: np.ndarray) -> bool:
    """Return whether a tensor of a state holds the number of tokens that attention has seen."""
    return name.endswith(".real") and tensor.ndim == 1 and np.issubdtype(tensor.dtype, np.integer)


class _Exported:
    """The two programs in a folder, and their description."""

    _kinds: tuple[str, ...]
    _maker: str

    def __init__(
        self,
        folder: str | Path,
        *,
        threads: int | None = None,
        providers: list[str] | None = None,
    ) -> None:
        folder = Path(folder)
        file = folder / "export.json"
        if not file.is_file():
            raise FileNotFoundError(f"{folder} holds nothing exported: it has no export.json.")
        self.description: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        kind = self.description.get("kind")
        if kind not in self._kinds:
            raise ValueError(
                f"{folder} holds a {kind}; {type(self).__name__} runs what {self._maker} wrote."
            )
        self.context: int | None = self.description["context"]
        self._states: list[dict[str, Any]] = self.description["states"]
        self._mask: dict[str, Any] | None = self.description.get("mask")
        self._dtype = np.dtype(self.description["input"]["dtype"])
        if self.description["format"] == "onnx":
            self._step, self._prefill = (
                self._onnx(folder / self.description[name], threads, providers)
                for name in ("step", "prefill")
            )
        else:
            self._step, self._prefill = (
                self._torch(folder / self.description[name]) for name in ("step", "prefill")
            )

    def initial_state(self, batch_size: int = 1) -> ExportedState:
        """Return the zero state, which is the state before the first token.

        Args:
            batch_size: Number of sequences, at least 1.

        Raises:
            ValueError: if `batch_size` is below 1.
        """
        if batch_size < 1:
            raise ValueError(
                f"batch_size must be a positive number of sequences; got {batch_size}."
            )
        return ExportedState(
            {
                state["input"]: np.zeros((batch_size, *state["shape"][1:]), dtype=state["dtype"])
                for state in self._states
            },
            taken=0,
        )

    def _run_step(
        self, given: np.ndarray, state: ExportedState
    ) -> tuple[np.ndarray, ExportedState]:
        counts = self._counts_after(given, state, 1)
        output, tensors = self._step(given, state.tensors)
        return output, ExportedState(tensors, counts=counts)

    def _run_prefill(
        self, given: np.ndarray, state: ExportedState, real: np.ndarray
    ) -> tuple[np.ndarray, ExportedState]:
        """Run `prefill` where `real` (batch, length) is false for padding."""
        counts = self._counts_after(given, state, real.sum(1))
        mask = None if self._mask is None else real.astype(self._mask["dtype"])
        output, tensors = self._prefill(given, state.tensors, mask)
        return output, ExportedState(tensors, counts=counts)

    def _counts_after(self, given: np.ndarray, state: ExportedState, more: Any) -> Any:
        """Return the numbers of tokens of the sequences after a call, if they are known."""
        if len(given) != state.batch_size:
            raise ValueError(f"the input has {len(given)} sequences, the state {state.batch_size}.")
        counts = None if state.counts is None else state.counts + more
        if self.context is not None and counts is not None and max(counts) > self.context:
            raise ValueError(
                f"attention here has room for {self.context} tokens, {max(counts)} are wanted: "
                "export again with a larger context."
            )
        return counts

    def _read_mask(self, mask: Any, shape: tuple[int, int]) -> np.ndarray:
        """Return a mask as booleans (batch, length)."""
        if mask is None:
            return np.ones(shape, dtype=bool)
        if self._mask is None:
            raise ValueError(
                f"the programs of this {self.description['kind']} take no mask: give sequences of "
                "one length."
            )
        name = self._mask["name"]
        array = _array(name, mask)
        wrong = array[~np.isin(array, (0, 1))]
        if array.shape != shape or wrong.size:
            found = f"{array.dtype} {array.shape}"
            if array.shape == shape:
                found += f" with the value {wrong[0]}"
            raise ValueError(
                f"{name} must be {shape} of ones for tokens and zeros for padding; got {found}."
            )
        return array.astype(bool)

    def _onnx(self, file: Path, threads: int | None, providers: list[str] | None) -> _Program:
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError(
                'running ONNX files needs onnxruntime: pip install "gramian[export]".'
            ) from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(
            str(file), options, providers=providers or ["CPUExecutionProvider"]
        )
        name = self.description["input"]["name"]
        hidden = self._mask["name"] if self._mask else ""
        outputs = [self.description["output"]["name"], *(s["output"] for s in self._states)]
        inputs = [state["input"] for state in self._states]

        def run(
            given: np.ndarray, tensors: _Arrays, mask: np.ndarray | None = None
        ) -> tuple[np.ndarray, _Arrays]:
            masks = {} if mask is None else {hidden: mask}
            first, *rest = session.run(outputs, {name: given, **masks, **tensors})
            return first, dict(zip(inputs, rest, strict=True))

        return run

    def _torch(self, file: Path) -> _Program:
        import torch

        module = torch.export.load(file).module()

        def run(
            given: np.ndarray, tensors: _Arrays, mask: np.ndarray | None = None
        ) -> tuple[np.ndarray, _Arrays]:
            masks = () if mask is None else (torch.from_numpy(mask),)
            states = {name: torch.from_numpy(array) for name, array in tensors.items()}
            with torch.no_grad():
                output, after = module(torch.from_numpy(given), states, *masks)
            return output.numpy(), {name: tensor.numpy() for name, tensor in after.items()}

        return run


class ExportedModel(_Exported):
    """A language model that `gramian.export.export_model` wrote.

    Args:
        folder: The folder that `export_model` wrote.
        threads: Number of threads of onnxruntime within one operation; by default, onnxruntime
            chooses the number.
        providers: Execution providers of onnxruntime; by default, the CPU.

    Raises:
        FileNotFoundError: if the folder does not exist or holds no export.
        ImportError: if the folder holds ONNX files and onnxruntime is missing.
        ValueError: if the folder holds an export of another kind.
    """

    _kinds = ("language model",)
    _maker = "export_model"

    def prefill(
        self,
        input_ids: Any,
        state: ExportedState | None = None,
        *,
        attention_mask: Any = None,
        chunk_size: int = 1024,
    ) -> tuple[np.ndarray, ExportedState]:
        """Read prompts of any length in chunks.

        Padding does not count as time. So a row has the logits and the state that it would have
        without padding.

        Args:
            input_ids: Token ids, (batch, length), integers, with a length of at least 1.
            state: The state from which to continue; by default, the zero state.
            attention_mask: (batch, length), 1 for a token and 0 for padding, which may be anywhere
                in a row; by default, there is no padding.
            chunk_size: Number of tokens that are read at once.

        Returns:
            The logits of the token that follows the last token of each row, (batch, vocab_size),
            and the state after the prompt.

        Raises:
            ValueError: if the ids or the mask have another shape or dtype; if an id is outside of
                the vocabulary; if a row has no token; if the programs take no mask; if the state
                has another batch size; if `chunk_size` is below 1; or if there are more tokens than
                attention has room for.
        """
        ids = self._checked(input_ids)
        real = self._read_mask(attention_mask, ids.shape)
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1; got {chunk_size}.")
        if not real.any(1).all():
            raise ValueError(
                f"row {int(real.any(1).argmin())} of attention_mask has no token, so no token "
                "follows."
            )
        state = self.initial_state(len(ids)) if state is None else state
        if not real.all():  # move the tokens to the last columns, and leave out needless columns
            order = real.argsort(1, kind="stable")[:, -real.sum(1).max() :]
            ids, real = (np.take_along_axis(array, order, 1) for array in (ids, real))
        logits = None
        for begin in range(0, ids.shape[1], chunk_size):
            chunk = slice(begin, begin + chunk_size)
            part = np.ascontiguousarray(ids[:, chunk])
            logits, state = self._run_prefill(part, state, real[:, chunk])
        assert logits is not None
        return logits, state

    def step(self, tokens: Any, state: ExportedState) -> tuple[np.ndarray, ExportedState]:
        """Read one token of each sequence.

        Args:
            tokens: Token ids, (batch) or (batch, 1), integers.
            state: The state from which to continue.

        Returns:
            The logits of the token that follows, (batch, vocab_size), and the next state.

        Raises:
            ValueError: if the ids have another shape or dtype; if an id is outside of the
                vocabulary; if the state has another batch size; or if attention has no room.
        """
        ids = _array("tokens", tokens)
        ids = self._checked(ids[:, None] if ids.ndim == 1 else ids)
        if ids.shape[1] != 1:
            raise ValueError(f"a step takes one token a sequence; got {ids.shape[1]}.")
        return self._run_step(ids, state)

    def generate(
        self,
        input_ids: Any,
        max_new_tokens: int,
        *,
        attention_mask: Any = None,
        temperature: float | None = None,
        seed: int = 0,
    ) -> np.ndarray:
        """Continue token ids, as the model's own `generate` does.

        `export.json` has the settings of the model's `generation_config` that change the text. This
        method applies these settings. They suppress, force and penalize tokens, exclude bad words,
        restrict sampling, and name the tokens that end a text. After such a token, a sequence is
        padded.

        Args:
            input_ids: Token ids of the prompts, as for `prefill`.
            max_new_tokens: Maximal number of new tokens, at least 1.
            attention_mask: Mask of padded prompts, as for `prefill`.
            temperature: Temperature for sampling within the restrictions of the settings. If it is
                0, the most likely token is chosen. By default, the settings decide.
            seed: Seed of the sampling.

        Returns:
            Token ids, (batch, length + new tokens). There are `max_new_tokens` new tokens, or fewer
            if all sequences have ended.

        Raises:
            ValueError: if an argument is out of range; if there are more tokens than attention has
                room for; if a logit is NaN; or if the settings exclude all tokens.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1; got {max_new_tokens}.")
        if temperature is not None and temperature < 0:
            raise ValueError(f"temperature must be 0 or more; got {temperature}.")
        rules = Rules(self.description.get("generation", {}), temperature)
        ids = self._checked(input_ids)
        prompt, draw = ids.shape[1], np.random.default_rng(seed)
        end = prompt + max_new_tokens
        logits, state = self.prefill(ids, attention_mask=attention_mask)
        ended = np.zeros(len(ids), dtype=bool)
        while True:
            tokens = rules.choose(ids, logits, prompt, end, draw)
            if len(rules.ends):
                tokens = np.where(ended, rules.pad, tokens)
                ended |= np.isin(tokens, rules.ends)
            ids = np.concatenate([ids, tokens[:, None]], axis=1)
            if ids.shape[1] == end or ended.all():
                return ids
            logits, state = self.step(tokens, state)

    def _checked(self, input_ids: Any) -> np.ndarray:
        ids = _array("input_ids", input_ids)
        if ids.ndim != 2 or ids.shape[1] == 0 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(
                "token ids are integers (batch, length) with a length of at least 1; got "
                f"{ids.dtype} {ids.shape}."
            )
        vocabulary = self.description["vocab_size"]
        outside = ids[(ids < 0) | (ids >= vocabulary)]
        if outside.size:
            raise ValueError(
                f"token ids must lie in 0 … {vocabulary - 1}, also at padding; got {outside[0]}."
            )
        return ids.astype(np.int64)


def _array(name: str, rows: Any) -> np.ndarray:
    """Return rows of one length as an array."""
    try:
        return np.asarray(rows)
    except ValueError as error:  # numpy makes no array of rows of several lengths
        raise ValueError(
            f"{name} must have rows of one length; got rows of several lengths. Pad the shorter "
            "rows under a mask."
        ) from error


class ExportedRecurrence(_Exported):
    """A mixer or a system that `gramian.export.export_recurrence` wrote.

    The arguments and errors are the same as those of `ExportedModel`.
    """

    _kinds = ("mixer", "system")
    _maker = "export_recurrence"

    def prefill(
        self, x: Any, state: ExportedState | None = None, *, mask: Any = None
    ) -> tuple[np.ndarray, ExportedState]:
        """Process a chunk of samples.

        Args:
            x: The chunk: (batch, length, width) for a mixer, (batch, *C, length) for a system.
            state: The state from which to continue; by default, the zero state.
            mask: (batch, length), 1 for a sample and 0 for padding, which may be anywhere and
                leaves the state unchanged; by default, there is no padding. A system takes none.

        Returns:
            The outputs, in the shape of `x` and zero at padding, and the state after the chunk.

        Raises:
            ValueError: if `x` or `mask` has another shape, if the programs take no mask, if the
                state has another batch size, or if attention has no room.
        """
        x = self._checked(x, "prefill")
        time = self.description["input"]["prefill"].index("length")
        real = self._read_mask(mask, (len(x), x.shape[time]))
        state = self.initial_state(len(x)) if state is None else state
        return self._run_prefill(x, state, real)

    def step(self, x_t: Any, state: ExportedState) -> tuple[np.ndarray, ExportedState]:
        """Process one sample of each sequence.

        Args:
            x_t: The samples: (batch, width) for a mixer, (batch, *C) for a system.
            state: The state from which to continue.

        Returns:
            The outputs, in the shape of `x_t`, and the next state.

        Raises:
            ValueError: in the same cases as `prefill`.
        """
        return self._run_step(self._checked(x_t, "step"), state)

    def _checked(self, x: Any, program: str) -> np.ndarray:
        array = np.asarray(x, dtype=self._dtype)
        wanted = self.description["input"][program]
        fits = array.ndim == len(wanted) and all(
            have == want if isinstance(want, int) else have >= 1
            for have, want in zip(array.shape, wanted, strict=True)
        )
        if not fits:
            raise ValueError(
                f"the input must be ({', '.join(map(str, wanted))}); got {array.shape}."
            )
        return np.ascontiguousarray(array)
