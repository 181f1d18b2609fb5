"""What is no checkpoint, or one that cannot be expressed, is refused in one sentence, unread."""

from __future__ import annotations

import json
import pickle
import re
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gramian import checkpoints
from gramian.checkpoints import files
from gramian.models import GramianForCausalLM


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Loads what must not load, and returns the one sentence; no model may be made on the way."""

    def refused(path: Path, kind: type[Exception] = ValueError, **kwargs: Any) -> str:
        def never(*args: Any, **kwargs: Any) -> None:
            pytest.fail("a model was made")

        monkeypatch.setattr(GramianForCausalLM, "from_pretrained", never)
        with pytest.raises(kind) as caught:
            checkpoints.load(path, **kwargs)
        sentence = str(caught.value)
        assert "\n" not in sentence and sentence.endswith(".")
        return sentence

    return refused


def test_foreign_keys_are_named(refused: Any, write: Any) -> None:
    file = write({f"transformer.h.{i}.weight": torch.ones(2) for i in range(9)})
    sentence = refused(file, config={})
    assert "safari, hyenadna, hyena_rtf, striped_hyena" in sentence
    assert "transformer.h.0.weight" in sentence and "transformer.h.8.weight" not in sentence


def test_a_configuration_is_needed(refused: Any, write: Any, published: Any) -> None:
    file = write(published("hyenadna_tiny").tensors())
    sentence = refused(file, FileNotFoundError)
    assert "no configuration beside it" in sentence and "such as evo2_7b (--config" in sentence
    missing = file.parent / "other.json"
    assert "other.json" in refused(file, FileNotFoundError, config=missing)
    (file.parent / "config.json").write_text("{")
    assert "config.json cannot be read" in refused(file)
    (file.parent / "config.json").write_text("[1]")
    assert "must hold a mapping; it holds a list" in refused(file)
    (file.parent / "config.json").unlink()
    (file.parent / "config.yml").write_text("a: [1")
    assert "config.yml cannot be read" in refused(file)


def test_keys_that_do_not_fit_are_named(every: Any, refused: Any, write: Any) -> None:
    tensors, config = every.tensors(), every.config()
    first = next(name for name in sorted(tensors) if ".0." in name)
    lacking = {name: value for name, value in tensors.items() if name != first}
    sentence = refused(write(lacking), config=config)
    assert "1 missing" in sentence and first.split(".0.")[1] in sentence
    more = tensors | {first + "_x": torch.ones(2)}
    sentence = refused(write(more), config=config)
    assert f"1 not of this format ({first}_x)" in sentence
    wrong = tensors | {first: torch.ones(3, 2, 7)}
    sentence = refused(write(wrong), config=config)
    assert f"1 of other shapes ({first} is (3, 2, 7) and not {tuple(tensors[first].shape)})" in (
        sentence
    )


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("safari_hyena_order2", {"d_model": 16}, "of other shapes"),
        ("safari_hyena_order2", {"n_layer": 3}, "missing .*layers.2"),
        ("safari_hyena_order2", {"n_layer": 1}, "not of this format .*layers.1"),
        ("safari_hyena_order2", {"vocab_size": 65}, "of other shapes"),
        ("safari_hyena_order2", {"layer.l_max": 64}, "of other shapes .*pos_emb"),
        ("safari_hyena_order2", {"layer.order": 3}, "of other shapes"),
        ("safari_hyena_order2", {"pad_vocab_size_multiple": 0}, "must be at least 1; got 0"),
        ("safari_hyena_order2", {"layer": None}, "lacks layer"),
        ("safari_hyena_order2", {"d_model": None}, "lacks d_model"),
        ("safari_hyena_order2", {"d_model": "32"}, "d_model .* cannot be '32'"),
        ("safari_hyena_order2", {"n_layer": True}, "n_layer .* cannot be True"),
        ("safari_hyena_order2", {"layer._name_": "h3"}, "_name_='h3'.*'hyena' is needed"),
        ("safari_hyena_order2", {"layer.num_heads": 2}, "num_heads=2.*1 is needed"),
        ("safari_hyena_order2", {"layer.num_blocks": 2}, "num_blocks=2"),
        ("safari_hyena_order2", {"layer.activation": "gelu"}, "activation='gelu'"),
        ("safari_hyena_order2", {"layer.filter_cls": "long-conv"}, "filter_cls='long-conv'"),
        ("safari_hyena_order2", {"max_position_embeddings": 64}, "max_position_embeddings=64"),
        ("safari_hyena_order2", {"attn_layer_idx": [1]}, r"attn_layer_idx=\[1\]"),
        ("safari_hyena_order2", {"resid_dropout": 1.5}, "dropout must be a probability"),
        ("hyenadna_tiny", {"layer.short_filter_order": 4}, "not causal.*short_filter_order=4"),
        ("hyena_rtf", {"layer.filter_args": None}, "lacks state_size"),
        ("hyena_rtf", {"layer.filter_cls": "hyena-filter"}, "filter_cls='hyena-filter'.*'rtf'"),
        ("hyena_rtf", {"layer.filter_args.constraint": "l2"}, "constraint must be .*got 'l2'"),
        ("hyena_rtf", {"layer.filter_args.constraint": "no"}, "not of this format .*scalar"),
        ("hyena_rtf", {"layer.filter_args.state_size": 6}, "of other shapes .*ab is"),
        ("stripedhyena_tiny", {"num_attention_heads": 5}, "must divide hidden_size"),
        ("stripedhyena_tiny", {"num_attention_heads": 0}, "must be at least 1; got 0"),
        ("stripedhyena_tiny", {"final_norm": False}, "final_norm=False"),
        ("stripedhyena_tiny", {"mlp_activation": "relu"}, "must be 'silu' or 'gelu'"),
        ("stripedhyena_tiny", {"attn_layer_idxs": [1]}, "missing .*inner_mha_cls"),
        ("stripedhyena_gqa", {"smeared_gqa": True}, "smeared_gqa=True"),
        ("stripedhyena_gqa", {"proj_groups": 4}, "of other shapes .*Wqkv"),
    ],
)
def test_configurations_that_do_not_fit(
    refused: Any, published: Any, name: str, change: dict[str, Any], sentence: str
) -> None:
    checkpoint = published(name)
    config = checkpoint.config()
    for path, value in change.items():
        *parents, last = path.split(".")
        place = config
        for parent in parents:
            place = place[parent]
        place[last] = value
    assert re.search(sentence, refused(checkpoint.file, config=config))


def test_another_epsilon_than_the_published_code_has(refused: Any, hugging_face_dna: Path) -> None:
    config = json.loads((hugging_face_dna / "config.json").read_text())
    sentence = refused(hugging_face_dna, config=config | {"layer_norm_epsilon": 1e-6})
    assert "layer_norm_epsilon=1e-06" in sentence


def test_a_classification_head_is_no_language_model(
    refused: Any, hugging_face_dna: Path, write: Any
) -> None:
    tensors = files.read_tensors(hugging_face_dna) | {"score.weight": torch.ones(2, 32)}
    config = hugging_face_dna / "config.json"
    assert "not of this format (score.weight)" in refused(write(tensors), config=config)


def test_values_that_the_published_code_cannot_have(
    refused: Any, published: Any, write: Any
) -> None:
    checkpoint = published("hyenadna_tiny")
    prefix = "model.backbone.layers.0.mixer.filter_fn."
    tensors = checkpoint.tensors()
    tensors[f"{prefix}implicit_filter.3.freq"] = 2 * tensors[f"{prefix}implicit_filter.3.freq"]
    file = write(tensors)
    assert "different frequencies" in refused(file, config=checkpoint.config())
    tensors = checkpoint.tensors()
    tensors[f"{prefix}pos_emb.t"] = tensors[f"{prefix}pos_emb.t"].square()
    file = write(tensors)
    assert "evenly from 0 to 1" in refused(file, config=checkpoint.config())


def test_formats_are_asked_for_by_name(refused: Any, published: Any) -> None:
    file = published("hyenadna_tiny").file
    assert "format must be one of 'safari', " in refused(file, format="hyena")
    sentence = refused(file, format="striped_hyena")
    assert "its keys are those of safari or hyenadna" in sentence


def test_what_is_not_there(refused: Any, tmp_path: Path) -> None:
    assert "no checkpoint" in refused(tmp_path / "absent.ckpt", FileNotFoundError)
    assert "holds no checkpoint" in refused(tmp_path, FileNotFoundError)
    for name in ("a.ckpt", "b.ckpt"):
        torch.save({}, tmp_path / name)
    assert "several checkpoints (a.ckpt, b.ckpt)" in refused(tmp_path)
    assert "holds no tensors" in refused(tmp_path / "a.ckpt")


def test_files_of_old_versions_of_pytorch(published: Any, tmp_path: Path) -> None:
    checkpoint = published("hyenadna_tiny")
    content = {"state_dict": checkpoint.tensors(), "epoch": 1}
    torch.save(content, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    read = files.read_tensors(tmp_path / "old.ckpt")
    assert read.keys() == checkpoint.tensors().keys()
    assert all(torch.equal(value, read[key]) for key, value in checkpoint.tensors().items())


@pytest.mark.parametrize("kept", [0, 10, 0.5, -1])
@pytest.mark.parametrize("name", ["hyenadna_tiny", "safari_hyena_order2"])
def test_truncated_files(
    refused: Any, published: Any, tmp_path: Path, name: str, kept: float
) -> None:
    checkpoint = published(name)
    content = checkpoint.file.read_bytes()
    file = tmp_path / checkpoint.file.name
    file.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    assert str(file) in refused(file, config=checkpoint.config())


def test_shards(published: Any, tmp_path: Path, refused: Any) -> None:
    checkpoint = published("evo_tiny")
    tensors = sorted(checkpoint.tensors().items())
    parts = {"a.safetensors": dict(tensors[:9]), "b.safetensors": dict(tensors[9:])}
    for name, part in parts.items():
        save_file(part, tmp_path / name)
    index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps(checkpoint.config()))
    expected = checkpoint.expected()
    with torch.no_grad():
        made = checkpoints.load(tmp_path).model(expected["input_ids"]).logits
    torch.testing.assert_close(made, expected["logits"], rtol=0, atol=1e-4)
    (tmp_path / "b.safetensors").unlink()
    assert "lacks the weights file b.safetensors" in refused(tmp_path, FileNotFoundError)
    outside = {"weight_map": {"x": "../a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(outside))
    refused(tmp_path, FileNotFoundError)


class Attack:
    """An object whose pickle calls `function(*arguments)` when it is read."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("where", ["beside", "inside"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_pickle_is_refused_and_not_run(
    refused: Any, published: Any, tmp_path: Path, where: str, legacy: bool
) -> None:
    checkpoint, sign = published("hyenadna_tiny"), tmp_path / "executed"
    state = checkpoint.tensors()
    attacks = {
        "eval": Attack(eval, f"open({str(sign)!r}, 'w')"),
        "system": Attack(__import__("os").system, f"touch {sign}"),
    }
    for name, attack in attacks.items():
        content: dict[str, Any] = {"state_dict": state, "extra": attack}
        if where == "inside":
            content = {"state_dict": state | {"model.extra": attack}}
        file = tmp_path / f"{name}.ckpt"
        torch.save(content, file, _use_new_zipfile_serialization=not legacy)
        sentence = refused(file, config=checkpoint.config())
        assert "refused" in sentence and (name in sentence or legacy)
        assert not sign.exists()
    pickle.loads(pickle.dumps(attacks["eval"])).close()
    assert sign.exists()  # the attack would have worked


def test_a_call_hidden_under_a_name_of_bookkeeping_is_not_made(
    published: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where a package of that name is installed and has such a function."""
    called = []
    module = types.ModuleType("omegaconf")
    module.create = lambda *arguments: called.append(arguments)  # type: ignore[attr-defined]
    module.create.__module__, module.create.__qualname__ = "omegaconf", "create"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "omegaconf", module)
    checkpoint = published("hyenadna_tiny")
    content = {
        "state_dict": checkpoint.tensors(),
        "hyper_parameters": Attack(module.create, "x"),  # type: ignore[attr-defined]
    }
    torch.save(content, tmp_path / "lightning.ckpt")
    loaded = checkpoints.load(tmp_path / "lightning.ckpt", config=checkpoint.config())
    assert loaded.format == "hyenadna" and not called


def test_lightnings_bookkeeping_is_passed_over(
    published: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Objects with states and nested objects, as omegaconf's are, of a package not installed."""
    module = types.ModuleType("omegaconf.dictconfig")

    class DictConfig:
        def __init__(self, content: Any) -> None:
            self.content = content

    DictConfig.__module__, DictConfig.__qualname__ = "omegaconf.dictconfig", "DictConfig"
    module.DictConfig = DictConfig  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
    monkeypatch.setitem(sys.modules, "omegaconf.dictconfig", module)
    checkpoint = published("hyenadna_tiny")
    inner = DictConfig({"path": Path("x"), "types": [dict, int], "layer": DictConfig([1, None])})
    content = {
        "state_dict": checkpoint.tensors(),
        "hyper_parameters": inner,
        "callbacks": {"checkpoint": {"best": Path("y")}},
        "epoch": 3,
    }
    torch.save(content, tmp_path / "lightning.ckpt")
    monkeypatch.undo()
    assert "omegaconf.dictconfig" not in sys.modules
    loaded = checkpoints.load(tmp_path / "lightning.ckpt", config=checkpoint.config())
    left = [str(item) for item in torch.serialization.get_safe_globals()]
    assert not [item for item in left if "omegaconf" in item]
    expected = checkpoint.expected()
    with torch.no_grad():
        made = loaded.model(expected["input_ids"]).logits
    torch.testing.assert_close(made, expected["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([torch.ones(2)], "must hold tensors by name; it holds a list"),
        ({"a": 3}, "'a' is a int"),
        ({"state_dict": {"a": "text"}}, "'a' is a str"),
        ({"state_dict": 5}, "must hold tensors by name; it holds a int"),
    ],
)
def test_what_holds_other_things_than_tensors(
    refused: Any, tmp_path: Path, content: Any, sentence: str
) -> None:
    torch.save(content, tmp_path / "x.ckpt")
    assert sentence in refused(tmp_path / "x.ckpt")


def test_a_zip_that_is_no_checkpoint(refused: Any, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02]q\x00.")
    refused(tmp_path / "x.ckpt")
    with zipfile.ZipFile(tmp_path / "y.ckpt", "w") as archive:
        archive.writestr("y/other", b"")
    refused(tmp_path / "y.ckpt")


def test_a_translation_that_forgets_a_weight_makes_no_model(
    published: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    format = checkpoints.FORMATS["hyenadna"]
    translate = format.translate

    def forgetful(self: Any, *arguments: Any) -> Iterator[dict[str, torch.Tensor]]:
        for part in translate(self, *arguments):
            part.pop("model.layers.0.mixer.short.bias", None)
            yield part

    monkeypatch.setattr(format, "translate", forgetful)
    file = published("hyenadna_tiny").file
    with pytest.raises(RuntimeError, match=r"not translated whole.*mixer\.short\.bias"):
        checkpoints.load(file)
    with pytest.raises(
        RuntimeError, match=r"1 tensors .* missing: .*layers\.0\.mixer\.short\.bias"
    ):
        checkpoints.convert(file, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_name_belongs_to_one_format() -> None:
    other = type("Other", (checkpoints.FORMATS["safari"],), {"name": "hyenadna"})
    with pytest.raises(ValueError, match="the format 'hyenadna' is already registered"):
        checkpoints.register(other)
    assert checkpoints.FORMATS["hyenadna"] is not other
