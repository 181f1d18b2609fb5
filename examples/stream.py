"""Filter a signal sample by sample as it arrives, with an S4 layer that was exported.

    python examples/stream.py --channels 4 --state-size 64 --samples 2000

The layer is written as ONNX once. The loop below then uses onnxruntime and the description of the
states, and neither PyTorch nor this library, so it carries over to any language that onnxruntime
has. At the end its outputs are compared with the layer's convolution of the whole signal.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime


def stream(folder: Path, samples: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the output (channels) of each sample (channels) as soon as the sample arrives."""
    description = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # one sample is too little to share
    session = onnxruntime.InferenceSession(str(folder / description["step"]), options)
    states = {
        state["input"]: np.zeros([1, *state["shape"][1:]], state["dtype"])
        for state in description["states"]
    }
    for sample in samples:
        y, *after = session.run(None, {description["input"]["name"]: sample[None], **states})
        states = dict(zip(states, after, strict=True))
        yield y[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--state-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=2000)
    arguments = parser.parse_args()

    import torch

    from gramian.export import export_recurrence
    from gramian.filters import S4
    from gramian.mixers import LongConvolution

    torch.manual_seed(0)
    filter = S4(arguments.channels, state_size=arguments.state_size, max_length=arguments.samples)
    layer = LongConvolution(filter).eval()
    times = torch.arange(arguments.samples) / 50
    signal = torch.stack([torch.sin((c + 1) * times) for c in range(arguments.channels)], dim=-1)
    signal = signal + 0.1 * torch.randn(signal.shape)

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "layer"
        print(export_recurrence(layer, folder))
        outputs = []
        started = time.perf_counter()
        for y in stream(folder, signal.numpy()):
            outputs.append(y)
        seconds = time.perf_counter() - started
    with torch.no_grad():
        expected = layer(signal[None])[0].numpy()
    difference = np.abs(np.stack(outputs) - expected).max() / np.abs(expected).max()
    print(
        f"{len(outputs)} samples of {arguments.channels} channels, "
        f"{1e6 * seconds / len(outputs):.0f} µs each; largest difference from the convolution of "
        f"the whole signal: {difference:.1e} of the largest output"
    )


if __name__ == "__main__":
    main()
