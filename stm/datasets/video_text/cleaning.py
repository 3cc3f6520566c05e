"""Cleans captions for the text towers, as they were trained. Tokenisation does this; the manifest keeps the original text."""

import re

_DROPPED = ",.'!?\"()*#:;~"
_SPACED = "-/"
_TABLE = str.maketrans({**dict.fromkeys(_DROPPED), **dict.fromkeys(_SPACED, " ")})
_SPACES = re.compile(r"\s+")


def clean_text(text: str) -> str:
    """A caption, question or answer in the form that UMT trains and tests on.

    Lower case; punctuation is removed, dashes and slashes become spaces; LSMDC's and Conceptual Captions' `<person>` becomes
    `person`; single spaces, none at the ends. Cleaning a second time changes nothing.
    """
    plain = text.lower().translate(_TABLE).replace("<person>", "person")
    return _SPACES.sub(" ", plain).strip()
