"""Which of a clip's packed captions may be drawn."""

from collections.abc import Sequence

from stm.config import CaptionChoice


def choose_captions(captions: int, sources: Sequence[str], choice: CaptionChoice) -> list[int]:
    """Numbers of the captions that a visit draws from, ascending.

    Args:
        captions: how many the clip has.
        sources: the source of each; empty when the shard is of a version that does not say: they then count as one source.
    """
    names = list(sources) or [""] * captions
    wanted = dict.fromkeys(names) if choice.sources is None else choice.sources
    groups = [[number for number, name in enumerate(names) if name == source] for source in wanted]
    return sorted(group[place] for group in groups for place in spread(len(group), choice.count))


def spread(total: int, count: int | None) -> list[int]:
    """`count` of `total` numbers, at the centres of equal segments; all when there are not more.

    Captions of key frames, themselves at the centres of a clip's equal segments, are thinned out to those whose segment
    holds one of `count` uniform key frames: 1 of 3 captions is the middle one, as in TGM's ablation.
    """
    if count is None or count >= total:
        return list(range(total))
    return [(2 * place + 1) * total // (2 * count) for place in range(count)]
