"""Define Copying and Delay, memory tasks from the experiments of S4 and RTF (arXiv 2405.06147).

The settings `"rtf"` are those of RTF's experiments. The generators follow S4's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gramian._labels import IGNORED
from gramian.tasks._task import Description, GeneratedTask, Row, register, require_sizes

__all__ = ["Copying", "Delay"]


@register("copying")
@dataclass(frozen=True, kw_only=True)
class Copying(GeneratedTask):
    """Tokens, then blanks, then one mark for each token. The marks' labels are the tokens in order.

    Args:
        vocab_size: number of token ids. The blank is 0, the tokens to copy are 1 … vocab_size - 2,
            and the mark is vocab_size - 1.
        noise: number of blanks.
        memorize: number of tokens to copy.
        variable: whether to scatter the tokens among the blanks. If not, the tokens come first.
        reverse: whether the labels are the tokens in reverse order.
    """

    vocab_size: int = 64
    noise: int = 0
    memorize: int = 1024
    variable: bool = False
    reverse: bool = False

    published = {  # noqa: RUF012
        "rtf": {"vocab_size": 64, "noise": 0, "memorize": 1024},
        "s4": {"vocab_size": 10, "noise": 100, "memorize": 10},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self, "vocab_size", least=3)
        require_sizes(self, "memorize")
        require_sizes(self, "noise", least=0)

    def description(self) -> Description:
        return Description("tokens", self.noise + 2 * self.memorize, vocab_size=self.vocab_size)

    def row(self, random: np.random.Generator, split: str) -> Row:
        shown = self.noise + self.memorize
        tokens = random.integers(1, self.vocab_size - 1, size=self.memorize)
        places = (
            np.sort(random.choice(shown, self.memorize, replace=False))
            if self.variable
            else np.arange(self.memorize)
        )
        sequence = np.zeros(shown + self.memorize, dtype=np.int64)
        sequence[places] = tokens
        sequence[shown:] = self.vocab_size - 1
        labels = np.full_like(sequence, IGNORED)
        labels[shown:] = tokens[::-1] if self.reverse else tokens
        return {"input_ids": sequence, "labels": labels}


@register("delay")
@dataclass(frozen=True, kw_only=True)
class Delay(GeneratedTask):
    """Band-limited white noise. The targets are the input one or several lags earlier.

    Args:
        length: number of samples in a signal.
        lag: number of steps in a lag. The k-th target is the input k × lag steps earlier.
        lags: number of targets at each position.
        step: time between samples in seconds.
        frequency: upper limit of the noise's band in Hz. It must lie between 1 / (length × step)
            and 1 / (2 × step).
    """

    train_examples: int = 16_384
    eval_examples: int = 1_024
    length: int = 4_000
    lag: int = 1_000
    lags: int = 1
    step: float = 0.00025
    frequency: float = 1_000.0

    published = {"rtf": {"length": 4_000, "lag": 1_000, "frequency": 1_000.0}}  # noqa: RUF012

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self, "length", "lag", "lags")
        if self.lag * self.lags >= self.length:
            raise ValueError(
                f"lag × lags must be below length; got {self.lag} × {self.lags} and {self.length}."
            )
        if not 1 / (self.length * self.step) <= self.frequency <= 0.5 / self.step:
            raise ValueError(
                f"frequency must lie between 1 / (length × step) and 1 / (2 × step), here "
                f"{1 / (self.length * self.step):g} and {0.5 / self.step:g}; got {self.frequency}."
            )

    def description(self) -> Description:
        return Description("signal", self.length, input_size=1, num_labels=self.lags)

    def row(self, random: np.random.Generator, split: str) -> Row:
        signal = self._noise(random)
        targets = np.zeros((self.length, self.lags))
        for index in range(self.lags):
            lag = (index + 1) * self.lag
            targets[lag:, index] = signal[: self.length - lag]
        return {
            "input_values": signal[:, None].astype(np.float32),
            "labels": targets.astype(np.float32),
        }

    def _noise(self, random: np.random.Generator, rms: float = 0.5) -> np.ndarray:
        """Draw noise (length,) with the power `rms²` in the band, and shift it to start at 0."""
        half = -(-self.length // 2)
        scale = rms * np.sqrt(0.5)
        real = random.normal(0.0, scale, half + 1)
        imaginary = random.normal(0.0, scale, half + 1)
        imaginary[-1] = 0
        spectrum = real + 1j * imaginary
        outside = np.fft.rfftfreq(2 * half, d=self.step) > self.frequency
        spectrum[outside] = 0
        spectrum[0] = 0
        spectrum *= np.sqrt(2 * half / (1 - outside.sum() / half))
        signal = np.fft.irfft(spectrum)[: self.length]
        return signal - signal[0]
