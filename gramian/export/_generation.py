"""Choose the next token in numpy, as `generate` of transformers does.

The settings in a model's `generation_config` that change the generated text determine the choice.
When a model is exported, `describe` returns these settings, or raises an error if one of them is
not supported. `Rules` applies the settings to logits, in the same order as transformers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["Rules", "describe"]

_SCORES = (
    "sequence_bias",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "min_length",
    "min_new_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "remove_invalid_values",
    "exponential_decay_length_penalty",
    "suppress_tokens",
    "begin_suppress_tokens",
)
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_HONOURED = ("do_sample", "eos_token_id", "pad_token_id", *_SCORES, *_SAMPLING)
_NEUTRAL = (  # settings that change the text only together with other settings, or never
    "max_length",
    "max_new_tokens",
    "early_stopping",
    "length_penalty",
    "renormalize_logits",
    "use_cache",
    "cache_implementation",
    "cache_config",
    "max_cache_len",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
    "return_dict_in_generate",
    "bos_token_id",
    "decoder_start_token_id",
    "is_assistant",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "assistant_early_exit",
    "assistant_lookbehind",
    "assistant_ensemble_weight",
    "target_lookbehind",
    "max_matching_ngram_size",
    "speculation_type",
    "compile_config",
    "disable_compile",
    "continuous_batching_config",
    "prefill_chunk_size",
    "low_memory",
    "transformers_version",
)
_IDLE: dict[str, Any] = {  # values of settings, besides None and False, that have no effect
    "repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "temperature": 1,
    "top_k": 0,
    "top_p": 1,
    "typical_p": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "guidance_scale": 1,
    "diversity_penalty": 0,
    "penalty_alpha": 0,
    "encoder_repetition_penalty": 1,
    "encoder_no_repeat_ngram_size": 0,
}


def describe(config: Any) -> dict[str, Any]:
    """Return the settings that change the text, as values that JSON can hold.

    Args:
        config: a `transformers.GenerationConfig`.

    Raises:
        ValueError: if exported models do not support a setting.
    """
    found: dict[str, Any] = {}
    for name in type(config)().__dict__:
        value = getattr(config, name, None)
        if name == "top_k" and value is None:
            value = 50  # the default of transformers when sampling
        idle = value is None or value is False or value == _IDLE.get(name, object())
        if name.startswith("_") or name in _NEUTRAL or idle:
            continue
        if name not in _HONOURED:
            raise ValueError(
                f"an exported model cannot generate with {name}={value!r}, which the model's "
                "generation_config asks for: set it to None there to export without it."
            )
        found[name] = _plain(name, value)
    if "min_new_tokens" in found:
        found.pop("min_length", None)  # transformers does the same
    return found


def _plain(name: str, value: Any) -> Any:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if name == "sequence_bias" and isinstance(value, dict):
        return [[list(sequence), bias] for sequence, bias in value.items()]
    return list(value) if isinstance(value, tuple) else value


class Rules:
    """The rules that choose the next token.

    Args:
        settings: The settings that `describe` returned, which are the entry `generation` of
            `export.json`.
        temperature: Temperature for sampling. If it is 0, the most likely token is chosen. By
            default, the settings decide.
    """

    def __init__(self, settings: dict[str, Any], temperature: float | None = None) -> None:
        self.settings = settings
        if temperature is None:
            temperature = settings.get("temperature", 1.0) if settings.get("do_sample") else 0.0
        self.temperature = float(temperature)
        ends = settings.get("eos_token_id")
        self.ends = np.atleast_1d(np.array([] if ends is None else ends, dtype=np.int64))
        pad = settings.get("pad_token_id")
        self.pad: int = (int(self.ends[0]) if len(self.ends) else 0) if pad is None else pad

    def choose(
        self, ids: np.ndarray, logits: np.ndarray, prompt: int, end: int, draw: np.random.Generator
    ) -> np.ndarray:
        """Choose the next token of every sequence.

        Args:
            ids: Token ids of the prompt and the text generated so far, (batch, length).
            logits: Logits of the next token, (batch, vocab_size).
            prompt: Length of the prompt.
            end: Length at which generation ends.
            draw: Random generator for sampling.

        Returns:
            Token ids, (batch).

        Raises:
            ValueError: if a logit is NaN, or the settings exclude all tokens.
        """
        scores = self.scores(ids, logits, prompt, end)
        best = scores.max(-1)
        if np.isnan(best).any():
            raise ValueError("the logits are not numbers: there is no next token to choose.")
        if np.isneginf(best).any():
            raise ValueError("the generation settings leave no token to choose from.")
        if self.temperature:
            scores = scores + draw.gumbel(size=scores.shape)
        return np.asarray(scores.argmax(-1))

    def scores(self, ids: np.ndarray, logits: np.ndarray, prompt: int, end: int) -> np.ndarray:
        """Return the logits (batch, vocab_size) after all settings, with -inf for excluded tokens.

        The arguments are those of `choose`.
        """
        scores = logits.astype(np.float32)  # transformers does the same
        with np.errstate(invalid="ignore", over="ignore"):
            for name in _SCORES:
                if self.settings.get(name) is not None:
                    rule = getattr(self, f"_{name}")
                    scores = rule(self.settings[name], scores, ids, prompt, end)
            if self.temperature:
                scores = scores / np.float32(self.temperature)
                for name in _SAMPLING[1:]:
                    if self.settings.get(name) is not None:
                        scores = _keep(scores, _SHORTLISTS[name](self.settings[name], scores))
        return scores

    def _sequence_bias(
        self, pairs: list[Any], scores: np.ndarray, ids: np.ndarray, prompt: int, end: int
    ) -> np.ndarray:
        bias = np.zeros_like(scores)
        for sequence, value in pairs:
            *before, last = sequence
            if len(before) <= ids.shape[1]:
                matches = (ids[:, ids.shape[1] - len(before) :] == before).all(-1)
                bias[matches, last] += value
        return scores + bias

    def _repetition_penalty(
        self, penalty: float, scores: np.ndarray, ids: np.ndarray, prompt: int, end: int
    ) -> np.ndarray:
        penalized = np.where(scores < 0, scores * penalty, scores / penalty)
        seen = np.zeros(scores.shape, dtype=bool)
        np.put_along_axis(seen, ids, True, axis=1)
        return np.where(seen, penalized, scores).astype(scores.dtype)

    def _no_repeat_ngram_size(
        self, size: int, scores: np.ndarray, ids: np.ndarray, prompt: int, end: int
    ) -> np.ndarray:
        length = ids.shape[1]
        if length < size:
            return scores
        windows = np.lib.stride_tricks.sliding_window_view(ids, size, axis=1)
        matches = (windows[..., :-1] == ids[:, None, length + 1 - size :]).all(-1)
        banned = np.zeros(scores.shape, dtype=bool)
        rows, places = np.nonzero(matches)
        banned[rows, windows[rows, places, -1]] = True
        return _keep(scores, ~banned)

    def _bad_words_ids(
        self, words: list[list[int]], scores: np.ndarray, ids: np.ndarray, prompt: int, end: int
    ) -> np.ndarray:
        ends = [[int(token)] for token in self.ends]
        pairs = {tuple(word): float("-inf") for word in words if word not in ends}
        return self._sequence_bias(list(pairs.items()), scores, ids, prompt, end)

    def _min_length(
        self, length: int, scores: np.ndarray, ids: np.ndarray, prompt: int, end: int
    ) -> np.ndarray:
        return self._without(self.ends, scores) if ids.shape[1] < length else scores

    def _min_new_tokens(
        self, count: int, scores: np.ndarray, ids: np.ndarray, prompt: int, end: int
    ) -> np.ndarray:
        return self._min_length(prompt + count, scores, ids, prompt, end)

    def _forced_bos_token_id(
        self, token: int, scores: np.ndarray, ids: np.ndarray, prompt: int, end: int
    ) -> np.ndarray:
        return _only(token, scores) if ids.shape[1] == 1 else scores

    def _forced_eos_token_id(
        self, token: Any, scores: np.ndarray, ids: np.ndarray, prompt: int, end: int
    ) -> np.ndarray:
        return _only(token, scores) if ids.shape[1] == end - 1 else scores

    def _remove_invalid_values(
        self, on: bool, scores: np.ndarray, ids: np.ndarray, prompt: int, end: int
    ) -> np.ndarray:
        return np.nan_to_num(scores, nan=0.0)

    def _exponential_decay_length_penalty(
        self, decay: list[float], scores: np.ndarray, ids: np.ndarray, prompt: int, end: int
    ) -> np.ndarray:
        begin, factor = decay
        past = ids.shape[1] - begin - prompt
        if past <= 0 or not len(self.ends):
            return scores
        scores = scores.copy()
        at_end = scores[:, self.ends]
        raised = at_end + np.abs(at_end) * np.float32(factor**past - 1)
        scores[:, self.ends] = np.where(np.isfinite(at_end), raised, at_end)
        return scores

    def _suppress_tokens(
        self, tokens: list[int], scores: np.ndarray, ids: np.ndarray, prompt: int, end: int
    ) -> np.ndarray:
        return self._without(tokens, scores)

    def _begin_suppress_tokens(
        self, tokens: list[int], scores: np.ndarray, ids: np.ndarray, prompt: int, end: int
    ) -> np.ndarray:
        forced = prompt <= 1 and self.settings.get("forced_bos_token_id") is not None
        begins = ids.shape[1] == prompt + forced
        return self._without(tokens, scores) if begins else scores

    def _without(self, tokens: Any, scores: np.ndarray) -> np.ndarray:
        return _keep(scores, ~np.isin(np.arange(scores.shape[-1]), np.asarray(tokens)))


def _keep(scores: np.ndarray, kept: np.ndarray) -> np.ndarray:
    return np.where(kept, scores, np.float32(-np.inf))


def _only(tokens: Any, scores: np.ndarray) -> np.ndarray:
    forced = np.full_like(scores, -np.inf)
    forced[:, np.atleast_1d(tokens)] = 0
    return forced


def _log_probabilities(scores: np.ndarray) -> np.ndarray:
    shifted = scores - scores.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _best(scores: np.ndarray) -> np.ndarray:
    return scores >= scores.max(-1, keepdims=True)


def _entropy(logs: np.ndarray) -> np.ndarray:
    return -np.where(np.isneginf(logs), 0, logs * np.exp(logs)).sum(-1, keepdims=True)


def _top_k(count: int, scores: np.ndarray) -> np.ndarray:
    count = min(count, scores.shape[-1])
    return scores >= np.sort(scores, axis=-1)[:, -count, None]


def _top_p(mass: float, scores: np.ndarray) -> np.ndarray:
    order = np.argsort(scores, axis=-1, kind="stable")
    rising = np.exp(np.take_along_axis(_log_probabilities(scores), order, -1)).cumsum(-1)
    kept = rising > 1 - mass
    kept[:, -1] = True
    unsorted = np.empty_like(kept)
    np.put_along_axis(unsorted, order, kept, axis=-1)
    return unsorted


def _min_p(least: float, scores: np.ndarray) -> np.ndarray:
    probabilities = np.exp(_log_probabilities(scores))
    return probabilities >= least * probabilities.max(-1, keepdims=True)


def _typical_p(mass: float, scores: np.ndarray) -> np.ndarray:
    logs = _log_probabilities(scores)
    distance = np.abs(-logs - _entropy(logs))
    order = np.argsort(distance, axis=-1, kind="stable")
    near = np.take_along_axis(distance, order, -1)
    total = np.exp(np.take_along_axis(logs, order, -1)).cumsum(-1)
    last = np.minimum((total < mass).sum(-1, keepdims=True), scores.shape[-1] - 1)
    kept = distance <= np.take_along_axis(near, last, -1)
    np.put_along_axis(kept, order[:, :1], True, axis=-1)
    return kept


def _epsilon_cutoff(least: float, scores: np.ndarray) -> np.ndarray:
    return (np.exp(_log_probabilities(scores)) >= least) | _best(scores)


def _eta_cutoff(least: float, scores: np.ndarray) -> np.ndarray:
    logs = _log_probabilities(scores)
    eta = np.minimum(least, np.sqrt(least) * np.exp(-_entropy(logs)))
    return (np.exp(logs) >= eta) | _best(scores)


_SHORTLISTS = {
    "top_k": _top_k,
    "top_p": _top_p,
    "min_p": _min_p,
    "typical_p": _typical_p,
    "epsilon_cutoff": _epsilon_cutoff,
    "eta_cutoff": _eta_cutoff,
}
