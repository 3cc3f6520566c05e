"""The few clips of each split that have a file in the rehearsal."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from stm.datasets.annotations import AnnotatedClip

TRAIN_CLIPS, OTHER_CLIPS, CLASSES = 8, 4, 4


def choose_clips(clips: Iterable[AnnotatedClip]) -> list[AnnotatedClip]:
    """Return a few clips per split: of the first classes that every split has, or else the first ones.

    The first split gets one clip more than it needs, because one of its files is broken.
    """
    by_split: defaultdict[str, list[AnnotatedClip]] = defaultdict(list)
    for clip in clips:
        by_split[clip.split].append(clip)
    classes = _shared_classes(by_split.values())
    chosen = []
    for number, members in enumerate(by_split.values()):
        count = TRAIN_CLIPS + 1 if number == 0 else OTHER_CLIPS
        chosen += _spread(members, classes, count) if classes else members[:count]
    return chosen


def _shared_classes(splits: Iterable[Sequence[AnnotatedClip]]) -> list[str]:
    """The first labels that occur in every split."""
    labels = [dict.fromkeys(clip.label for clip in clips if clip.label is not None) for clips in splits]
    return [label for label in (labels[0] if labels else ()) if all(label in others for others in labels)][:CLASSES]


def _spread(clips: Sequence[AnnotatedClip], classes: Sequence[str], count: int) -> list[AnnotatedClip]:
    """`count` clips of these classes, the first one of each class, then the second one, and so on."""
    members: dict[str, list[AnnotatedClip]] = {label: [] for label in classes}
    for clip in clips:
        if clip.label in members:
            members[clip.label].append(clip)
    ranked = sorted(
        ((rank, order, clip) for order, label in enumerate(classes) for rank, clip in enumerate(members[label])),
        key=lambda entry: entry[:2],
    )
    return [clip for _, _, clip in ranked[:count]]
