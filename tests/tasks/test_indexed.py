"""Random access gives the letters of the one reader, and BED the intervals of its lines."""

from __future__ import annotations

import gc
import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pyfaidx")

from gramian import tasks
from gramian.tasks import IndexedGenome, Interval, genomes, read_bed
from gramian.tasks.bed import count_overlaps
from gramian.tasks.documents import blocks
from tests.tasks.test_genomes import drawn


def regular(random: np.random.Generator, end: bytes) -> bytes:
    """A file that pyfaidx reads: lines of one length, with masks, codes of the IUPAC and U."""
    parts = []
    for index in range(3):
        width, count = int(random.integers(1, 9)), int(random.integers(4))
        rest = int(random.integers(1, width + 1))
        lines = [random.choice([*b"ACGTNacgtnuRYw-"], size=width) for _ in range(count)]
        lines.append(random.choice([*b"ACGT"], size=rest))
        parts.append(f">r{index} about > it".encode())
        parts += [line.astype(np.uint8).tobytes() for line in lines]
    return end.join(parts) + end * int(random.integers(3))


def texts(file: Path) -> list[tuple[str, str]]:
    found = genomes.records(blocks(file), str(file), warn=False)
    return [(name, b"".join(pieces).decode()) for name, pieces in found]


@pytest.mark.filterwarnings("ignore")
def test_any_file_has_the_letters_of_the_reader(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    file = tmp_path / "x.fa"
    direct = 0
    for number in range(240):
        end = [b"\n", b"\r\n", b"\r"][number // 3 % 3]
        data = drawn(random) if number % 3 == 0 else regular(random, end)
        if number % 7 == 0:
            data = b"\xef\xbb\xbf" + data
        file.write_bytes(gzip.compress(data) if number % 5 == 0 else data)
        expected = texts(file)
        names = [name for name, _ in expected]
        with IndexedGenome(file) as genome:
            direct += genome._reader.filename == str(file)
            for name, text in expected:
                if names.count(name) > 1:
                    with pytest.raises(ValueError, match="several records called"):
                        genome.fetch(name, 0, 0)
                    continue
                assert genome.lengths[name] == len(text)
                assert genome.fetch(name, 0, len(text)) == text
                start, stop = sorted(random.integers(len(text) + 1, size=2).tolist())
                assert genome.fetch(name, start, stop) == text[start:stop], (data, start, stop)
    assert 50 < direct < 150  # both ways were taken


@pytest.mark.parametrize("size", [1, 2**16, 2**16 + 1, 200_000])
def test_long_records_of_odd_files(size: int, tmp_path: Path) -> None:
    text = "".join(np.random.default_rng(size).choice([*"ACGT"], size=size))
    (tmp_path / "x.fa.gz").write_bytes(gzip.compress(f">a\n{text}\n>b\nACG\n".encode()))
    with IndexedGenome(tmp_path / "x.fa.gz") as genome:
        for start in (0, size // 2, max(0, size - 70_000)):
            assert genome.fetch("a", start, size) == text[start:]
        assert genome.fetch("b", 1, 3) == "CG"


def test_an_index_beside_the_file_is_used_if_it_is_its_own(tmp_path: Path) -> None:
    import pyfaidx

    file, index = tmp_path / "x.fa", tmp_path / "x.fa.fai"
    file.write_text(">a x\nACGT\nACGT\nAC\n>b\nGGTT\n")
    pyfaidx.Faidx(str(file)).close()
    before = index.read_bytes()
    assert before
    with IndexedGenome(file) as genome:
        assert genome.fetch("a", 3, 9) == "TACGTA"
    for wrong in (
        "a\t10\t5\t4\t5\nc\t4\t20\t4\t5\n",
        "a\t10\t5\t4\t5\n",
        "a\t9\t5\t4\t5\nb\t4\t21\t4\t5\n",
        "a\t10\t6\t4\t5\nb\t4\t21\t4\t5\n",
        "nonsense",
        "",
    ):
        index.write_text(wrong)
        with IndexedGenome(file) as genome:
            assert [genome.fetch(name, 0, n) for name, n in (("a", 10), ("b", 4))] == [
                "ACGTACGTAC",
                "GGTT",
            ]
    index.write_bytes(before)
    file.write_text(">a x\nACG\nTAC\nGTA\nC\n>b\nGGTT\n")
    with IndexedGenome(file) as genome:
        assert genome.fetch("a", 3, 9) == "TACGTA"
    assert index.read_bytes() == before


def test_what_was_written_goes_with_the_genome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.fa").write_bytes(b">a\rACGT\r")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    genome = IndexedGenome(tmp_path / "x.fa")
    assert len(list((tmp_path / "temporary").iterdir())) == 1
    del genome
    gc.collect()
    assert not list((tmp_path / "temporary").iterdir())
    with IndexedGenome(tmp_path / "x.fa") as genome:
        assert genome.fetch("a", 1, 3) == "CG"
    assert not list((tmp_path / "temporary").iterdir())
    assert [one.name for one in tmp_path.iterdir() if one.is_file()] == ["x.fa"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("chr", 0, 1), "unknown record 'chr'. Did you mean 'chr1'"),
        (("1", 0, 1), "unknown record '1'. Did you mean 'chr1'"),
        (("chr1", 2, 1), "in order from 0 to 4; got 2 and 1"),
        (("chr1", 0, 5), "in order from 0 to 4; got 0 and 5"),
        (("chr1", -1, 2), "in order from 0 to 4; got -1 and 2"),
    ],
)
def test_what_is_not_there_is_refused(
    arguments: tuple[str, int, int], sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "x.fa").write_text(">chr1\nACGT\n")
    with IndexedGenome(tmp_path / "x.fa") as genome, pytest.raises(ValueError, match=sentence):
        genome.fetch(*arguments)


@pytest.mark.parametrize("data", [b"", b">a\n", b">p\nMKLE\n", b"ACGT\n"])
def test_no_genome_is_refused_with_the_readers_reason(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.fa").write_bytes(data)
    with pytest.raises(ValueError, match=r"\w") as expected:
        texts(tmp_path / "x.fa")
    with pytest.raises(ValueError, match=r"\w") as found:
        IndexedGenome(tmp_path / "x.fa")
    assert str(found.value) == str(expected.value)


def test_bed(tmp_path: Path) -> None:
    file = tmp_path / "x.bed.gz"
    lines = [
        "browser position chr1:1-10",
        'track name="x" description="y"',
        "# a comment",
        "",
        "chr1\t0\t4",
        "chr1 2 3 left",
        "chr2\t5\t10\t.\t0\t-",
        "chr2\t5\t10\tx y\t0\t.\tmore\tand more",
        "chr2\t1\t6\tblock\t0\t+\t1\t6\t0\t1\t5\t0",
    ]
    file.write_bytes(gzip.compress("\r\n".join(lines).encode()))
    expected = [
        Interval("chr1", 0, 4),
        Interval("chr1", 2, 3, "left"),
        Interval("chr2", 5, 10, "", "-"),
        Interval("chr2", 5, 10, "x y"),
        Interval("chr2", 1, 6, "block"),
    ]
    assert read_bed(file) == expected
    assert read_bed(file, {"chr1": 4, "chr2": 10}) == expected
    labels = ["chr1:0-4(+)", "left", "chr2:5-10(-)", "x y", "block"]
    assert [one.label for one in expected] == labels


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("chr1\t0", "at least three columns; got 2"),
        ("chr1\t-1\t3", "the start must be an integer of at least 0; got '-1'"),
        ("chr1\t1\t3.5", "the end must be an integer of at least 1; got '3.5'"),
        ("chr1\t3\t3", "the end must lie after the start, 3; got 3"),
        ("chr1\t5\t3", "the end must lie after the start, 5; got 3"),
        ("chr1\t0\t3\ta\t0\t*", r"the strand must be \+, - or \.; got '\*'"),
        ("1\t0\t3", "unknown record '1'. Did you mean 'chr1'"),
        ("chr1\t0\t5", "the interval ends at 5, and chr1 has 4 bases"),
        ("chr1\t0\t4\ta\t0\t+\t0\t4\t0\t2\t1,1\t0,3", "must be one block; got 2 blocks"),
    ],
)
def test_a_line_that_is_no_interval_is_named(line: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "x.bed").write_text(f"# comment\nchr1\t0\t1\n{line}\n")
    with pytest.raises(ValueError, match=f"x.bed, line 3: .*{sentence}"):
        read_bed(tmp_path / "x.bed", {"chr1": 4})


def test_a_file_without_intervals_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.bed").write_text("# nothing\n")
    with pytest.raises(ValueError, match=r"x\.bed has no intervals"):
        read_bed(tmp_path / "x.bed")


def test_overlaps_are_those_of_every_pair() -> None:
    random = np.random.default_rng(0)

    def some(count: int) -> list[Interval]:
        starts = random.integers(0, 60, size=count)
        sizes = random.integers(1, 9, size=count)
        names = random.choice(["a", "b"], size=count)
        return [
            Interval(str(name), int(start), int(start + size))
            for name, start, size in zip(names, starts, sizes, strict=True)
        ]

    for margin in (0, 1, 5):
        for _ in range(30):
            places, others = some(8), some(4)
            expected = sum(
                any(
                    one.record == other.record
                    and one.start - margin < other.end
                    and other.start < one.end + margin
                    for other in others
                )
                for one in places
            )
            assert count_overlaps(places, others, margin) == expected


# The task.

GENOME = "".join(np.random.default_rng(3).choice([*"ACGT"], size=200))
COMPLEMENTS = str.maketrans("ACGTN", "TGCAN")


def other_strand(text: str) -> str:
    return text.translate(COMPLEMENTS)[::-1]


def spelled(task: Any, split: str, seed: int = 0) -> list[str]:
    """The rows as letters, the last label with them."""
    tokenizer = task.own_tokenizer()
    found = []
    for row in task.rows(split, seed):
        assert row["input_ids"][1:].tolist() == row["labels"][:-1].tolist()
        ids = [*row["input_ids"].tolist(), int(row["labels"][-1])]
        found.append("".join(tokenizer.convert_ids_to_tokens(ids)))
    return found


@pytest.fixture
def genome(tmp_path: Path) -> str:
    parts = [GENOME[:101], GENOME[101:150], GENOME[150:]]
    records = (f">r{index}\n{part[:30]}\n{part[30:]}\n" for index, part in enumerate(parts))
    (tmp_path / "x.fa").write_text("".join(records))
    return str(tmp_path / "x.fa")


def test_rows_of_intervals_on_their_strands(genome: str, tmp_path: Path) -> None:
    bed = tmp_path / "x.bed"
    bed.write_text("r0\t10\t60\nr0\t20\t41\ta\t0\t-\nr2\t3\t4\n")
    held_out = tmp_path / "v.bed"
    held_out.write_text("r1\t0\t9\n")
    task = tasks.build(
        "fasta", train=genome, intervals=str(bed), validation_intervals=str(held_out), length=20
    )
    backwards = other_strand(GENOME[20:41])
    assert spelled(task, "train") == [GENOME[10:31], GENOME[30:51], GENOME[50:60], backwards]
    assert spelled(task, "validation") == [GENOME[101:110]]
    from gramian.tasks._task import has_rows

    assert has_rows(task, "validation") and not has_rows(task, "test")
    task = tasks.build("fasta", test=genome, test_intervals=str(bed), length=20)  # without train
    assert spelled(task, "test")[-1] == backwards


@pytest.mark.parametrize("by", ["records", "positions"])
@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 0.9])
def test_a_share_divides_the_bases(by: str, share: float, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    parts = ["".join(random.choice([*"ACGT"], size=30 + i)) for i in range(20)]
    for number in range(2):
        records = (f">a\n{part}\n" for part in parts[number::2])
        (tmp_path / f"{number}.fa").write_text("".join(records))
    parts = parts[::2] + parts[1::2]
    task = tasks.build(
        "fasta",
        train=str(tmp_path / "*.fa"),
        validation_share=share,
        validation_by=by,
        length=1000,
    )
    train, validation = spelled(task, "train"), spelled(task, "validation")
    if by == "records":
        assert len(validation) == max(1, round(20 * share))
        assert sorted(train + validation) == sorted(parts)
        if share == 0.25:
            assert [parts.index(one) for one in validation] == [3, 7, 11, 15, 19]
    else:
        cuts = [len(part) - round(share * len(part)) for part in parts]
        assert train == [p[:cut] for p, cut in zip(parts, cuts, strict=True) if cut > 1]
        assert validation == [
            p[cut:] for p, cut in zip(parts, cuts, strict=True) if len(p) - cut > 1
        ]
    assert spelled(task, "train", 1) == train


def test_a_genome_of_one_record_is_divided_by_positions(tmp_path: Path) -> None:
    (tmp_path / "x.fa").write_text(f">a\n{GENOME}\n")
    settings: dict[str, Any] = {"train": str(tmp_path / "x.fa"), "validation_share": 0.1}
    with pytest.raises(ValueError, match="cannot divide 1 record; validation_by 'positions'"):
        list(tasks.build("fasta", **settings).rows("train", 0))
    task = tasks.build("fasta", **settings, validation_by="positions", length=50)
    assert "".join(one[:-1] for one in spelled(task, "train")) == GENOME[:179]
    assert spelled(task, "validation") == [GENOME[180:]]
    task = tasks.build("fasta", **settings, validation_by="positions", length=50, shift=30)
    for row in spelled(task, "train"):
        assert row in GENOME[:180]


def test_a_share_leaves_out_what_is_a_test(genome: str) -> None:
    task = tasks.build("fasta", train=genome, validation_share=0.5, test_records="r1", length=1000)
    found = [spelled(task, split) for split in ("train", "validation", "test")]
    assert found == [[GENOME[:101]], [GENOME[150:]], [GENOME[101:150]]]


@pytest.mark.filterwarnings("ignore:.*training files too")
def test_the_other_strand_is_drawn_by_seed_and_row(genome: str) -> None:
    plain = tasks.build("fasta", train=genome, validation=genome, length=7)
    task = tasks.build("fasta", train=genome, validation=genome, length=7, reverse_complement=True)
    forward = spelled(plain, "train")
    rows = {seed: spelled(task, "train", seed) for seed in (0, 1)}
    assert spelled(task, "train", 0) == rows[0]
    assert rows[0] != rows[1]
    for found in rows.values():
        turned = [one == other_strand(text) for one, text in zip(found, forward, strict=True)]
        assert all(t or one == text for t, one, text in zip(turned, found, forward, strict=True))
        assert 5 < sum(turned) < len(turned) - 5
    assert spelled(task, "validation") == spelled(plain, "validation")


@pytest.mark.parametrize("turned", [False, True])
def test_rows_are_shifted_within_their_record(genome: str, tmp_path: Path, turned: bool) -> None:
    task = tasks.build("fasta", train=genome, length=10, shift=4, reverse_complement=turned)
    plain = tasks.build("fasta", train=genome, length=10)
    rows, unmoved = spelled(task, "train"), spelled(plain, "train")
    assert rows == spelled(task, "train")
    assert rows != spelled(task, "train", 1)
    assert [len(row) for row in rows] == [len(row) for row in unmoved]
    records = [GENOME[:101], GENOME[101:150], GENOME[150:]]
    moves = set()
    for row, there in zip(rows, unmoved, strict=True):
        (record,) = [one for one in records if there in one]
        row = row if row in record else other_strand(row)
        moves.add(record.index(row) - record.index(there))
    assert len(moves) > 5 and min(moves) >= -4 and max(moves) <= 4
    bed = tmp_path / "x.bed"
    bed.write_text("r0\t40\t51\nr0\t0\t11\n")
    task = tasks.build("fasta", train=genome, intervals=str(bed), length=10, shift=4)
    drawn_ = [spelled(task, "train", seed) for seed in range(40)]
    assert {GENOME.index(rows[0]) for rows in drawn_} == set(range(36, 45))
    assert {GENOME.index(rows[1]) for rows in drawn_} == set(range(5))


def test_overlapping_intervals_are_told(genome: str, tmp_path: Path) -> None:
    (tmp_path / "t.bed").write_text("r0\t0\t20\n")
    (tmp_path / "v.bed").write_text("r0\t20\t40\n")
    settings: dict[str, Any] = {
        "train": genome,
        "intervals": str(tmp_path / "t.bed"),
        "validation_intervals": str(tmp_path / "v.bed"),
    }
    assert len(spelled(tasks.build("fasta", **settings), "train")) == 1
    with pytest.warns(
        UserWarning, match="1 of the training intervals share bases with valid.*once"
    ):
        spelled(tasks.build("fasta", **settings, shift=1), "train")


def test_unknown_letters_become_padding_and_no_labels(tmp_path: Path) -> None:
    (tmp_path / "x.fa").write_text(">a\nACNNRTNNNNNNNNGT\n")
    task = tasks.build("fasta", train=str(tmp_path / "x.fa"), length=5, replace_n=True)
    pad, a, c, g, t = 4, 7, 8, 9, 10
    rows = [(r["input_ids"].tolist(), r["labels"].tolist()) for r in task.rows("train", 0)]
    assert rows == [
        ([a, c, pad, pad, pad], [c, -100, -100, -100, t]),
        ([pad] * 4 + [g], [-100] * 3 + [g, t]),
    ]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"validation_by": "bases"}, "'records' or 'positions'; got 'bases'"),
        ({"validation_share": 1}, "between 0 and 1; got 1"),
        ({"validation_share": "a"}, "between 0 and 1; got 'a'"),
        ({"validation_share": 0.1, "validation": "y"}, "validation_share or validation, not both"),
        (
            {"validation_share": 0.1, "validation_records": "y"},
            "validation_share or validation_records, not both",
        ),
        ({"validation_share": 0.1, "intervals": "y"}, "intervals are the whole of the training"),
        ({"test_records": "a", "intervals": "y"}, "intervals are the whole of the training"),
        ({"validation_records": "a", "validation_intervals": "y"}, "not both"),
        ({"intervals": 3}, "intervals must be the path of a BED file; got 3"),
        ({"shift": -1}, "shift must be an integer of at least 0; got -1"),
        ({"train": None, "test": "x", "validation_share": 0.1}, "is a share of train"),
        ({"train": None, "test": "x", "intervals": "y"}, "give train or train too|intervals of"),
    ],
)
def test_settings_that_contradict(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        tasks.build("fasta", **{"train": "x", **settings})


def test_a_tokenizer_of_other_tokens_cannot_turn_a_strand(genome: str) -> None:
    from gramian.checkpoints import DNATokenizer

    task = tasks.build(
        "fasta", train=genome, reverse_complement=True, tokenizer=DNATokenizer("ACGT")
    )
    assert len(list(task.rows("train", 0))) == 3

    class Words:
        unk_token_id = None
        all_special_tokens = ()

    from gramian.tasks import Encoder
    from gramian.tasks.augmentation import Nucleotides

    with pytest.raises(ValueError, match="one token for each nucleotide; got Words"):
        Nucleotides(Encoder(Words()))
