"""Generate text, and raise an error as soon as logits are not finite.

Logits with a NaN have no maximum. `argmax` returns the index of the NaN, so greedy search would
write the same token again and again without an error.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, LogitsProcessor, StoppingCriteria
from transformers.generation import LogitsProcessorList, StoppingCriteriaList

from gramian.models.alphabet import check_forced, suppressed_tokens

__all__ = ["GramianGenerationMixin"]


class GramianGenerationMixin(GenerationMixin):
    """The `generate` of transformers, which here keeps to an alphabet and to finite logits."""

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
            inputs: as for any model of transformers, like the other arguments.
            generation_config: likewise.
            logits_processor: likewise.
            stopping_criteria: likewise.
            args: likewise.
            streamer: likewise.
            allowed_tokens: ids of the only tokens that may be written, such as those of
                `gramian.models.allowed_tokens`; `restrict_generation` allows them for every call.
                Tokens that `suppress_tokens` names are not written in any case.
            kwargs: as for any model of transformers.

        Raises:
            FloatingPointError: if logits are NaN or infinite.
            ValueError: if no allowed token is left to choose, or one is not in the vocabulary.
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


class FiniteLogits(LogitsProcessor):
    """A logits processor that looks for NaN or infinite logits at every token.

    It reads the logits before a token is chosen. On a CPU the test costs nothing, and the error is
    raised at once. On an accelerator, the program would have to wait for the test at every token.
    So its result stays on the accelerator, `StopAtNaN` ends the generation, and `check` raises the
    error afterwards. Until then, equal numbers replace the logits of a row with NaN or infinity,
    since sampling from NaN would end the process.

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
