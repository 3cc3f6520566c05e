"""Which captions of a clip are drawn from."""

import pytest

from stm.config import CaptionChoice
from stm.data.sampling import choose_captions, spread
from stm.preprocess.captions.blip2 import choose_key_frames


@pytest.mark.parametrize("total", [1, 2, 3, 5, 8, 20, 64])
def test_captions_of_every_frame_thin_out_to_those_of_the_key_frames(total: int) -> None:
    for count in range(1, 70):
        assert spread(total, count) == choose_key_frames(total, count)


def test_one_caption_is_the_middle_one_and_none_given_is_all() -> None:
    assert spread(3, 1) == [1] and spread(20, 1) == [10] and spread(1, 1) == [0]
    assert spread(4, None) == [0, 1, 2, 3] and spread(0, None) == spread(0, 3) == []


def test_captions_are_counted_source_by_source() -> None:
    sources = ["human"] * 5 + ["blip2"] * 3 + ["label"]
    assert choose_captions(9, sources, CaptionChoice()) == list(range(9))
    assert choose_captions(9, sources, CaptionChoice(count=1)) == [2, 6, 8]
    assert choose_captions(9, sources, CaptionChoice(sources=("blip2",))) == [5, 6, 7]
    assert choose_captions(9, sources, CaptionChoice(sources=("label", "human"), count=2)) == [1, 3, 8]
    assert choose_captions(9, sources, CaptionChoice(sources=("other",))) == []


def test_captions_of_unknown_source_count_as_one_source() -> None:
    assert choose_captions(3, [], CaptionChoice()) == [0, 1, 2]
    assert choose_captions(3, [], CaptionChoice(count=1)) == [1]
    assert choose_captions(0, [], CaptionChoice(count=1)) == []
