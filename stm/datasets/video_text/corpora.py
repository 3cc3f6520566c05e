"""The corpora that UMT, STM and ClusterSTM pretrain on: their properties, and reading their lists.

No copy is complete, because web links expire. The existing clips are counted but not compared with an official size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from stm.datasets.official_lists import Annotations, Typical, text_of
from stm.datasets.text_files import BadRow
from stm.datasets.video_text.by_video import AnnotationLine
from stm.datasets.video_text.streams import stream_rows
from stm.storage.files import sha256_file

SPLIT = "train"


@dataclass(frozen=True)
class PretrainingCorpus:
    """The properties of a corpus that are known without its data."""

    title: str
    media: Literal["video", "image"]
    names: tuple[str, ...]  # possible names of the list file, without extension
    published: int  # number of videos or images according to the authors; never checked
    typical: Typical
    unique_names: bool = False  # the file names are the publisher's ids, so that folders do not matter
    lists_from: str = "VindLU's shared annotations, https://github.com/klauscc/VindLU (folder anno_pretrain)"

    @property
    def files(self) -> tuple[str, ...]:
        """Possible names of the list file; the first existing one is read."""
        return tuple(f"{name}{ending}" for ending in (".json", ".sqlite.db", ".db") for name in self.names)


_IMAGE = Typical(1, 640, 480, "assumed")
_WEBVID = Typical(450, 596, 336, "13,000 hours of 2.5 million videos (Bain et al. 2021), 25 frames per second assumed")

CORPORA: dict[str, PretrainingCorpus] = {
    # Bain et al. 2021, Frozen in Time: 2.5 million; project page: 10.7 million. Both rounded.
    "webvid-2m": PretrainingCorpus("WebVid-2M", "video", ("webvid_train",), 2_500_000, _WEBVID, True),
    "webvid-10m": PretrainingCorpus("WebVid-10M", "video", ("webvid_10m_train",), 10_700_000, _WEBVID, True),
    # Sharma et al. 2018, training links. Early copies have 2.9 million; in 2022 1.9 to 2.2 were still available.
    "cc3m": PretrainingCorpus("Conceptual Captions 3M", "image", ("cc3m_train",), 3_318_333, _IMAGE),
    # Changpinyo et al. 2021.
    "cc12m": PretrainingCorpus("Conceptual Captions 12M", "image", ("cc12m_train", "cc12m"), 12_423_374, _IMAGE),
    "sbu": PretrainingCorpus("SBU Captions", "image", ("sbu",), 1_000_000, _IMAGE),  # Ordonez et al. 2011, rounded
    "visual-genome": PretrainingCorpus("Visual Genome", "image", ("vg",), 108_077, _IMAGE),  # Krishna et al. 2017
    # Karpathy's training split plus the remaining validation images, five captions each.
    "coco": PretrainingCorpus("COCO captions", "image", ("coco",), 113_287, _IMAGE),
}


def read_corpus(corpus: PretrainingCorpus, annotations: Annotations) -> Iterator[AnnotationLine]:
    """The contents of a corpus's list, line by line; unusable lines have a `problem`.

    Raises:
        DatasetError: the list is missing or damaged, or does not have the expected format.
    """
    path = annotations.find(*corpus.files)
    annotations.hashes[path.relative_to(annotations.folder)] = sha256_file(path)
    for where, row in stream_rows(path):
        try:
            key = next((key for key in ("video", "image", "filename") if isinstance(row, dict) and key in row), "video")
            yield AnnotationLine(SPLIT, where, text_of(row, key), captions=(text_of(row, "caption"),))
        except BadRow as error:
            yield AnnotationLine(SPLIT, where, problem=str(error))
