"""Captions, phrases and questions about a clip of `moving-shapes`."""

from typing import Literal

from stm.datasets.moving_shapes.clip_spec import ClipSpec
from stm.datasets.moving_shapes.motions import MOTIONS

COUNTS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def caption_of(spec: ClipSpec) -> str:
    """The full caption: `a red striped circle bounces up and down over a brick background`."""
    return f"{action_caption(spec)} over a {spec.background} background"


def appearance_caption(spec: ClipSpec) -> str:
    """The caption without the motion, as visible in a single frame: `a red striped circle over a brick background`."""
    return f"{_with_article(name_of(spec))} over a {spec.background} background"


def action_caption(spec: ClipSpec) -> str:
    """The caption without the background: `a red striped circle bounces up and down`."""
    return f"{_with_article(name_of(spec))} {MOTIONS[spec.label]}"


def captioned(spec: ClipSpec, names: Literal["full", "action", "appearance"]) -> str:
    """The caption that names what `dataset.caption` asks for."""
    return {"full": caption_of, "action": action_caption, "appearance": appearance_caption}[names](spec)


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def name_of(spec: ClipSpec) -> str:
    """`red striped circle`."""
    return f"{spec.named.color} {spec.named.texture} {spec.named.shape}"


def phrases(spec: ClipSpec) -> dict[str, str]:
    """The phrases of the caption, keyed by what they describe; each is a substring of `caption_of(spec)`."""
    return {
        "object": name_of(spec),
        "color": spec.named.color,
        "texture": spec.named.texture,
        "shape": spec.named.shape,
        "motion": MOTIONS[spec.label],
        "background": f"{spec.background} background",
    }


def questions_of(spec: ClipSpec) -> list[dict[str, str]]:
    """Questions with short answers, as `{"question": ..., "answer": ...}`; a question about an object names it."""
    named = spec.named
    item = f"the {named.color} {named.shape}"
    pairs = [
        (f"what color is the {named.shape}?", named.color),
        (f"what shape is {named.color}?", named.shape),
        (f"what pattern does {item} have?", named.texture),
        (f"how does {item} move?", named.motion.replace("_", " ")),
        ("what is the background?", spec.background),
        ("does the camera move?", "yes" if spec.camera.moving else "no"),
        ("how many objects are there?", COUNTS[len(spec.distractors)]),
    ]
    return [{"question": question, "answer": answer} for question, answer in pairs]
