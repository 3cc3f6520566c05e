"""Cleans captions as in the text towers' training. Applied at tokenisation; the manifest keeps the original text."""

import re

_DROPPED = ",.'!?\"()*#:;~"
_SPACED = "-/"
_TABLE = str.maketrans({**dict.fromkeys(_DROPPED), **dict.fromkeys(_SPACED, " ")})
_SPACES = re.compile(r"\s+")


def clean_text(text: str) -> str:
    """A caption, question or answer in the form that UMT trains and tests on.

    The text is lower-cased; punctuation is removed; dashes and slashes become spaces; `<person>` (LSMDC, Conceptual
    Captions) becomes `person`; white space is collapsed and stripped. The function is idempotent.
    """
    plain = text.lower().translate(_TABLE).replace("<person>", "person")
    return _SPACES.sub(" ", plain).strip()
