"""Fine-tuned HyenaDNA: folders of classifiers, and Lightning files with their configuration."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

from gramian import checkpoints, tasks
from gramian.checkpoints import DNATokenizer, files
from gramian.evaluation import evaluate_task
from gramian.models import (
    GramianForCausalLM,
    GramianForSequenceClassification,
    GramianForTokenClassification,
    load_any,
)

_spec = importlib.util.spec_from_file_location("hyenadna", Path(__file__).with_name("hyenadna.py"))
assert _spec is not None and _spec.loader is not None
hyenadna = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hyenadna)

NAMES = {"0": "enhancer", "1": "junk", "2": "promoter"}
LABELS = {
    "architectures": ["HyenaDNAForSequenceClassification"],
    "id2label": NAMES,
    "label2id": {name: int(number) for number, name in NAMES.items()},
    "problem_type": "single_label_classification",
}
PAD = 4


def head(labels: int = 3, name: str = "score", bias: bool = False) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(9)
    found = {f"{name}.weight": torch.randn(labels, 16, generator=draw)}
    return found | ({f"{name}.bias": torch.randn(labels, generator=draw)} if bias else {})


def write(folder: Path, tensors: dict[str, Tensor], pickled: bool = False, **changes: Any) -> Path:
    """A folder as a trainer leaves it, with `changes` to the configuration."""
    folder.mkdir(exist_ok=True)
    config = hyenadna.CONFIG | LABELS | changes
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if pickled:
        more = {name.replace(".1.freq", f".{i}.freq"): value for name, value in tensors.items()
                if name.endswith(".1.freq") for i in (3, 5)}  # fmt: skip
        torch.save(tensors | more, folder / "pytorch_model.bin")
    else:
        save_file({name: value.clone() for name, value in tensors.items()},
                  folder / "model.safetensors")  # fmt: skip
    torch.save({"state": {0: torch.ones(3)}}, folder / "optimizer.pt")
    for name in ("scheduler.pt", "rng_state.pth", "scaler.pt", "training_args.bin"):
        (folder / name).write_bytes(b"no tensors")
    (folder / "trainer_state.json").write_text("{}", encoding="utf-8")
    return folder


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(7, 12, (3, 21), generator=torch.Generator().manual_seed(2))


def published_logits(tensors: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Those before the first padding token; of the last token if there is none before it."""
    first = [row.index(PAD) if PAD in row else 0 for row in ids.tolist()]
    last = [index - 1 for index in first]
    hidden = hyenadna.hidden_states(tensors, ids)[torch.arange(len(ids)), last]
    return hidden @ tensors["score.weight"].double().T


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pickled", [False, True])
@torch.no_grad()
def test_a_sequence_classifier_has_the_published_logits(
    tmp_path: Path, ids: Tensor, pickled: bool
) -> None:
    tensors = hyenadna.tensors() | head()
    loaded = checkpoints.load(write(tmp_path / "checkpoint-62500", tensors, pickled))
    model = loaded.model
    assert type(model) is GramianForSequenceClassification and not model.training
    assert loaded.format == "hyenadna"
    close(model(ids).logits, published_logits(tensors, ids))
    # padding on the right, as the published model reads it
    lengths = torch.tensor([21, 9, 1])
    mask = (torch.arange(21) < lengths[:, None]).long()
    padded = ids.masked_fill(mask == 0, PAD)
    close(model(padded, attention_mask=mask).logits, published_logits(tensors, padded))
    # on the left, where the published model reads the padding too, each sequence as if alone
    alone = torch.cat([published_logits(tensors, ids[:1, :n]) for n in (21, 9, 1)])
    left, shown = torch.full_like(ids, PAD), mask.flip(1)
    for row, count in enumerate((21, 9, 1)):
        left[row, 21 - count :] = ids[0, :count]
    close(model(left, attention_mask=shown).logits, alone)
    unlike = published_logits(tensors, left)[1:] - alone[1:]
    assert unlike.abs().max() > 1e-2


def test_names_of_labels_are_kept(tmp_path: Path, ids: Tensor) -> None:
    loaded = checkpoints.load(write(tmp_path / "model", hyenadna.tensors() | head()))
    loaded.model.save_pretrained(tmp_path / "saved")
    for config in (loaded.model.config, load_any(tmp_path / "saved").config):
        assert config.id2label == {0: "enhancer", 1: "junk", 2: "promoter"}
        assert config.label2id == LABELS["label2id"]
        assert config.problem_type == "single_label_classification"
        assert config.num_labels == 3 and config.pooling == "last"
    two = write(tmp_path / "two", hyenadna.tensors() | head(2), id2label=None, label2id=None)
    assert checkpoints.load(two).model.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    regression = write(
        tmp_path / "one",
        hyenadna.tensors() | head(1),
        id2label={"0": "activity"},
        label2id={"activity": 0},
        problem_type="regression",
    )
    model = checkpoints.load(regression).model
    assert model.config.problem_type == "regression"
    loss = model(ids, labels=torch.tensor([0.0, 1, 2])).loss
    torch.testing.assert_close(loss, (model(ids).logits[:, 0] - torch.arange(3)).square().mean())


@pytest.mark.parametrize(("name", "bias"), [("score", False), ("classifier", True)])
@torch.no_grad()
def test_a_token_classifier_has_the_published_logits(
    tmp_path: Path, ids: Tensor, name: str, bias: bool
) -> None:
    tensors, top = hyenadna.tensors(), head(3, name, bias)
    named = ["HyenaDNAForTokenClassification"]
    folder = write(tmp_path / "model", tensors | top, architectures=named, problem_type=None)
    model = checkpoints.load(folder).model
    assert type(model) is GramianForTokenClassification
    expected = hyenadna.hidden_states(tensors, ids) @ top[f"{name}.weight"].double().T
    close(model(ids).logits, expected + top.get(f"{name}.bias", torch.zeros(3)).double())


@torch.no_grad()
def test_the_tokenizer_ends_a_sequence_as_in_training(tmp_path: Path) -> None:
    """The published tokenizer appends [SEP], whose logits are then those of the sequence."""
    tensors = hyenadna.tensors() | head()
    loaded = checkpoints.load(write(tmp_path / "model", tensors))
    assert isinstance(loaded.tokenizer, DNATokenizer)
    loaded.tokenizer.save_pretrained(tmp_path / "tokenizer")
    for tokenizer in (loaded.tokenizer, AutoTokenizer.from_pretrained(tmp_path / "tokenizer")):
        assert tokenizer("ACGTN").input_ids == [7, 8, 9, 10, 11, 1]
        assert tokenizer("ac gt").input_ids == [7, 8, 9, 10, 1]
        assert tokenizer("AC", add_special_tokens=False).input_ids == [7, 8]
    assert DNATokenizer()("ACGTN").input_ids == [7, 8, 9, 10, 11]

    pytest.importorskip("datasets")
    lines = [("ACGTACGTTT", "junk"), ("GGGT", "enhancer"), ("TTAACCNN", "promoter")]
    text = "sequence,label\n" + "".join(f"{one},{label}\n" for one, label in lines)
    (tmp_path / "test.csv").write_text(text, encoding="utf-8")
    task = tasks.build("table", test=str(tmp_path / "test.csv"), length=11, tokenizer="dna")
    measured = evaluate_task(loaded.model, task, tokenizer=loaded.tokenizer)
    losses = []
    for sequence, label in lines:
        ids = torch.tensor([["ACGTN".index(base) + 7 for base in sequence] + [1]])
        logs = published_logits(tensors, ids).log_softmax(-1)
        losses.append(-float(logs[0, LABELS["label2id"][label]]))
    assert {m.metric: m.value for m in measured}["loss"] == pytest.approx(sum(losses) / 3, 1e-4)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"id2label": {"0": "a", "1": "b"}},
            r"1 of other shapes \(score.weight is \(3, 16\) and not \(2, 16\)\)",
        ),
        ({"id2label": None}, r"\(score.weight is \(3, 16\) and not \(2, 16\)\)"),
        ({"d_model": 32}, r"of other shapes \(hyena.backbone"),
        ({"n_layer": 3}, r"missing \(backbone.layers.2"),
        ({"architectures": ["HyenaDNAForCausalLM"]}, r"has no lm_head.weight.*embeddings=False"),
        (
            {"architectures": ["HyenaDNAForCausalLM"], "tie_word_embeddings": True},
            r"not of this format \(score.weight\)",
        ),
        ({"architectures": None}, "has score.weight, the head of a classifier"),
        (
            {"architectures": ["HyenaDNAForMaskedLM"]},
            "must name one of .*; got HyenaDNAForMaskedLM",
        ),
        (
            {
                "architectures": ["HyenaDNAForTokenClassification"],
                "problem_type": "multi_label_classification",
            },
            "problem_type='multi_label_classification'",
        ),
        ({"id2label": {"a": "b"}}, "id2label .* must have numbers as keys; got 'a'"),
        ({"id2label": "a"}, "id2label in the checkpoint's configuration cannot be 'a'"),
    ],
)
def test_a_configuration_of_another_model_is_refused(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    folder = write(tmp_path / "model", hyenadna.tensors() | head(), **changes)
    with pytest.raises(ValueError, match=sentence) as caught:
        checkpoints.load(folder)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_a_missing_head_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 missing \(score.weight\)"):
        checkpoints.load(write(tmp_path / "model", hyenadna.tensors()))


def test_a_trainers_files_are_no_checkpoints(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", hyenadna.tensors() | head())
    (folder / "model.safetensors").rename(folder / "fine_tuned.safetensors")
    assert files.read_tensors(folder).keys() == (hyenadna.tensors() | head()).keys()
    (folder / "fine_tuned.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        checkpoints.load(folder)


def lightning(**hyper_parameters: Any) -> dict[str, Any]:
    """What Lightning writes of a language model such as regLM's."""
    named = {name.replace("hyena.", "model."): value for name, value in hyenadna.tensors().items()}
    embedding = named["model.backbone.embeddings.word_embeddings.weight"]
    named |= {
        name.replace(".1.freq", f".{number}.freq"): value
        for name, value in list(named.items())
        if name.endswith(".1.freq")
        for number in (3, 5)
    }
    return {
        "epoch": 3,
        "global_step": 120,
        "pytorch-lightning_version": "2.0.1",
        "state_dict": named | {"model.lm_head.weight": embedding},
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {
            "ModelCheckpoint{'monitor': 'val_acc'}": {"best_model_score": torch.ones(())}
        },
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": hyper_parameters,
    }


INNER: dict[str, Any] = {
    "d_model": 16,
    "n_layer": 2,
    "d_inner": 40,
    "vocab_size": 12,
    "resid_dropout": 0.0,
    "embed_dropout": 0.1,
    "fused_mlp": False,
    "pad_vocab_size_multiple": 8,
    "layer": {
        "_name_": "hyena",
        "emb_dim": 5,
        "filter_order": 12,
        "local_order": 3,
        "l_max": 50,
        "modulate": True,
        "w": 10,
        "lr": 6e-4,
        "wd": 0.0,
        "lr_pos_emb": 0.0,
    },
}
REGLM: dict[str, Any] = {
    "ckpt_dir": None,
    "logger": "csv",
    "save_dir": Path(),
    "lr": 1e-4,
    "label_len": 2,
    "hyenadna_path": "hyena-dna",
    "seq_len": np.max([30, 28]),
    "unique_labels": set(np.array(["0", "1"])),
}


@pytest.mark.parametrize(
    "hyper_parameters", [{**REGLM, "config": INNER}, {"model": INNER, "train": {"seed": 1}}, INNER]
)
@torch.no_grad()
def test_a_configuration_inside_of_the_file_is_used(
    tmp_path: Path, ids: Tensor, hyper_parameters: dict[str, Any]
) -> None:
    torch.save(lightning(**hyper_parameters), tmp_path / "last.ckpt")
    loaded = checkpoints.load(tmp_path / "last.ckpt")
    assert type(loaded.model) is GramianForCausalLM and loaded.format == "hyenadna"
    hidden = hyenadna.hidden_states(hyenadna.tensors(), ids)
    embedding = hyenadna.tensors()["hyena.backbone.embeddings.word_embeddings.weight"]
    close(loaded.model(ids).logits, hidden @ embedding.double().T)
    # a label and a start of regLM are special tokens here
    assert loaded.tokenizer is not None
    assert loaded.tokenizer("[CLS][BOS][MASK]ACG").input_ids == [0, 2, 3, 7, 8, 9]


def test_a_file_without_a_configuration_is_refused(tmp_path: Path) -> None:
    torch.save(lightning(**REGLM, config=None), tmp_path / "last.ckpt")
    with pytest.raises(FileNotFoundError, match="none among hyper-parameters inside"):
        checkpoints.load(tmp_path / "last.ckpt")
    assert checkpoints.load(tmp_path / "last.ckpt", config=INNER).format == "hyenadna"
    wrong = {**INNER, "layer": {**INNER["layer"], "l_max": 49}}
    torch.save(lightning(**REGLM, config=wrong), tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"of other shapes \(model.*pos_emb.*is \(1, 50, 5\)"):
        checkpoints.load(tmp_path / "last.ckpt")
    (tmp_path / "last.config.json").write_text(json.dumps(INNER), encoding="utf-8")
    assert checkpoints.load(tmp_path / "last.ckpt").format == "hyenadna"  # beside it comes first


def test_convert_writes_a_classifier(
    tmp_path: Path, ids: Tensor, call: Callable[..., tuple[int, str, str]]
) -> None:
    tensors = hyenadna.tensors() | head()
    write(tmp_path / "model", tensors)
    status, out, err = call("convert", "model", "out", "--json")
    assert status == 0, err
    report = json.loads(out)
    assert (report["format"], report["model"]) == ("hyenadna", "GramianForSequenceClassification")
    assert list(report["sha256"]) == ["model.safetensors"]
    with torch.no_grad():
        close(load_any(tmp_path / "out")(ids).logits, published_logits(tensors, ids))
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("AC").input_ids == [7, 8, 1]
