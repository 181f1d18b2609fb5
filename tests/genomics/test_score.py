"""A score is the sum of the log-probabilities of the tokens, however it is computed."""

from __future__ import annotations

import copy
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gramian import checkpoints, genomics
from gramian.genomics import RecordScore, _likelihood
from gramian.genomics._score import blocks_of
from gramian.models import GramianForCausalLM, load
from tests.genomics.conftest import drawn
from tests.genomics.reference import Reference, other_strand

MakeModel = Callable[..., GramianForCausalLM]

LENGTHS = [1, 2, 63, 64, 65, 0, 150, 3, 31, 100]
RECORDS = [(f"r{index}", drawn(length, index, "ACGTN")) for index, length in enumerate(LENGTHS)]


def totals(results: Any) -> list[list[float]]:
    return [[strand.total for strand in one.strands] for one in results]


@pytest.mark.each
@pytest.mark.parametrize("bos", [False, True])
def test_scores_are_those_of_tokens_one_by_one(
    make_model: MakeModel, tokenizer: Any, kind: str, bos: bool
) -> None:
    model = make_model(kind)
    reference = Reference(model, tokenizer)
    for count_unknown in (True, False):
        found = list(
            genomics.score(
                model,
                RECORDS,
                tokenizer=tokenizer,
                bos=bos,
                count_unknown=count_unknown,
                reverse_complement="both",
                batch_size=4,
                chunk_size=37,
            )
        )
        assert [one.name for one in found] == [name for name, _ in RECORDS]
        for one, (_, sequence) in zip(found, RECORDS, strict=True):
            assert isinstance(one, RecordScore)
            assert one.length == len(sequence)
            expected = [
                reference.score(text, bos, count_unknown)
                for text in (sequence, other_strand(sequence))
            ]
            for strand, (total, tokens) in zip(one.strands, expected, strict=True):
                assert strand.tokens == tokens
                assert strand.total == pytest.approx(total, rel=1e-5, abs=1e-5)
            if all(tokens for _, tokens in expected):
                mean = sum(total / tokens for total, tokens in expected) / 2
                assert one.mean == pytest.approx(mean, rel=1e-5)
                assert one.total == pytest.approx(sum(t for t, _ in expected) / 2, rel=1e-5)


def test_order_batches_and_chunks_change_nothing(
    make_model: MakeModel, tokenizer: Any, kind: str
) -> None:
    model = make_model(kind)
    whole = list(genomics.score(model, RECORDS, tokenizer=tokenizer, batch_size=1))
    for batch_size, chunk_size in ((1, 16), (3, 33), (64, 10_000)):
        options = {"tokenizer": tokenizer, "batch_size": batch_size, "chunk_size": chunk_size}
        for order in (RECORDS, RECORDS[::-1]):
            found = {one.name: one for one in genomics.score(model, order, **options)}
            for one in whole:
                for a, b in zip(found[one.name].strands, one.strands, strict=True):
                    assert a.tokens == b.tokens
                    assert a.total == pytest.approx(b.total, rel=1e-5, abs=1e-5)


def test_case_and_kind_of_records_change_nothing(
    make_model: MakeModel, tokenizer: Any, tmp_path: Path
) -> None:
    model, sequence = make_model(), drawn(90)
    file = tmp_path / "x.fa"
    file.write_text(f">a some\n{sequence[:40].lower()}\n{sequence[40:]}\n>b\n>c\nACG\n")
    expected = [list(one) for one in ((0, sequence), (1, ""), (2, "ACG"))]
    reference = Reference(model, tokenizer)
    for records in (
        file,
        str(file),
        {"a": sequence, "b": "", "c": "acg"},
        [("a", sequence.replace("T", "U")), ("b", ""), ("c", "ACG")],
    ):
        found = list(genomics.score(model, records, tokenizer=tokenizer))
        assert [one.name for one in found] == ["a", "b", "c"]
        for one, (_, text) in zip(found, expected, strict=True):
            assert one.total == pytest.approx(reference.score(text)[0], rel=1e-5)
    assert math.isnan(found[1].mean)
    assert found[1].length == 0


def test_a_kept_chunk_is_read_once(
    make_model: MakeModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, read = make_model(), []
    batch = _likelihood.Reader._batch

    def counted(self: Any, rows: Any, begin: int, end: int) -> Any:
        made = batch(self, rows, begin, end)
        read.append(int(made[1].sum()))
        return made

    monkeypatch.setattr(_likelihood.Reader, "_batch", counted)
    list(genomics.score(model, RECORDS, tokenizer=tokenizer, batch_size=3, chunk_size=20))
    assert sum(read) == sum(LENGTHS)


def test_progress_counts_bases(make_model: MakeModel, tokenizer: Any) -> None:
    seen: list[tuple[int, int]] = []
    list(
        genomics.score(
            make_model(),
            RECORDS,
            tokenizer=tokenizer,
            reverse_complement="average",
            batch_size=2,
            chunk_size=20,
            bos=True,
            progress=lambda *counts: seen.append(counts),
        )
    )
    assert seen[0] == (0, 2 * sum(LENGTHS))
    assert seen[-1] == (2 * sum(LENGTHS), 2 * sum(LENGTHS))
    steps = [b[0] - a[0] for a, b in itertools.pairwise(seen)]
    assert min(steps) >= 0 and max(steps) <= 2 * 20  # also inside of a long record


def test_long_records_are_few_at_once() -> None:
    lengths = [10] * 40 + [10**6] * 3 + [0, 5]
    blocks = list(blocks_of(lengths, 2, 1000))
    assert blocks == [(0, 32), (32, 41), (41, 42), (42, 43), (43, 45)]
    for skip in range(46):
        assert list(blocks_of(lengths, 2, 1000, skip)) == [one for one in blocks if one[1] > skip]


def test_what_is_skipped_changes_nothing(make_model: MakeModel, tokenizer: Any) -> None:
    options = {"tokenizer": tokenizer, "batch_size": 2}
    records = [(f"r{index}", drawn(5 + index % 13, index)) for index in range(80)]
    whole = list(genomics.score(make_model(), records, **options))
    for skip in (0, 1, 31, 32, 33, 79, 80):
        rest = list(genomics.score(make_model(), records, skip=skip, **options))
        assert rest == whole[skip:]


def test_intervals_are_records(make_model: MakeModel, tokenizer: Any, tmp_path: Path) -> None:
    sequence = drawn(120)
    (tmp_path / "x.fa").write_text(f">a\n{sequence[:50]}\n{sequence[50:]}\n")
    (tmp_path / "x.bed").write_text("a\t10\t70\na\t3\t40\tleft\t0\t-\n")
    reference = Reference(make_model(), tokenizer)
    for records in (tmp_path / "x.fa", {"a": sequence}):
        found = list(
            genomics.score(make_model(), records, tokenizer=tokenizer, intervals=tmp_path / "x.bed")
        )
        assert [(one.name, one.length) for one in found] == [("a:10-70(+)", 60), ("left", 37)]
        expected = [sequence[10:70], other_strand(sequence[3:40])]
        for one, text in zip(found, expected, strict=True):
            assert one.total == pytest.approx(reference.score(text)[0], rel=1e-5)


def test_weights_that_are_not_finite_are_told(make_model: MakeModel, tokenizer: Any) -> None:
    model = copy.deepcopy(make_model())
    model.lm_head.weight.data[9] = torch.nan
    with pytest.raises(ValueError, match="log-likelihoods are not finite"):
        list(genomics.score(model, RECORDS, tokenizer=tokenizer))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"reverse_complement": "yes"}, "must be 'no', 'average' or 'both'; got 'yes'"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"window": 8}, "window is the number of bases around a variant; give variants too"),
        ({"variants": [], "intervals": "x"}, "variants or intervals, not both"),
        ({"records": {}}, "at least one record"),
        ({"records": ["ACGT"]}, "pairs of names and sequences; got str as record 1"),
        ({"records": [("p", "MKLE")]}, "p: 'L', 'E' are no codes of nucleotides"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_computed(
    make_model: MakeModel, tokenizer: Any, options: dict[str, Any], sentence: str
) -> None:
    records = options.pop("records", RECORDS)
    with pytest.raises(ValueError, match=sentence):
        genomics.score(make_model(), records, tokenizer=tokenizer, **options)


def test_an_adapter_is_read_as_its_model(make_model: MakeModel, tokenizer: Any) -> None:
    class Adapter(torch.nn.Module):
        def get_base_model(self) -> Any:
            return make_model()

    adapter: Any = Adapter()
    found = list(genomics.score(adapter, RECORDS, tokenizer=tokenizer))
    assert found == list(genomics.score(make_model(), RECORDS, tokenizer=tokenizer))
    chunks = genomics.hidden_states(adapter, torch.tensor([7, 8]), layers="model.layers.0.mlp")
    assert [tuple(one.shape) for one in chunks] == [(2, 12)]


def test_another_model_is_refused(tokenizer: Any) -> None:
    other: Any = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match="must be a GramianForCausalLM; got Linear"):
        genomics.score(other, RECORDS, tokenizer=tokenizer)


def test_a_tokenizer_of_several_letters_is_refused(make_model: MakeModel) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {a + b: i for i, (a, b) in enumerate(itertools.product("ACGT", repeat=2))}
    raw = Tokenizer(models.WordLevel({**words, "[UNK]": 16}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="one token for each nucleotide"):
        genomics.score(
            make_model(), RECORDS, tokenizer=PreTrainedTokenizerFast(tokenizer_object=raw)
        )


def test_memory_does_not_grow_with_a_record(make_model: MakeModel, tokenizer: Any) -> None:
    resource = pytest.importorskip("resource")
    kibibyte = 1024 if sys.platform == "darwin" else 1  # elsewhere it is the unit
    model = make_model()

    def peak(length: int) -> int:
        list(
            genomics.score(
                model,
                {"a": "ACGT" * (length // 4)},
                tokenizer=tokenizer,
                chunk_size=4096,
                reverse_complement="average",
            )
        )
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = peak(20_000)
    assert (
        peak(200_000) - before < 20_000 * kibibyte
    )  # 180,000 logits alone would be 11 MiB a strand


def test_the_tokenizer_is_that_of_the_model(
    make_model: MakeModel, tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="tokenizer must be given"):
        genomics.score(make_model(), RECORDS)
    expected = totals(genomics.score(make_model(), RECORDS, tokenizer=tokenizer))
    make_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    saved = load(tmp_path)
    assert totals(genomics.score(saved, RECORDS)) == expected
    (chunk,) = genomics.hidden_states(saved, "ACGT", layers=0)
    assert torch.equal(chunk, saved.model.embed_tokens.weight[7:11])
    for name in ("hyenadna_tiny.ckpt", "evo_tiny.safetensors"):
        model, own, _ = checkpoints.load(Path(__file__).parents[1] / "data" / name)
        found = list(genomics.embed(model, {"a": "ACGTN"}, layer=0))
        assert found[0].name == "a"
        ids = own("ACGTN").input_ids
        mean = model.model.embed_tokens.weight[ids].float().mean(0)
        assert torch.allclose(torch.from_numpy(found[0].values), mean, atol=1e-6)
