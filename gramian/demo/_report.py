"""Define the settings of the demo, and the report of its measurements."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from gramian.demo.measuring import Agreement
from gramian.demo.training import TrainingSettings
from gramian.distillation import DistillationReport

__all__ = ["Check", "DemoReport", "DemoSettings"]


@dataclass(frozen=True)
class DemoSettings:
    """Settings of the demo. With the defaults, it takes a few minutes on two cores.

    Attributes:
        seed: seed of initialization, training windows and sampling.
        tol: largest relative l2 error of a distilled filter.
        hidden_size: width of the model.
        layers: number of blocks.
        heads: number of heads in a layer. Each head has a filter of its own. The filter has as many
            taps as a training window has tokens.
        frequency: frequency of the sine activations in the networks that make the filters.
        training: settings of training.
        prompt: text that the original and the distilled model continue.
        written: number of bytes that each model writes.
        greedy_tokens: number of tokens on which recurrence and recomputation are compared.
        contexts: context lengths in tokens at which generation is timed.
        timed_tokens: number of tokens in a timing.
        timed_rounds: number of timings at each context length.
    """

    seed: int = 0
    tol: float = 2e-2
    hidden_size: int = 128
    layers: int = 2
    heads: int = 8
    frequency: float = 1.0
    training: TrainingSettings = field(default_factory=TrainingSettings)
    prompt: str = 'The "while" statement is used for '
    written: int = 320
    greedy_tokens: int = 256
    contexts: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384)
    timed_tokens: int = 8
    timed_rounds: int = 60


@dataclass(frozen=True)
class Check:
    """The check of a claim.

    Attributes:
        claim: the claim, as part of a sentence.
        passed: whether this run confirms it.
        measured: text with the numbers that the run measured.
    """

    claim: str
    passed: bool
    measured: str


@dataclass(frozen=True)
class DemoReport:
    """All measurements of a run.

    Attributes:
        settings: settings of the run.
        checks: the checks of all claims.
        bits_per_byte: a mapping from the names of the bigram model and the three networks to their
            bits per byte on held-out text.
        distillation: orders and errors of every distilled filter.
        agreement: agreement of greedy generation by recurrence with recomputation.
        milliseconds_per_token: for each method of generation, a mapping from the context length in
            tokens to the time per token in milliseconds.
        state_bytes: for each method of generation, a mapping from the context length in tokens to
            the size in bytes of the state that is carried from token to token.
        texts: a mapping from the name of each model to the text that it wrote.
        seconds: a mapping from the name of each part of the demo to its wall time in seconds.
    """

    settings: DemoSettings
    checks: tuple[Check, ...]
    bits_per_byte: dict[str, float]
    distillation: DistillationReport
    agreement: Agreement
    milliseconds_per_token: dict[str, dict[int, float]]
    state_bytes: dict[str, dict[int, int]]
    texts: dict[str, str]
    seconds: dict[str, float]

    @property
    def passed(self) -> bool:
        """Return whether every check passed."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return the whole report as values that JSON can represent."""
        return {
            "passed": self.passed,
            "checks": [asdict(check) for check in self.checks],
            "bits_per_byte": self.bits_per_byte,
            "agreement": asdict(self.agreement),
            "milliseconds_per_token": self.milliseconds_per_token,
            "state_bytes": self.state_bytes,
            "texts": self.texts,
            "seconds": self.seconds,
            "settings": asdict(self.settings),
            "distillation": self.distillation.to_dict(),
        }
