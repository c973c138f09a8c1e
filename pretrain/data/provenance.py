"""Which documents a sample was made of."""

from collections.abc import Iterator
from dataclasses import dataclass

from data_prep.manifest import Shard
from pretrain.data.loader import TrainingLoader


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a window holds of one document."""

    shard: Shard
    offsets: range  # of the part, in the shard
    document: range  # of the whole document, in the shard, with its end-of-document id
    origin: tuple[str, int]  # input file and row


def parts_of(loader: TrainingLoader, sample: int) -> Iterator[Part]:
    """The documents in a sample's window, in order."""
    place, corpus = loader.place(sample), loader.corpus
    position = int(loader.begins[loader.names.index(place.source)]) + place.start
    end = position + loader.seq_len + 1
    while position < end:
        shard, start = corpus.locate(position)
        document, origin = corpus.reader.document(shard, corpus.reader.document_at(shard, start))
        offsets = range(start, min(start + end - position, document.stop))
        yield Part(shard=shard, offsets=offsets, document=document, origin=origin)
        position += len(offsets)
