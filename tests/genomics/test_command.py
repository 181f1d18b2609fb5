"""`gramian score` and `gramian embed` from files to files."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("typer")

from gramian import cli, genomics
from gramian.models import GramianForCausalLM
from tests.genomics.conftest import drawn

MakeModel = Callable[..., GramianForCausalLM]
Call = Callable[[str], tuple[int, str, str]]

GENOME = drawn(200)


@pytest.fixture
def call(
    tmp_path: Path,
    make_model: MakeModel,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Call:
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "x.fa").write_text(f">a\n{GENOME[:120]}\n>b\n{GENOME[120:]}\n")
    base = GENOME[9]
    (tmp_path / "x.vcf").write_text(
        f"#CHROM\tPOS\tID\tREF\tALT\na\t10\t.\t{base}\t{'A' if base != 'A' else 'C'}\n"
    )

    def main(line: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["gramian", *shlex.split(line)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.main()
        assert isinstance(exit.value.code, int)
        return (exit.value.code, *capfd.readouterr())

    return main


def test_score(call: Call, make_model: MakeModel, tokenizer: Any, tmp_path: Path) -> None:
    status, out, err = call("score model x.fa --output out.tsv")
    assert status == 0, err
    assert "2 records." in out and "Written to out.tsv" in out
    assert "\n1 variant.\n" in "\n" + call("score model x.fa --variants x.vcf -o one.tsv")[1]
    expected = list(genomics.score(make_model(), tmp_path / "x.fa", tokenizer=tokenizer))
    rows = [line.split("\t") for line in (tmp_path / "out.tsv").read_text().splitlines()]
    assert rows[0] == ["name", "length", "tokens", "total", "mean"]
    assert [(row[0], float(row[3])) for row in rows[1:]] == [
        (one.name, pytest.approx(one.total, abs=1e-4)) for one in expected
    ]
    line = "score model x.fa --variants x.vcf --window 40 --reverse-complement both --bos"
    status, out, err = call(f"{line} --skip-unknown --batch-size 1 -o v.tsv --json")
    assert status == 0, err
    assert json.loads(out) == {"rows": 1, "rows_before": 0}
    (one,) = genomics.score(
        make_model(),
        tmp_path / "x.fa",
        tokenizer=tokenizer,
        variants=tmp_path / "x.vcf",
        window=40,
        reverse_complement="both",
        bos=True,
    )
    names, cells = (line.split("\t") for line in (tmp_path / "v.tsv").read_text().splitlines())
    row = dict(zip(names, cells, strict=True))
    assert float(row["difference"]) == pytest.approx(one.difference, abs=1e-4)  # type: ignore


def test_embed(call: Call, make_model: MakeModel, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "x.bed").write_text("a\t3\t90\n")
    for more in ("--layer -1", "--layer 1 --pool last", "--layer model.layers.0.mlp --pool none"):
        status, out, err = call(f"embed model x.fa {more} --intervals x.bed --output e.npy --json")
        assert status == 0, err
        words = dict(zip(*[iter(more.split())] * 2, strict=True))
        (one,) = genomics.embed(
            make_model(),
            tmp_path / "x.fa",
            tokenizer=tokenizer,
            layer=genomics.read_layer(words["--layer"]),
            pool=words.get("--pool", "mean"),
            intervals=tmp_path / "x.bed",
        )
        found = np.load(tmp_path / "e.npy")
        assert np.allclose(found, np.atleast_2d(one.values), atol=1e-5)
        assert json.loads(out) == {"vectors": len(found), "width": 12}
        (tmp_path / "e.npy").unlink()
        (tmp_path / "e.tsv").unlink()


@pytest.mark.parametrize(
    ("line", "status", "sentence"),
    [
        ("score model y.fa -o o.tsv", 1, "there is no file y.fa"),
        ("score nothing x.fa -o o.tsv", 1, "there is no model folder nothing"),
        ("score model x.fa -o x.vcf", 1, "x.vcf exists already"),
        ("score model x.fa -o o.tsv --window 3", 2, "--window needs --variants"),
        ("score model x.fa -o o.tsv --reverse-complement up", 2, "average, both or no"),
        ("score model x.fa -o o.tsv --device nowhere", 1, "--device nowhere"),
        ("score model x.vcf -o o.tsv", 1, "x.vcf"),
        ("score model x.fa --variants bad.vcf -o o.tsv", 1, "line 2: the alternative allele '<D"),
        ("embed model x.fa -o o.txt", 2, "must end in .safetensors, .npy or"),
        ("embed model x.fa -o o.npy --pool max", 2, "must be mean, last or none"),
        ("embed model x.fa -o o.npy --layer model.layer.0", 1, "Did you mean 'model.layers.0'"),
        ("embed model x.fa -o o.npy --layer 9", 1, "got 9"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    call: Call, tmp_path: Path, line: str, status: int, sentence: str
) -> None:
    (tmp_path / "bad.vcf").write_text("#CHROM\tPOS\tID\tREF\tALT\na\t10\t.\tA\t<DEL>\n")
    found, out, err = call(line)
    words = " ".join(err.replace("│", " ").split())
    assert (found, out) == (status, ""), err
    assert sentence in words, words
    if status == 1:
        assert err.startswith("gramian: ") and err.count("\n") == 1
    assert not list(tmp_path.glob("o.*"))


@pytest.mark.parametrize("package", ["pyfaidx", "pyarrow"])
def test_a_missing_package_is_named_with_its_extra(
    call: Call, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    line = {
        "pyfaidx": "score model x.fa --variants x.vcf -o o.tsv",
        "pyarrow": "embed model x.fa -o o.parquet",
    }[package]
    status, _, err = call(line)
    assert status == 1
    assert f'need {package}: pip install "gramian[genomics]"' in err
    assert err.count("\n") == 1
