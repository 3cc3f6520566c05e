"""The demo's small BERT: random weights, and a vocabulary of all captions, questions and answers of generated clips.

It is trained during video-text pretraining, because the demo has no text corpus on which to pretrain a language model.
"""

from pathlib import Path

from stm.datasets.moving_shapes.generate import BACKGROUNDS, COLORS, MOTIONS, SHAPES, TEXTURES
from stm.datasets.moving_shapes.sentences import COUNTS
from stm.models.text.small_bert import make_bert

WIDTH, LAYERS, HEADS = 128, 4, 4  # the width of the student `tiny`

# All words in captions and questions of `moving-shapes` except attribute names.
PHRASES = (
    "a an the over background",
    "what color is what shape is what pattern does have how does move",
    "does the camera move yes no how many objects are there",
    "a video of picture photo with and in on of",
)


def demo_words() -> list[str]:
    """Return texts that together contain every word of the captions, questions and answers."""
    motions = [*MOTIONS, *MOTIONS.values()]
    return [*PHRASES, *COLORS, *TEXTURES, *SHAPES, *BACKGROUNDS, *COUNTS, *(name.replace("_", " ") for name in motions)]


def make_demo_bert(folder: Path, seed: int = 0) -> None:
    """Write the model and its tokenizer to `folder`; the shipped model has seed 0."""
    make_bert(folder, demo_words(), WIDTH, LAYERS, HEADS, seed)
