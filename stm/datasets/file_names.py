"""Names of video files: their endings, and names that differ from a listed one in ways that copies are known to differ."""

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from itertools import islice

from stm.config import FolderDataset

VIDEO_ENDINGS = tuple(FolderDataset.model_fields["extensions"].default)
# Endings that only the copies of public datasets have. DiDeMo's originals are what people uploaded to Flickr, under names
# such as `x.3g2`, `x.null` and `x.` (with nothing behind the dot).
_RARE_ENDINGS = (
    *(".3g2", ".3gpp", ".asf", ".divx", ".dv", ".f4v", ".m1v", ".m2ts", ".m2v", ".mod", ".mp4v", ".mpe", ".mts"),
    *(".null", ".ogv", ".qt", ".rm", ".rmvb", ".vob", "."),
)
COPY_ENDINGS = frozenset((*VIDEO_ENDINGS, *_RARE_ENDINGS))
ARCHIVE_ENDINGS = frozenset((".rar", ".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z"))

_SHARE = (
    0.4  # of a name: the shortest part of it that counts as similar; an id of YouTube in `{id}_000084_000094` is 0.48
)
_LOOKED_AT = 100  # names that begin alike
_PUNCTUATION = re.compile(r"[\W_]+")


def same_spelling(text: str) -> str:
    """Text in one Unicode form (NFC): a name may be stored with composed or decomposed accents, which look the same."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def folded(text: str) -> str:
    """Text without differences of case or of how accents are composed."""
    return same_spelling(text).casefold()


def printable(text: str) -> str:
    """Text that can be encoded as UTF-8; undecodable bytes of file names are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def describe_similar(paths: Sequence[str]) -> str:
    """The end of a message about a missing file that names similar ones; empty if there are none."""
    return f"; there is {', '.join(map(printable, paths))}" if paths else ""


def bare_name(name: str) -> str:
    """A file name without any endings of videos: `x` for `x.mov`, `x.mov.mp4` and `x.`; other dots are kept."""
    while True:
        stem, dot, ending = name.rpartition(".")
        if not stem or f"{dot}{ending.lower()}" not in COPY_ENDINGS:
            return name
        name = stem


class SimilarNames:
    """Finds files that may be the missing one under another name, for messages; folders and endings do not matter.

    A name is similar if it has the same letters and digits, or if one name continues the other after punctuation:
    `x` is similar to `x.mov.mp4.part`, `v_x` and `x_000084_000094`, and `video12` is not similar to `video123`.
    """

    def __init__(self, paths: Iterable[str], fuzzy: bool = False) -> None:
        """Index some paths or names.

        Args:
            fuzzy: names with a few other characters are similar, too. Only for a few hundred paths whose names do not
                consist of numbers.
        """
        stems = [(_stem(path), path) for path in paths]
        self._fuzzy = fuzzy
        self._paths: dict[str, list[str]] = {}
        self._same_letters: dict[str, list[str]] = {}
        for stem, path in stems:
            self._paths.setdefault(stem, []).append(path)
            self._same_letters.setdefault(_PUNCTUATION.sub("", stem), []).append(path)
        self._forward = sorted(self._paths)
        self._backward = sorted(stem[::-1] for stem in self._paths)

    def find(self, name: str, limit: int = 3) -> list[str]:
        """The most similar paths, best first."""
        stem = _stem(name)
        found = [*self._paths.get(stem, []), *self._same_letters.get(_PUNCTUATION.sub("", stem), [])]
        for other in (*_longer(self._forward, stem), *(k[::-1] for k in _longer(self._backward, stem[::-1]))):
            found += self._paths[other]
        for part in _parts(stem):
            found += self._paths.get(part, [])
        if self._fuzzy:
            for other in get_close_matches(stem, self._forward, limit, cutoff=0.75):
                found += self._paths[other]
        return list(dict.fromkeys(found))[:limit]


def _stem(path: str) -> str:
    return folded(bare_name(path.rpartition("/")[2]))


def _longer(ordered: list[str], stem: str) -> Iterator[str]:
    """The names in a sorted list that continue a name after punctuation."""
    start = bisect_left(ordered, stem)
    for other in islice(ordered, start, start + _LOOKED_AT):
        if not other.startswith(stem):
            return
        if len(other) > len(stem) and not other[len(stem)].isalnum():
            yield other


def _parts(stem: str) -> Iterator[str]:
    """What precedes and what follows each punctuation character of a name, longest first; no short parts."""
    cuts = [match.start() for match in re.finditer(r"[\W_]", stem)]
    parts = sorted((part for cut in cuts for part in (stem[:cut], stem[cut + 1 :])), key=len, reverse=True)
    return (part for part in parts if len(part) >= _SHARE * len(stem))
