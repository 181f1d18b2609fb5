"""Generate text, and raise an error as soon as logits are not finite.

If a logit is NaN, the logits have no maximum. `argmax` then returns the index of the NaN, so greedy
search would write the same token again and again without an error.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import GenerationMixin, LogitsProcessor, StoppingCriteria
from transformers.generation import LogitsProcessorList, StoppingCriteriaList

from gramian.models.alphabet import check_forced, suppressed_tokens

__all__ = ["GramianGenerationMixin"]


class GramianGenerationMixin(GenerationMixin):
    """The `generate` of transformers, with an optional alphabet and a check for finite logits."""

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        *args: Any,
        streamer: Any = None,
        allowed_tokens: Iterable[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate text as `GenerationMixin.generate` of transformers does.

        Args:
            inputs: the prompt, as for any model of transformers.
            generation_config: the generation configuration; by default the model's own.
            logits_processor: further logits processors.
            stopping_criteria: further stopping criteria.
            args: further positional arguments of `GenerationMixin.generate`.
            streamer: an object that receives every token as soon as it is chosen.
            allowed_tokens: ids of the only tokens that may be written, such as
                `gramian.models.allowed_tokens` returns. They apply to this call; use
                `restrict_generation` to set them for every call. Tokens in `suppress_tokens` are
                not written even if they are allowed.
            kwargs: further keyword arguments of `GenerationMixin.generate`.

        Raises:
            FloatingPointError: if logits are NaN or infinite.
            ValueError: if no allowed token is left to choose, if an allowed token is not in the
                vocabulary, or if the generation configuration forces a token that is not allowed.
        """
        if allowed_tokens is not None:
            config: Any = generation_config or self.generation_config
            given = kwargs.get("suppress_tokens", config.suppress_tokens)
            suppressed = suppressed_tokens(allowed_tokens, self.config.vocab_size, given)
            check_forced(config, suppressed)
            kwargs["suppress_tokens"] = suppressed
        watch = FiniteLogits(at_once=streamer is not None)
        processors = LogitsProcessorList([watch, *(logits_processor or ())])
        criteria = StoppingCriteriaList([StopAtNaN(watch), *(stopping_criteria or ())])
        written = super().generate(
            inputs, generation_config, processors, criteria, *args, streamer=streamer, **kwargs
        )
        watch.check()
        return written

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse transformers' continuous batching.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has a state for each sequence, and not the pages of keys and "
            "values that continuous batching needs: give generate a padded batch of prompts."
        )

    @property
    def init_continuous_batching(self) -> NoReturn:
        """No attribute, so that servers see that they must generate without continuous batching."""
        raise AttributeError("a Gramian model has no continuous batching.")


class FiniteLogits(LogitsProcessor):
    """A logits processor that tests at every token whether the logits are finite.

    The processor reads the logits before a token is chosen. On a CPU the test costs nothing, and
    the error is raised at once. On an accelerator, the program would have to wait for the result of
    the test at every token. So the result stays on the accelerator, `StopAtNaN` ends the
    generation, and `check` raises the error afterwards. Until then, zeros replace all logits of a
    row with NaN or infinity, because sampling from NaN would end the process.

    Args:
        at_once: whether to raise the error at once on every device, as streaming tokens requires.
    """

    def __init__(self, at_once: bool) -> None:
        self.at_once = at_once
        self.seen: Tensor | None = None  # (), boolean, on the device of the logits

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        wrong = ~scores.amax(-1).isfinite()  # the maximum of a row with a NaN is NaN
        found = wrong.any()
        self.seen = found if self.seen is None else self.seen | found
        if self.at_once or scores.device.type == "cpu":
            self.check()
            return scores
        return torch.where(wrong.unsqueeze(-1), 0, scores)

    def check(self) -> None:
        """Raise a `FloatingPointError` if any logits so far were not finite."""
        if self.seen is not None and bool(self.seen):
            raise FloatingPointError(
                "the model's logits are not finite, so no token follows; its weights or its "
                "activations hold NaN or infinity."
            )


class StopAtNaN(StoppingCriteria):
    """A stopping criterion that ends generation once `FiniteLogits` has found NaN or infinity."""

    def __init__(self, watch: FiniteLogits) -> None:
        self.watch = watch

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        seen = self.watch.seen
        if seen is None:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        return seen.to(input_ids.device).expand(len(input_ids))
