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
    place = loader.place(sample)
    reader = loader.corpus.reader
    position = loader.source(place.source).begin + place.start
    end = position + loader.seq_len + 1
    while position < end:
        shard, start = loader.corpus.locate(position)
        number = reader.document_at(shard, start)
        document, origin = reader.document(shard, number)
        left = end - position
        offsets = range(start, min(start + left, document.stop))
        yield Part(shard=shard, offsets=offsets, document=document, origin=origin)
        position += len(offsets)
