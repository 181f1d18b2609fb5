"""Hidden states in chunks are those of the whole, and embeddings are their means and ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from gramian import genomics
from gramian.models import GramianConfig, GramianForCausalLM, GramianForSequenceClassification
from tests.genomics.conftest import drawn
from tests.genomics.reference import other_strand

MakeModel = Callable[..., GramianForCausalLM]

LENGTHS = [63, 64, 65, 150, 3, 31, 100, 64]
RECORDS = [(f"r{index}", drawn(length, index, "ACGTN")) for index, length in enumerate(LENGTHS)]


def whole(model: Any, ids: torch.Tensor, layer: int | str) -> torch.Tensor:
    """The hidden states of one uncached forward; of a module those that it gives there."""
    with torch.no_grad():
        if isinstance(layer, int):
            outputs = model(ids, output_hidden_states=True, use_cache=False)
            return outputs.hidden_states[layer]
        found = []
        handle = model.get_submodule(layer).register_forward_hook(
            lambda module, arguments, output: found.append(output)
        )
        model(ids, use_cache=False)
        handle.remove()
    (states,) = found
    return states


def encoded(tokenizer: Any, sequence: str) -> torch.Tensor:
    return torch.tensor([[tokenizer.convert_tokens_to_ids(letter) for letter in sequence]])


@pytest.mark.each
@pytest.mark.parametrize("chunk_size", [1, 37, 10_000])
def test_chunks_are_the_whole(
    make_model: MakeModel, tokenizer: Any, kind: str, chunk_size: int
) -> None:
    model = make_model(kind)
    length = 41 if chunk_size == 1 else 151
    ids = torch.cat([encoded(tokenizer, drawn(length, seed)) for seed in (1, 2)])
    layers = [0, 1, 2, -1, "model.layers.1.mlp", "model.layers.0"]
    chunks = list(genomics.hidden_states(model, ids, layers=layers, chunk_size=chunk_size))
    assert [len(chunk) for chunk in chunks] == [len(layers)] * -(-length // chunk_size)
    for layer in layers:
        found = torch.cat([chunk[layer] for chunk in chunks], dim=1)
        assert_close(found, whole(model, ids, layer), rtol=1e-4, atol=1e-4)


def test_modules_inside_of_mixers_too(make_model: MakeModel, tokenizer: Any, kind: str) -> None:
    model = make_model(kind)
    ids = encoded(tokenizer, drawn(101))
    trained = [parameter.requires_grad for parameter in model.parameters()]
    mixer = model.model.layers[1].mixer
    kinds = {name: type(part).__name__ for name, part in mixer.named_modules()}
    names = [name for name in kinds if kinds[name] == "Linear" and "filter" not in name]
    names = ["", *names]
    for name in names:
        path = f"model.layers.1.mixer.{name}".rstrip(".")
        for size in (19, 1000):
            chunks = list(genomics.hidden_states(model, ids, layers=path, chunk_size=size))
            assert_close(torch.cat(chunks, dim=1), whole(model, ids, path), rtol=1e-4, atol=1e-4)
            assert not chunks[0].requires_grad
    assert [parameter.requires_grad for parameter in model.parameters()] == trained


def pooled(states: np.ndarray, pool: str) -> np.ndarray:
    return {"mean": states.mean(0), "last": states[-1], "none": states}[pool]


@pytest.mark.each
@pytest.mark.parametrize("layer", [1, "model.layers.1.mixer"])
def test_embeddings_are_pooled_hidden_states(
    make_model: MakeModel, tokenizer: Any, kind: str, layer: int | str
) -> None:
    model = make_model(kind)
    states = {
        name: whole(model, encoded(tokenizer, text), layer)[0].numpy() for name, text in RECORDS
    }
    for pool, batch_size, chunk_size in (("mean", 3, 40), ("last", 8, 64), ("none", 1, 70)):
        found = genomics.embed(
            model,
            RECORDS,
            tokenizer=tokenizer,
            layer=layer,
            pool=pool,
            batch_size=batch_size,
            chunk_size=chunk_size,
        )
        for one, (name, text) in zip(found, RECORDS, strict=True):
            assert (one.name, one.length) == (name, len(text))
            assert one.values.dtype == np.float32
            expected = pooled(states[name], pool)
            assert np.allclose(one.values, expected, rtol=1e-4, atol=1e-4)


def test_records_of_files_and_intervals(
    make_model: MakeModel, tokenizer: Any, tmp_path: Path
) -> None:
    model, text = make_model(), drawn(90)
    (tmp_path / "x.fa").write_text(f">a x\n{text[:50].lower()}\n{text[50:]}\n>b\nACGT\n")
    (tmp_path / "x.bed").write_text("a\t5\t80\ta1\t0\t-\nb\t0\t4\n")
    found = list(
        genomics.embed(
            model, tmp_path / "x.fa", tokenizer=tokenizer, layer=2, intervals=tmp_path / "x.bed"
        )
    )
    assert [(one.name, one.length) for one in found] == [("a1", 75), ("b:0-4(+)", 4)]
    expected = whole(model, encoded(tokenizer, other_strand(text[5:80])), 2)[0].mean(0)
    assert np.allclose(found[0].values, expected, atol=1e-5)
    chunks = genomics.hidden_states(model, text.lower(), layers=1, tokenizer=tokenizer)
    assert_close(torch.cat(list(chunks)), whole(model, encoded(tokenizer, text), 1)[0])


def read_back(file: Path, pool: str) -> list[tuple[str, np.ndarray]]:
    """Names and vectors of a file, by the readers of its format."""
    lengths = None
    if file.suffix == ".npy":
        array = np.load(file)
        rows = [line.split("\t") for line in file.with_suffix(".tsv").read_text().splitlines()]
        assert rows[0] == ["name", "length", "start", "end"]
        found = [(name, array[int(start) : int(end)]) for name, _, start, end in rows[1:]]
        lengths = [int(row[1]) for row in rows[1:]]
    elif file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, "np") as opened:
            metadata = opened.metadata()
            assert (metadata["layer"], metadata["pool"]) == ("1", pool)
            names = json.loads(metadata["names"])
            lengths = opened.get_tensor("lengths").tolist()
            array = opened.get_tensor("embeddings")
        sizes = lengths if pool == "none" else [1] * len(names)
        parts = np.split(array, np.cumsum(sizes)[:-1])
        found = list(zip(names, parts, strict=True))
    else:
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(file).to_pydict()
        found = []
        for name, _ in RECORDS:
            rows = [i for i, one in enumerate(table["name"]) if one == name]
            found.append((name, np.array([table["embedding"][i] for i in rows])))
            if pool == "none":
                assert [table["position"][i] for i in rows] == list(range(len(rows)))
        if pool != "none":
            lengths = table["length"]
    assert lengths is None or lengths == LENGTHS
    return found


@pytest.mark.each
@pytest.mark.parametrize("pool", ["mean", "last", "none"])
@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".parquet"])
def test_files_hold_what_was_computed(
    make_model: MakeModel, tokenizer: Any, tmp_path: Path, suffix: str, pool: str
) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    options = {"tokenizer": tokenizer, "layer": 1, "pool": pool, "chunk_size": 50}
    file = tmp_path / f"out{suffix}"
    rows, width = genomics.write_embeddings(file, make_model(), RECORDS, **options)
    assert (rows, width) == (sum(LENGTHS) if pool == "none" else len(LENGTHS), 12)
    expected = list(genomics.embed(make_model(), RECORDS, **options))
    for (name, values), one in zip(read_back(file, pool), expected, strict=True):
        assert name == one.name
        assert np.array_equal(values.reshape(one.values.shape), one.values)
    with pytest.raises(FileExistsError, match="exists already"):
        genomics.write_embeddings(file, make_model(), RECORDS, **options)
    allowed = {file.name, "out.tsv"} if suffix == ".npy" else {file.name}
    assert {one.name for one in tmp_path.iterdir()} == allowed


def test_a_failure_leaves_no_file(make_model: MakeModel, tokenizer: Any, tmp_path: Path) -> None:
    def fail(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    for suffix in (".npy", ".safetensors"):
        with pytest.raises(KeyboardInterrupt):
            genomics.write_embeddings(
                tmp_path / f"x{suffix}",
                make_model(),
                RECORDS,
                tokenizer=tokenizer,
                layer=0,
                progress=fail,
            )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"layer": 3}, "from 0, the embeddings, to 2, the output of the last norm; got 3"),
        ({"layer": -4}, "got -4"),
        ({"layer": "model.layers.1.mpl"}, "Did you mean 'model.layers.1.mlp'"),
        ({"layer": "model.layers.1.mixer.filter"}, r"must give \(batch, tokens, width\)"),
        ({"layer": "lm_head"}, "it was called 0 times"),
        ({"pool": "max"}, "pool must be 'mean', 'last' or 'none'; got 'max'"),
        ({"chunk_size": 0}, "chunk_size must be at least 1; got 0"),
        ({"records": [("a", "AC"), ("e", "")]}, "the record 'e' has no sequence"),
    ],
)
def test_what_is_wrong_is_said(
    make_model: MakeModel, tokenizer: Any, options: dict[str, Any], sentence: str
) -> None:
    given = {"records": RECORDS, "layer": 0, **options}
    with pytest.raises(ValueError, match=sentence):
        genomics.embed(make_model(), given.pop("records"), tokenizer=tokenizer, **given)


def test_classifiers_are_read_and_models_that_look_ahead_are_not(tokenizer: Any) -> None:
    sizes = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_heads": 2}
    sizes |= {"max_position_embeddings": 32, "num_labels": 2}
    torch.manual_seed(0)
    model = GramianForSequenceClassification(GramianConfig(**sizes)).eval()
    (one,) = genomics.embed(model, {"a": "ACGTA"}, tokenizer=tokenizer, layer=1)
    with torch.no_grad():
        expected = model.base_model(encoded(tokenizer, "ACGTA")).last_hidden_state[0].mean(0)
    assert np.allclose(one.values, expected, atol=1e-5)
    config = GramianConfig(**sizes, mixers="long_convolution", bidirectional=True)
    with pytest.raises(ValueError, match="looks ahead"):
        genomics.embed(
            GramianForSequenceClassification(config), {"a": "A"}, tokenizer=tokenizer, layer=1
        )
    config = GramianConfig(**sizes | {"input_size": 3})
    with pytest.raises(ValueError, match="must read tokens"):
        genomics.embed(
            GramianForSequenceClassification(config), {"a": "A"}, tokenizer=tokenizer, layer=1
        )
    other: Any = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match="must be a Gramian model; got Linear"):
        genomics.hidden_states(other, "ACGT", layers=0)
