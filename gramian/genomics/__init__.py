"""Read genomes with a language model: score records and variants, and yield hidden states.

    from gramian import genomics

    for one in genomics.score(model, "genome.fa", tokenizer=tokenizer):
        print(one.name, one.total, one.mean)
    for one in genomics.score(model, "genome.fa", tokenizer=tokenizer, variants="calls.vcf"):
        print(one.variant.pos, one.difference)
    for one in genomics.embed(model, "genome.fa", tokenizer=tokenizer, layer=-1):
        print(one.name, one.values.shape)

Log-likelihoods are in nats. Sequences of any length are read in chunks, and the model's state is
carried from chunk to chunk. `gramian.tasks.genomes` defines how FASTA is read. Variants and
intervals of a file need random access to it, which pyfaidx provides: `pip install
"gramian[genomics]"`.
"""

from gramian.genomics._embed import Embedding, embed
from gramian.genomics._embedding_files import write_embeddings
from gramian.genomics._hidden_states import hidden_states, read_layer
from gramian.genomics._likelihood import LogLikelihood
from gramian.genomics._score import RecordScore, VariantScore, score
from gramian.genomics._tables import write_scores
from gramian.genomics._variants import Variant, read_variants

__all__ = [
    "Embedding",
    "LogLikelihood",
    "RecordScore",
    "Variant",
    "VariantScore",
    "embed",
    "hidden_states",
    "read_layer",
    "read_variants",
    "score",
    "write_embeddings",
    "write_scores",
]
