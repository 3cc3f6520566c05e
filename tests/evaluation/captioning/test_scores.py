"""Caption scores against implementations of the formulas of their own; what happens without Java, or when it hangs."""

import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from stm.evaluation.captioning import scores as caption_scores
from stm.evaluation.captioning.scores import CaptionScoreError, find_programs, score_captions

PREDICTED = ["a man plays the guitar", "two dogs run on grass", "a red car drives down the road", "someone cooks", ""]
REFERENCES = [
    ["a man is playing the guitar", "a man plays a guitar on stage"],
    ["two dogs are running on the grass", "dogs run on green grass", "two dogs run on grass"],
    ["a red car drives down the road"],
    ["a woman is cooking in the kitchen", "someone cooks food"],
    ["a cat sleeps on the red sofa"],
]

try:
    find_programs()
    LACKING = ""
except CaptionScoreError as error:
    LACKING = str(error)
scored = pytest.mark.skipif(bool(LACKING), reason=LACKING)


def grams(text: str, size: int) -> Counter:
    words = text.split()
    return Counter(tuple(words[place : place + size]) for place in range(len(words) - size + 1))


def bleu4(predicted: list[str], references: list[list[str]]) -> float:
    """Papineni et al. 2002, of the whole; the reference nearest in length counts, the shorter of two."""
    logs = 0.0
    for size in range(1, 5):
        right = total = 0
        for text, own in zip(predicted, references, strict=True):
            most: Counter[tuple[str, ...]] = Counter()
            for reference in own:
                most |= grams(reference, size)
            right += (grams(text, size) & most).total()
            total += grams(text, size).total()
        logs += math.log(right / total) / 4
    lengths = [len(text.split()) for text in predicted]
    nearest = [
        min((abs(len(reference.split()) - length), len(reference.split())) for reference in own)[1]
        for length, own in zip(lengths, references, strict=True)
    ]
    return math.exp(logs) * min(1.0, math.exp(1 - sum(nearest) / sum(lengths)))


def common(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence."""
    if not first or not second:
        return 0
    if first[0] == second[0]:
        return 1 + common(first[1:], second[1:])
    return max(common(first[1:], second), common(first, second[1:]))


def rouge_l(text: str, own: list[str], beta: float = 1.2) -> float:
    """Lin 2004, with COCO's beta; best precision and best recall over the references."""
    words = text.split()
    shared = [common(words, reference.split()) for reference in own]
    if not max(shared):
        return 0.0
    precision = max(shared) / len(words)
    recall = max(count / len(reference.split()) for count, reference in zip(shared, own, strict=True))
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def cider(predicted: list[str], references: list[list[str]]) -> list[float]:
    """CIDEr-D (Vedantam et al. 2015): clipped, with a penalty of the difference in length, sigma 6."""
    scores = np.zeros(len(predicted))
    for size in range(1, 5):
        seen = Counter(gram for own in references for gram in set().union(*(grams(text, size) for text in own)))

        def weigh(text: str, size: int = size, seen: Counter = seen) -> dict[tuple, float]:
            return {
                gram: count * math.log(len(references) / max(1, seen[gram]))
                for gram, count in grams(text, size).items()
            }

        for number, (text, own) in enumerate(zip(predicted, references, strict=True)):
            ours = weigh(text)
            for reference in own:
                theirs = weigh(reference)
                product = sum(min(weight, theirs.get(gram, 0)) * theirs.get(gram, 0) for gram, weight in ours.items())
                norms = math.hypot(*ours.values()) * math.hypot(*theirs.values())
                # As in COCO's code, lengths are counted in pairs of words.
                longer = grams(text, 2).total() - grams(reference, 2).total()
                cosine = product / norms if norms else 0.0
                scores[number] += 10 * cosine * math.exp(-(longer**2) / 72) / len(own) / 4
    return scores.tolist()


def without_meteor(monkeypatch: pytest.MonkeyPatch) -> None:
    """METEOR takes 10 seconds to start."""
    monkeypatch.setattr(caption_scores, "_meteor", lambda generated, *_: (0.5, [0.5] * len(generated)))


@scored
def test_bleu_rouge_and_cider_are_those_of_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    without_meteor(monkeypatch)
    found = score_captions(PREDICTED, REFERENCES)
    assert found.figures["bleu4"] == pytest.approx(bleu4(PREDICTED, REFERENCES), rel=1e-6)
    expected = [rouge_l(text, own) for text, own in zip(PREDICTED, REFERENCES, strict=True)]
    np.testing.assert_allclose(found.clips["rouge_l"], expected)
    assert found.figures["rouge_l"] == pytest.approx(np.mean(expected))
    np.testing.assert_allclose(found.clips["cider"], cider(PREDICTED, REFERENCES), atol=1e-9)
    assert found.figures["cider"] == pytest.approx(np.mean(cider(PREDICTED, REFERENCES)))
    assert found.clips["bleu4"][2] == pytest.approx(1) and found.clips["bleu4"][4] == 0
    assert {name: clips.shape for name, clips in found.clips.items()} == dict.fromkeys(caption_scores.NAMES, (5,))
    assert all(type(value) is float for value in found.figures.values())


@scored
def test_captions_are_compared_in_lower_case_without_punctuation_and_line_breaks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_meteor(monkeypatch)
    odd = ["A man,\nplays the guitar!", "Two\u2028dogs\x0brun on\x85grass...", " a red car drives\tdown the road. "]
    odd += ["Someone\r\ncooks;", "\n"]
    found, expected = score_captions(odd, REFERENCES), score_captions(PREDICTED, REFERENCES)
    assert found.figures == expected.figures


@scored
def test_cider_of_one_clip_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    without_meteor(monkeypatch)
    found = score_captions(PREDICTED[:1], [PREDICTED[:1]])
    assert found.figures["cider"] == 0 and found.figures["bleu4"] == pytest.approx(1)


@scored
@pytest.mark.slow
def test_meteor_of_cases_worked_by_hand() -> None:
    """METEOR 1.5's English parameters: alpha 0.85, beta 0.2, gamma 0.6. All words here count alike."""
    predicted = ["red car", "house car red", "a red car drives down the road", "dogs", "", "| café |"]
    references = [["red car house"], ["red car house"], ["a red car drives down the road"], ["cats"], ["a dog"]]
    references.append(["café", "two ||| words"])
    found = score_captions(predicted, references)
    # Two of two words are right, of three: in one piece, which is half as many pieces as words.
    mean = (2 / 3) / (0.85 + 0.15 * 2 / 3)
    expected = [mean * (1 - 0.6 * 0.5**0.2), 1 - 0.6, 1, 0, 0]  # the second is in as many pieces as words
    np.testing.assert_allclose(found.clips["meteor"][:5], expected, atol=1e-9)
    assert found.clips["meteor"][5] > 0 and 0 < found.figures["meteor"] < 1


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="1 captions for 2 clips"):
        score_captions(["a"], [["a"], ["b"]])
    with pytest.raises(ValueError, match="1 clips have no reference"):
        score_captions(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="0 captions"):
        score_captions([], [])


def test_without_java_or_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "pycocoevalcap.meteor", None)
    with pytest.raises(
        CaptionScoreError, match=r"Java .*openjdk.* and the package pycocoevalcap .*stm-video\[captions\]"
    ):
        score_captions(["a"], [["a"]])


def program(folder: Path, text: str) -> caption_scores._Programs:
    """Stands in for Java."""
    path = folder / "java"
    path.write_text(f"#!{sys.executable}\nimport sys, time\n{text}\n")
    path.chmod(0o755)
    return caption_scores._Programs(str(path), folder / "t.jar", folder / "m.jar", frozenset(["."]))


METEOR = """
for line in sys.stdin:
    kind, *fields = line.rstrip("\\n").split(" ||| ")
    print("".join(fields).replace(" ", "")) if kind == "SCORE" else print(*fields, 7.5, sep="\\n")
    sys.stdout.flush()
"""


def test_meteor_is_asked_clip_by_clip_and_then_for_the_whole(tmp_path: Path) -> None:
    found = caption_scores._meteor(["1", "2"], [["3", "4"], ["5 ||| 6"]], program(tmp_path, METEOR), 60)
    assert found == (7.5, [341.0, 562.0])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("time.sleep(60)", "more than 1 seconds"),
        ("sys.exit('no room')", "no room"),
        ("print('Error', flush=True); time.sleep(60)", "could not convert|more than"),
        ("input(); print('1', flush=True); input()", "Broken pipe|the program ended"),
    ],
)
def test_a_meteor_that_hangs_or_dies_is_ended_and_reported(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(CaptionScoreError, match=why):
        caption_scores._meteor(["a"] * 3, [["b"]] * 3, program(tmp_path, text), 1)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("time.sleep(60)", "more than 1 seconds"),
        ("sys.exit('no room')", "exited with status 1: no room"),
        ("print(sys.stdin.readline())", "lines for 3 captions"),
    ],
)
def test_a_tokenizer_that_hangs_dies_or_loses_lines_is_reported(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(CaptionScoreError, match=why):
        caption_scores._tokenize(["a", "b", "c"], program(tmp_path, text), 1)


def test_captions_reach_the_tokenizer_on_its_input_alone_one_a_line(tmp_path: Path) -> None:
    programs = program(
        tmp_path, "assert not any('$(touch' in word for word in sys.argv)\nsys.stdout.write(sys.stdin.read())"
    )
    captions = ["a\nb .", "$(touch x); `y` 'z'", "", "c\x00\u2029d\x1ce"]
    assert caption_scores._tokenize(captions, programs, 60) == ["a b", "$(touch x); `y` 'z'", "", "c d e"]
