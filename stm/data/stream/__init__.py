"""Shards that are read from start to end, from URLs: for data that is not on a local disk.

Built on `webdataset`, which splits each tar into clips and shuffles them in a buffer. Each clip then becomes the same samples
as with `ClipDataset`, bit for bit, because they are functions of (seed, epoch, key) alone, and is checked in the same way:
the index of a shard, which lies beside it, is fetched first.
"""

from stm.data.stream.batches import ClipStream
from stm.data.stream.opening import open_stream

__all__ = ["ClipStream", "open_stream"]
