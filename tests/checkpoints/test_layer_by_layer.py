"""Conversion layer by layer: the same folder as from a whole model, in the memory of one layer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gramian import checkpoints
from gramian.checkpoints import FORMATS, files
from gramian.models import GramianConfig, GramianForCausalLM
from gramian.models.saving import check_range, empty_model, save_parts

DATA = Path(__file__).parents[1] / "data"
ALL = ("safari_hyena_order3.safetensors", "hyenadna_tiny.ckpt", "hyena_rtf.safetensors")
ALL += ("stripedhyena_gqa.safetensors", "evo_tiny.safetensors", "evo2_tiny.pt")


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.each
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_every_file_is_that_of_the_whole_model(
    name: str, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    model, tokenizer, format = checkpoints.load(DATA / name, dtype=dtype)
    model.save_pretrained(tmp_path / "whole")
    if tokenizer is not None:
        tokenizer.save_pretrained(tmp_path / "whole")
    report = checkpoints.convert(DATA / name, tmp_path / "parts", dtype=dtype)
    assert (report.format, report.parameters) == (format, model.num_parameters())
    written = content(tmp_path / "parts")
    assert json.loads(written.pop("conversion.json")) == report.to_dict()
    assert report.summary in written.pop("README.md").decode()
    assert written == content(tmp_path / "whole")


def test_all_formats_are_converted_here() -> None:
    found = set()
    for name in ALL:
        stored = files.open_checkpoint(DATA / name).tensors
        config = files.find_config(DATA / name)
        settings = files.read_config(config) if config else files.read_inner_config(DATA / name)
        fitting = [cls for cls in FORMATS.values() if cls.strip(stored)]
        meant = [cls for cls in fitting if cls.meant_by(settings or {})]
        found.add((meant or fitting)[0].name)
    assert found == {*FORMATS}


@pytest.mark.parametrize("limit", [30_000, "80KB"])
def test_shards_are_as_small_as_those_of_transformers(limit: int | str, tmp_path: Path) -> None:
    file = DATA / "stripedhyena_tiny.safetensors"
    model = checkpoints.load(file).model
    model.save_pretrained(tmp_path / "whole", max_shard_size=limit)
    checkpoints.convert(file, tmp_path / "parts", max_shard_size=limit)
    tensors = {}
    for shard in (tmp_path / "parts").glob("model-*.safetensors"):
        with safe_open(shard, framework="pt") as opened:  # checks the layout, too
            held = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        largest = limit if isinstance(limit, int) else 80_000
        assert sum(one.nbytes for one in held.values()) <= largest or len(held) == 1
        tensors |= held
    expected = model.state_dict()
    assert tensors.keys() == expected.keys() - model.all_tied_weights_keys.keys()
    assert all(torch.equal(value, expected[name]) for name, value in tensors.items())
    indices = [
        json.loads((tmp_path / folder / "model.safetensors.index.json").read_text())
        for folder in ("whole", "parts")
    ]
    assert indices[0]["metadata"] == indices[1]["metadata"]
    assert indices[0]["weight_map"].keys() == indices[1]["weight_map"].keys()
    assert GramianForCausalLM.from_pretrained(tmp_path / "parts").num_parameters()


def test_a_failure_at_the_last_layer_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    format = FORMATS["striped_hyena"]
    translate, seen = format.translate, []

    def failing(self: Any, weights: Any) -> Iterator[dict[str, Tensor]]:
        for part in translate(self, weights):
            if f"model.layers.{self.layers - 1}.mixer_norm.weight" in part:
                seen.extend(tmp_path.glob("deep/.out-*/model.safetensors"))
                raise OSError("no space left")
            yield part

    monkeypatch.setattr(format, "translate", failing)
    with pytest.raises(OSError, match="no space left"):
        checkpoints.convert(DATA / "stripedhyena_tiny.safetensors", tmp_path / "deep" / "out")
    assert seen and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn])
def test_weights_of_a_dtype_without_a_model_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    file = DATA / "safari_hyena_order3.safetensors"
    sentence = f"dtype is {dtype}; weights of a model must have one of float16, "
    with pytest.raises(ValueError, match=sentence):
        checkpoints.load(file, dtype=dtype)
    with pytest.raises(ValueError, match=sentence):
        checkpoints.convert(file, tmp_path / "out", dtype=dtype)
    embedding = "backbone.embeddings.word_embeddings.weight"
    weights = load_file(file)
    weights[embedding] = weights[embedding].to(torch.int64)
    save_file(weights, tmp_path / "integers.safetensors")
    with pytest.raises(ValueError, match=r"embeddings.* has the dtype torch.int64; weights"):
        checkpoints.convert(
            tmp_path / "integers.safetensors", tmp_path / "out", config=file.with_suffix(".json")
        )
    assert [path.name for path in tmp_path.iterdir()] == ["integers.safetensors"]


@pytest.mark.skipif(sys.platform == "win32", reason="links need privileges")
def test_a_link_keeps_its_name(tmp_path: Path) -> None:
    """As in the Hub's cache, whose folders hold links to files that are named by their hashes."""
    file = DATA / "safari_hyena_order3.safetensors"
    (tmp_path / "0123").write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "0123")
    config = file.with_suffix(".json")
    report = checkpoints.convert(tmp_path / "model.safetensors", tmp_path / "out", config=config)
    assert report.checkpoint == str(tmp_path / "model.safetensors")
    assert list(report.sha256) == ["model.safetensors"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model.norm.weight": torch.ones(3)}, r"model.norm.weight is \(3,\), and \(8,\) is"),
        ({"model.other": torch.ones(8)}, "model.other is not one of the model"),
        ({"model.layers.0.mlp.up_proj.weight": torch.ones(16, 8)}, "is given twice"),
    ],
)
def test_parts_that_are_not_the_model_are_refused(
    change: dict[str, Tensor], sentence: str, tmp_path: Path
) -> None:
    config = GramianConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_heads=2,
        intermediate_size=16,
        filter={"type": "implicit"},
        max_position_embeddings=16,
    )
    model = empty_model(GramianForCausalLM, config, torch.float32)
    assert all(weight.device.type == "meta" for weight in model.state_dict().values())
    whole = GramianForCausalLM(config).state_dict()
    save_parts(model, iter([dict(whole)]), tmp_path / "good")
    assert GramianForCausalLM.from_pretrained(tmp_path / "good") is not None
    others = {name: value for name, value in whole.items() if "norm" not in name}
    with pytest.raises(RuntimeError, match=sentence):
        save_parts(model, iter([others, change]), tmp_path / "bad")


@pytest.mark.parametrize(
    ("tensor", "dtype", "sentence"),
    [
        (
            torch.tensor([1.0, -7e4]),
            torch.float16,
            r"^x has values up to 7e\+04, .*torch.bfloat16\.$",
        ),
        (
            torch.tensor([1e300], dtype=torch.float64),
            torch.float32,
            r"^x has .* 1e\+300, .*torch.float64\.$",
        ),
        (torch.tensor([1e300], dtype=torch.float64), torch.bfloat16, r"^x has .*torch.float64\.$"),
        (torch.ones(2, dtype=torch.complex64), torch.float32, "^x is complex, and torch.float32 "),
        (torch.tensor([65519.0]), torch.float16, None),  # it is rounded down
        (torch.tensor([float("inf"), 1e-30]), torch.float16, None),
        (torch.tensor([7e4]).bfloat16(), torch.float32, None),
        (torch.tensor([3]), torch.float16, None),
        (torch.empty(0), torch.float16, None),
        (torch.ones(2, dtype=torch.complex64), torch.complex64, None),
    ],
)
def test_a_dtype_that_cannot_hold_a_value_is_refused(
    tensor: torch.Tensor, dtype: torch.dtype, sentence: str | None
) -> None:
    with nullcontext() if sentence is None else pytest.raises(ValueError, match=sentence):
        check_range("x", tensor, dtype)


def test_a_checkpoint_that_overflows_is_refused(tmp_path: Path) -> None:
    tensors = load_file(DATA / "hyenadna_order3.safetensors")
    name = next(name for name in tensors if name.endswith("embeddings.weight"))
    tensors[name] = 1e6 * torch.ones_like(tensors[name])
    save_file(tensors, tmp_path / "big.safetensors")
    shutil.copyfile(DATA / "hyenadna_order3.json", tmp_path / "big.json")
    sentence = "embed_tokens.weight has values up to 1e.06, .*choose torch.bfloat16"
    with pytest.raises(ValueError, match=sentence):
        checkpoints.convert(tmp_path / "big.safetensors", tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=sentence):
        checkpoints.load(tmp_path / "big.safetensors", dtype=torch.float16)
    checkpoints.convert(tmp_path / "big.safetensors", tmp_path / "out", dtype=torch.bfloat16)


# --- where the values of a tensor are ------------------------------------------------------------


def test_values_are_read_where_pickles_keep_them(tmp_path: Path) -> None:
    """Views of larger tensors, transposed ones, scalars, and nothing at all."""
    base = torch.randn(6, 5)
    tensors = {
        "rows": base[2:4],
        "columns": base[:, 1:3],
        "transposed": base.T,
        "scalar": torch.tensor(3.0, dtype=torch.float64),
        "none": torch.empty(0, 3),
        "halves": torch.randn(7).bfloat16(),
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "flags": torch.tensor([True, False]),
    }
    for legacy in (False, True):
        file = tmp_path / "x.pt"
        torch.save(tensors, file, _use_new_zipfile_serialization=not legacy)
        stored = files.open_checkpoint(file).tensors
        assert stored.shapes == {name: tuple(one.shape) for name, one in tensors.items()}
        for found in (stored, files.read_tensors(file)):
            assert list(found) == list(tensors)
            for name, value in tensors.items():
                assert found[name].dtype == value.dtype and torch.equal(found[name], value)
                assert not found[name].requires_grad
            assert found["rows"].untyped_storage().nbytes() == tensors["rows"].nbytes


def test_nothing_is_read_before_it_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tensors = {"a": torch.randn(4), "b": torch.randn(5)}
    torch.save(tensors, tmp_path / "x.pt")
    save_file(tensors, tmp_path / "x.safetensors")
    for file in (tmp_path / "x.pt", tmp_path / "x.safetensors"):
        stored = files.open_checkpoint(file).tensors
        asked = []
        place = type(stored._places["a"])
        read = place.read
        monkeypatch.setattr(place, "read", lambda self: asked.append(self.shape) or read(self))  # noqa: B023
        assert "a" in stored and "c" not in stored and stored.renamed({"a": "d"}).shapes
        assert not asked and torch.equal(stored["b"], tensors["b"]) and asked == [(5,)]
        monkeypatch.undo()


def test_a_file_that_the_system_does_not_map(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Linux refuses a file that is larger than the memory; it can be converted all the same."""

    def refuse(*args: Any) -> None:
        raise RuntimeError("unable to mmap 42949672960 bytes: Cannot allocate memory (12)")

    monkeypatch.setattr(torch.UntypedStorage, "from_file", refuse)
    file = DATA / "stripedhyena_tiny.safetensors"
    with pytest.raises(ValueError, match=r"cannot be mapped .* gramian convert reads it layer by"):
        checkpoints.load(file)
    checkpoints.convert(file, tmp_path / "out")
    # PyTorch 2.6 does not tell where the tensors of a pickle are, so it has to map the file.
    pickled = tmp_path / "x.pt"
    torch.save({"a": torch.randn(4)}, pickled)
    monkeypatch.setattr(files, "_tells_places", lambda: False)
    with pytest.raises(ValueError, match=r"cannot be mapped .* a newer PyTorch reads it layer by"):
        files.open_checkpoint(pickled)


def test_a_compressed_archive_and_one_of_another_byte_order(tmp_path: Path) -> None:
    """Values that cannot be read in place are read by PyTorch, as before."""
    import zipfile

    tensors = {"a": torch.arange(300.0)}
    torch.save(tensors, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, record in records.items():
            archive.writestr(name, record)
    order = "big" if sys.byteorder == "little" else "little"
    with zipfile.ZipFile(tmp_path / "z.pt", "w") as archive:
        for name, record in records.items():
            swapped = torch.frombuffer(bytearray(record), dtype=torch.uint8)
            if "/data/" in name:
                record = bytes(swapped.reshape(-1, 4).flip(-1).flatten().tolist())
            archive.writestr(name, order.encode() if name.endswith("byteorder") else record)
    for file in ("y.pt", "z.pt"):
        assert torch.equal(files.open_checkpoint(tmp_path / file).tensors["a"], tensors["a"])


@pytest.mark.parametrize("damage", ["length", "dtype", "shape", "place", "list", "utf-8"])
def test_damaged_headers_are_refused(damage: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    entry: dict[str, Any] = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    if damage != "length":
        entry |= {
            "dtype": {"dtype": "F3"},
            "shape": {"shape": [-2]},
            "place": {"data_offsets": [4, 12]},
        }.get(damage, {})
    header = json.dumps([1] if damage == "list" else {"a": entry}).encode()
    header = b"\xff" + header if damage == "utf-8" else header
    length = len(header) + (100 if damage == "length" else 0)
    file.write_bytes(length.to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match=r"cannot be read: .*\.$"):
        files.open_checkpoint(file)


# --- memory --------------------------------------------------------------------------------------

CHILD = """
import json, resource, sys
from pathlib import Path
from gramian import checkpoints

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

def growth(source, out):
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    checkpoints.convert(source, out, max_shard_size="10MB")
    return peak() - before

allowance, warm, *sources = sys.argv[1:]
checkpoints.convert(warm, warm + ".out")
print(json.dumps([growth(source, source + ".out") for source in sources]))
size = int(Path("/proc/self/status").read_text().split("VmSize:")[1].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + int(allowance),) * 2)
for source in sources:
    checkpoints.convert(source, source + ".again")
try:
    held = checkpoints.load(sources[1])
except (MemoryError, RuntimeError, ValueError) as error:
    print(json.dumps(str(error)))
"""


def many_layers(name: str, folder: Path, layers: int, width: int, suffix: str) -> int:
    """Write a checkpoint of equal layers in two files, or in one, and return the bytes of each."""
    first = DATA / name
    config_file = files.find_config(first)
    config = files.read_config(config_file) if config_file else files.read_inner_config(first)
    assert config is not None
    stored = files.open_checkpoint(first).tensors
    format = next(cls for cls in FORMATS.values() if cls.strip(stored))
    if "layer" in config:
        config |= {"n_layer": layers, "d_model": width, "d_inner": 4 * width}
    else:
        config |= {"num_layers": layers, "hidden_size": width, "attn_layer_idxs": [0]}
    shapes = format({}, config).expected()
    tensors = {key: torch.randn(shape) / 30 for key, shape in shapes.items()}
    for key, value in tensors.items():
        if key.endswith("pos_emb.t"):
            value.copy_(torch.linspace(0, 1, value.numel()).reshape(value.shape))
        if key.endswith(".freq"):
            value.fill_(1)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if suffix == ".pt":
        torch.save(tensors, folder / "model.pt")
    else:
        parts = [dict(list(tensors.items())[part::2]) for part in (0, 1)]
        index = {"weight_map": {key: f"{i}.safetensors" for i in (0, 1) for key in parts[i]}}
        for i, part in enumerate(parts):
            save_file(part, folder / f"{i}.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(value.nbytes for key, value in tensors.items() if ".1." in key)


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of memory cannot be reset"
)
def test_more_layers_need_no_more_memory(tmp_path: Path) -> None:
    """From 3 to 12 layers, the peak grows by less than one of the 9 layers.

    The largest checkpoint is three times as large as the address space that is then left, which its
    mapped files would need, too.
    """
    cases = [("safari_hyena_order2.safetensors", ".safetensors")]
    if files._tells_places():  # an older PyTorch maps pickles
        cases.append(("stripedhyena_tiny.safetensors", ".pt"))
    sources, sizes = [], []
    for number, (name, suffix) in enumerate(cases):
        for layers in (3, 12):
            folder = tmp_path / f"{number}-{layers}"
            sizes.append(many_layers(name, folder, layers, 256, suffix))
            sources.append(str(folder))
    warm = tmp_path / "warm"
    many_layers(cases[0][0], warm, 1, 32, ".safetensors")
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(12 * sizes[1] // 3), str(warm), *sources],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
    )
    assert child.returncode == 0, child.stderr
    peaks, refusal = map(json.loads, child.stdout.splitlines())
    for i in range(0, len(peaks), 2):
        few, many = peaks[i : i + 2]
        assert many - few < 0.75 * sizes[i], (few, many, sizes[i])
        assert many < 3 * sizes[i] + 2**21, (many, sizes[i])
    assert "memory" in refusal  # the limit would have been felt
