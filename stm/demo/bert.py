"""The demo's small BERT: random weights, and every word that is said, asked and answered about generated clips.

Its text side is trained in pretraining, as the demo has no text to learn a language from before.
"""

from pathlib import Path

from stm.datasets.moving_shapes.generate import BACKGROUNDS, COLORS, MOTIONS, SHAPES, TEXTURES
from stm.datasets.moving_shapes.sentences import COUNTS
from stm.models.text.small_bert import make_bert

WIDTH, LAYERS, HEADS = 128, 4, 4  # as wide as the student `tiny`

# What captions and questions of `moving-shapes` say beside the names of things.
PHRASES = (
    "a an the over background",
    "what color is what shape is what pattern does have how does move",
    "does the camera move yes no how many objects are there",
    "a video of picture photo with and in on of",
)


def demo_words() -> list[str]:
    """The vocabulary: sentences that hold every word of captions, questions and answers."""
    motions = [*MOTIONS, *MOTIONS.values()]
    return [*PHRASES, *COLORS, *TEXTURES, *SHAPES, *BACKGROUNDS, *COUNTS, *(name.replace("_", " ") for name in motions)]


def make_demo_bert(folder: Path, seed: int = 0) -> None:
    """Writes it; the repository ships what seed 0 gives."""
    make_bert(folder, demo_words(), WIDTH, LAYERS, HEADS, seed)
