"""Provide benchmark tasks: seeded generators and loaders that return a `datasets.Dataset`.

    train = gramian.tasks.load("mqar", split="train", seed=0, setting="64x4")
    gramian.tasks.names()
    gramian.tasks.settings("mqar")

All tasks follow one convention. The label at a position is the answer that is expected *at* this
position, so labels are not shifted. Positions with the label -100 are not scored. Causal language
models of transformers shift `labels` themselves. So pass the labels of a task as `shift_labels`, as
`gramian.training` does.

Needs `datasets` (`pip install "gramian[train]"`).
"""

from gramian._labels import IGNORED
from gramian.tasks import (  # noqa: F401 (each registers its tasks)
    arrays,
    digits,
    fasta,
    listops,
    lra,
    mad,
    memory,
    mqar,
    pathfinder,
    recall,
    speech_commands,
    table,
    text,
)
from gramian.tasks._task import (
    SPLITS,
    Description,
    GeneratedTask,
    Task,
    build,
    choose_split,
    load,
    names,
    register,
    settings,
)
from gramian.tasks.bed import Interval, read_bed
from gramian.tasks.documents import Document, documents_in, read_documents, register_reader
from gramian.tasks.encoding import Encoder
from gramian.tasks.indexed import IndexedGenome
from gramian.tasks.kinds import (
    KINDS,
    ClassLabels,
    Column,
    Kind,
    Metric,
    NumberLabels,
    find_kind,
    register_kind,
)

__all__ = [
    "IGNORED",
    "KINDS",
    "SPLITS",
    "ClassLabels",
    "Column",
    "Description",
    "Document",
    "Encoder",
    "GeneratedTask",
    "IndexedGenome",
    "Interval",
    "Kind",
    "Metric",
    "NumberLabels",
    "Task",
    "build",
    "choose_split",
    "documents_in",
    "find_kind",
    "load",
    "names",
    "read_bed",
    "read_documents",
    "register",
    "register_kind",
    "register_reader",
    "settings",
]
