"""What Hugging Face's tools do with a model: streamers, pipelines, placement, loading, export."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

from gramian.models import (
    ByteTokenizer,
    GramianConfig,
    GramianForCausalLM,
    GramianForSequenceClassification,
    GramianForSignalRegression,
    GramianForTokenClassification,
    GramianModel,
    load,
)
from gramian.models.remote_code import AUTO_MAP, MODULE

MakeConfig = Callable[..., GramianConfig]
MakeTokens = Callable[[int, int], torch.Tensor]
TEXT = "the memory of a sequence"


@pytest.fixture
def writer(make_config: MakeConfig) -> GramianForCausalLM:
    """A model of bytes, without an end of text."""
    torch.manual_seed(4)
    return GramianForCausalLM(make_config(vocab_size=259, pad_token_id=258)).eval()


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


def continued(model: GramianForCausalLM, tokenizer: ByteTokenizer, text: str) -> str:
    inputs = tokenizer(text, return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    return tokenizer.decode(written[0, inputs["input_ids"].shape[1] :])


def test_streamers(
    writer: GramianForCausalLM, tokenizer: ByteTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = continued(writer, tokenizer, TEXT)
    inputs = tokenizer(TEXT, return_tensors="pt")
    settings: dict[str, Any] = {**inputs, "max_new_tokens": 10, "do_sample": False}
    writer.generate(**settings, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out == expected + "\n"
    pieces = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=writer.generate, kwargs={**settings, "streamer": pieces})
    thread.start()
    assert "".join(pieces) == expected
    thread.join()


def test_the_text_generation_pipeline(writer: GramianForCausalLM, tokenizer: ByteTokenizer) -> None:
    generate = pipeline("text-generation", model=writer, tokenizer=tokenizer)
    texts = [TEXT, "a", "a somewhat longer text than the others"]
    expected = [continued(writer, tokenizer, text) for text in texts]
    settings = {"max_new_tokens": 10, "do_sample": False, "return_full_text": False}
    for batch_size in (1, 3):  # of three, two are padded
        outputs = generate(texts, batch_size=batch_size, **settings)
        assert [output[0]["generated_text"] for output in outputs] == expected
    beams = generate(TEXT, **settings, num_beams=3, num_return_sequences=2)
    assert len(beams) == 2


def test_the_text_classification_pipeline(
    make_config: MakeConfig, tokenizer: ByteTokenizer
) -> None:
    torch.manual_seed(4)
    config = make_config(vocab_size=259, pad_token_id=258, num_labels=3, bidirectional=False)
    model = GramianForSequenceClassification(config).eval()
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
    texts = [TEXT, "short"]
    for batch_size in (1, 2):
        outputs = classify(texts, batch_size=batch_size)
        for text, output in zip(texts, outputs, strict=True):
            logits = model(**tokenizer(text, return_tensors="pt")).logits.detach()
            score, label = logits.softmax(-1)[0].max(-1)
            assert output["label"] == config.id2label[int(label)]
            assert output["score"] == pytest.approx(float(score), rel=1e-4)


WAYS = ("auto", "disk", "layers", "empty", "low_cpu_mem_usage", "cpu_offload", "disk_offload")


def place(folder: Path, way: str) -> torch.nn.Module:
    """The model in `folder`, loaded in one of the ways that accelerate offers."""
    accelerate = pytest.importorskip("accelerate")
    store = str(folder / "store")
    if way == "auto":
        return GramianForCausalLM.from_pretrained(folder, device_map="auto")
    if way == "disk":
        try:
            return GramianForCausalLM.from_pretrained(
                folder, device_map={"": "disk"}, offload_folder=store
            )
        except ValueError as error:  # before accelerate 1.15
            if "offload the whole model to the disk" not in str(error):
                raise
            pytest.skip(str(error))
    if way == "layers":
        places = {"model.layers.1": "disk"}
        for name in ("embed_tokens", "layers.0", "norm", "embedding_dropout"):
            places[f"model.{name}"] = "cpu"
        return GramianForCausalLM.from_pretrained(
            folder, device_map={**places, "lm_head": "cpu"}, offload_folder=store
        )
    if way == "empty":
        with accelerate.init_empty_weights():
            hollow = GramianForCausalLM(AutoConfig.from_pretrained(folder))
        hollow.tie_weights()
        return accelerate.load_checkpoint_and_dispatch(hollow, folder, device_map={"": "cpu"})
    model = GramianForCausalLM.from_pretrained(folder, low_cpu_mem_usage=True)
    if way == "cpu_offload":
        accelerate.cpu_offload(model, "cpu")
    if way == "disk_offload":
        accelerate.disk_offload(model, store, "cpu")
    return model


def writes_the_same_when_placed(
    config: GramianConfig, tokens: torch.Tensor, folder: Path, way: str
) -> None:
    torch.manual_seed(6)
    model = GramianForCausalLM(config).eval()
    model.save_pretrained(folder)
    placed = place(folder, way).eval()
    if way in ("disk", "layers", "disk_offload", "cpu_offload"):
        assert any(parameter.is_meta for parameter in placed.parameters())
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(placed.generate(tokens, **settings), model.generate(tokens, **settings))
    with torch.no_grad():
        assert torch.equal(placed(tokens).logits, model(tokens).logits)


@pytest.mark.each
@pytest.mark.parametrize("way", WAYS)
def test_wherever_its_weights_are_it_writes_the_same(
    make_config: MakeConfig,
    make_tokens: MakeTokens,
    tmp_path: Path,
    filter_config: dict[str, Any],
    way: str,
) -> None:
    mixers = ["multi_hyena", "gated_delta_net"]
    config = make_config(mixers=mixers, filter=filter_config)
    writes_the_same_when_placed(config, make_tokens(2, 9), tmp_path, way)


@pytest.mark.parametrize(
    "way",
    [way if way == "layers" else pytest.param(way, marks=pytest.mark.slow) for way in WAYS],
)
def test_so_does_every_mixer(
    make_config: MakeConfig, make_tokens: MakeTokens, tmp_path: Path, mixer: Any, way: str
) -> None:
    writes_the_same_when_placed(make_config(mixers=mixer), make_tokens(2, 9), tmp_path, way)


@pytest.mark.parametrize("way", ["cpu", "disk"])
def test_a_classifier_with_batch_norm_is_offloaded(
    make_tokens: MakeTokens, tmp_path: Path, way: str
) -> None:
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(6)
    config = GramianConfig(
        vocab_size=50,
        hidden_size=8,
        num_hidden_layers=2,
        max_position_embeddings=32,
        mixers="long_convolution",
        filter={"type": "rtf", "state_size": 4},
        block="glu",
        norm="batch",
        num_labels=3,
    )
    model = GramianForSequenceClassification(config)
    tokens = make_tokens(4, 12)
    model.train()(tokens, labels=torch.tensor([0, 1, 2, 0]))  # statistics of their own
    with torch.no_grad():
        expected = model.eval()(tokens).logits
        if way == "cpu":
            accelerate.cpu_offload(model, "cpu")
        else:
            accelerate.disk_offload(model, str(tmp_path), "cpu")
        assert any(parameter.is_meta for parameter in model.parameters())
        assert torch.equal(model(tokens).logits, expected)


def test_filters_are_declared_to_stay_in_single_precision(
    make_config: MakeConfig, tmp_path: Path, filter_config: dict[str, Any]
) -> None:
    """transformers plans the dtypes of what it loads by these names, and refuses one in both."""
    model = GramianForCausalLM(make_config(filter=filter_config))
    assert not model._keep_in_fp32_modules & model._keep_in_fp32_modules_strict
    model.save_pretrained(tmp_path)
    for dtype in (torch.float16, torch.bfloat16):
        plan = model._get_dtype_plan(dtype)
        assert set(plan.values()) == {torch.float32}
        half = GramianForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        for name, parameter in half.named_parameters():
            assert parameter.dtype == (torch.float32 if ".mixer.filter." in name else dtype), name


FRESH = """
import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer



class Absent:  # finds, as the first one asked, that the package is not installed
    def find_spec(self, name, path=None, target=None):
        if name == "gramian":
            raise ModuleNotFoundError("No module named 'gramian'", name=name)


folder = sys.argv[1]
sys.meta_path.insert(0, Absent())
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
except ImportError as error:
    print(error)
sys.meta_path.pop(0)
assert not any(name.split(".")[0] == "gramian" for name in sys.modules)
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__ == "gramian.models.modeling"
assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ == "GramianModel"
import transformers
for name in ("GramianForCausalLM", "GramianConfig", "GramianModel", "ByteTokenizer"):
    assert getattr(transformers, name).__module__.startswith("gramian.models."), name
inputs = tokenizer(sys.argv[2], return_tensors="pt")
written = model.generate(**inputs, max_new_tokens=10, do_sample=False)
print(tokenizer.decode(written[0, inputs["input_ids"].shape[1]:]).encode())
again = Path(folder, "again")
model.save_pretrained(again)
print(*sorted(file.name for file in again.iterdir()))
"""


def run_fresh(
    program: str, writer: GramianForCausalLM, tokenizer: ByteTokenizer, place: Path, argument: str
) -> subprocess.CompletedProcess[str]:
    """Run a program in another process, on the folder of a saved model and one more argument."""
    folder = place / "model"
    writer.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return subprocess.run(
        [sys.executable, "-c", program, folder, argument],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HOME": str(place / "home"), "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        timeout=300,
    )


def test_a_fresh_process_loads_a_folder_with_trust_remote_code(
    writer: GramianForCausalLM, tokenizer: ByteTokenizer, tmp_path: Path
) -> None:
    ran = run_fresh(FRESH, writer, tokenizer, tmp_path, TEXT)
    assert ran.returncode == 0, ran.stderr
    missing, text, files = ran.stdout.strip().splitlines()
    assert missing == 'this model needs the package gramian: pip install "gramian[models]".'
    assert text == str(continued(writer, tokenizer, TEXT).encode())
    names = ["config.json", "generation_config.json", "model.safetensors", f"{MODULE}.py"]
    assert sorted(files.split()) == sorted(names)


EARLY = """
import sys

import transformers

first = transformers
if sys.argv[2] == "late":  # transformers makes itself a second time when this name is read
    transformers.ProcessorMixin
    assert first is not sys.modules["transformers"]
if sys.argv[2] == "folder":
    transformers.AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
else:
    import gramian.models
for package in (first, sys.modules["transformers"]):
    for name in ("GramianForCausalLM", "GramianConfig", "GramianModel", "ByteTokenizer"):
        assert getattr(package, name).__module__.startswith("gramian.models."), name
config = transformers.AutoConfig.from_pretrained(sys.argv[1])
getattr(first, config.architectures[0]).from_pretrained(sys.argv[1])
assert type(transformers.AutoTokenizer.from_pretrained(sys.argv[1])).__name__ == "ByteTokenizer"
"""


@pytest.mark.parametrize(
    "when",
    [
        # All other tests import early, and the test above reads a folder.
        pytest.param("early", marks=pytest.mark.slow),
        "late",
        pytest.param("folder", marks=pytest.mark.slow),
    ],
)
def test_tools_find_the_classes_in_transformers_however_it_was_imported(
    writer: GramianForCausalLM, tokenizer: ByteTokenizer, tmp_path: Path, when: str
) -> None:
    ran = run_fresh(EARLY, writer, tokenizer, tmp_path, when)
    assert ran.returncode == 0, ran.stderr
    assert "Do you wish to run the custom code" not in ran.stdout


def test_configurations_have_the_map_of_classes(
    make_config: MakeConfig, make_tokens: MakeTokens, tmp_path: Path
) -> None:
    config = make_config()
    config.save_pretrained(tmp_path)
    assert "auto_map" not in config.to_dict()
    assert AUTO_MAP["AutoConfig"] in (tmp_path / "config.json").read_text()
    read = AutoConfig.from_pretrained(tmp_path)
    assert type(read) is GramianConfig
    assert read.auto_map == config.auto_map == AUTO_MAP
    assert read.to_diff_dict() == config.to_diff_dict()
    model = GramianForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    tokens = make_tokens(1, 5)
    for trust in (None, False, True):  # this package is imported: the folder's module is not run
        again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=trust)
        assert type(again) is GramianForCausalLM
        assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert load(tmp_path).config.to_diff_dict() == model.config.to_diff_dict()
    with pytest.raises(AssertionError, match="should be a directory"):
        config.save_pretrained(tmp_path / "config.json")


def test_generation_ends_at_a_string(writer: GramianForCausalLM, tokenizer: ByteTokenizer) -> None:
    inputs = tokenizer(TEXT, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    whole = writer.generate(**inputs, max_new_tokens=10, do_sample=False)[0, length:]
    end = tokenizer.decode(whole[3:5])
    for cached in (True, False):
        stopped = writer.generate(
            **inputs,
            max_new_tokens=10,
            do_sample=False,
            use_cache=cached,
            stop_strings=[end],
            tokenizer=tokenizer,
        )
        assert torch.equal(stopped[0, length:], whole[:5])


def test_continuous_batching_is_refused(writer: GramianForCausalLM) -> None:
    with pytest.raises(NotImplementedError, match="give generate a padded batch of prompts"):
        writer.generate_batch([[1, 2], [3]])
    assert not hasattr(writer, "init_continuous_batching")  # servers ask this


MIXERS: dict[str, Any] = {
    "multi_hyena": "multi_hyena",
    "hyena": "hyena",
    "long_convolution": "long_convolution",
    "hybrid": ["hyena", "softmax_attention"],
}
MODELS = (
    GramianModel,
    GramianForCausalLM,
    GramianForSequenceClassification,
    GramianForSignalRegression,
    GramianForTokenClassification,
)


@pytest.mark.each
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("mixers", MIXERS.values(), ids=MIXERS)
def test_forward_can_be_exported(
    make_config: MakeConfig,
    make_tokens: MakeTokens,
    mixers: Any,
    kind: type[torch.nn.Module],
    masked: bool,
) -> None:
    """A traced graph may not look at values, such as whether a mask hides anything."""
    torch.manual_seed(8)
    layers = 1 if isinstance(mixers, str) else len(mixers)  # each is traced by itself
    model = kind(make_config(mixers=mixers, num_hidden_layers=layers)).eval()
    inputs = {"input_ids": make_tokens(3, 11)}
    others = {"input_ids": make_tokens(3, 11)}
    if masked:
        inputs["attention_mask"] = torch.ones(3, 11).long()
        others["attention_mask"] = torch.ones(3, 11).long()
        others["attention_mask"][0, :4] = 0  # the graph was traced with nothing hidden
        others["attention_mask"][1, [2, 3, 7]] = 0
    with torch.no_grad():
        graph = torch.export.export(model, (), inputs).module()
        for given in (inputs, others):
            traced, computed = graph(**given), model(**given)
            assert traced.get("past_key_values") is None
            torch.testing.assert_close(traced[0], computed[0], atol=2e-5, rtol=1e-5)


def test_the_implementation_of_attention(
    make_config: MakeConfig, make_tokens: MakeTokens, tmp_path: Path
) -> None:
    """A hybrid's attention is torch's own, whatever its name; another one is refused."""
    torch.manual_seed(4)
    model = GramianForCausalLM(make_config(mixers=["hyena", "softmax_attention"])).eval()
    model.save_pretrained(tmp_path)
    tokens = make_tokens(2, 20)
    with torch.no_grad():
        expected = model(tokens).logits
        for name in ("sdpa", "eager"):
            again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
            assert again.config._attn_implementation == name
            assert torch.equal(again(tokens).logits, expected)
    for name in ("flash_attention_2", "flex_attention", "unknown"):
        refusal = rf"must be \"sdpa\" or \"eager\".* got '{name}'"
        with pytest.raises(ValueError, match=refusal):
            AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
        with pytest.raises(ValueError, match=refusal):
            model.set_attn_implementation(name)


def test_a_cache_of_another_kind_is_refused(
    make_config: MakeConfig, make_tokens: MakeTokens
) -> None:
    model = GramianForCausalLM(make_config(mixers=["hyena", "softmax_attention"])).eval()
    tokens = make_tokens(2, 9)
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    for cache in (DynamicCache(), DynamicCache(config=model.config)):
        refusal = r"which model\.make_cache\(\) makes; got DynamicCache"
        with pytest.raises(TypeError, match=refusal):
            model(tokens, past_key_values=cache)
        with pytest.raises(TypeError, match=refusal):
            model.generate(tokens, past_key_values=cache, **settings)
    made = model.generate(tokens, past_key_values=model.make_cache(), **settings)
    assert torch.equal(made, model.generate(tokens, **settings))
