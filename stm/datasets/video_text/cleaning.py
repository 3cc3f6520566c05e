"""Captions as the text towers are trained on them. Tokenisation cleans; the manifest keeps what was written."""

import re

_DROPPED = ",.'!?\"()*#:;~"
_SPACED = "-/"
_TABLE = str.maketrans({**dict.fromkeys(_DROPPED), **dict.fromkeys(_SPACED, " ")})
_SPACES = re.compile(r"\s+")


def clean_text(text: str) -> str:
    """A caption, question or answer in UMT's form, which trains and tests on it.

    Lower case; punctuation dropped, dashes and slashes made spaces; LSMDC's and Conceptual Captions' `<person>` is
    `person`; single spaces, none at the ends. Doing it twice changes nothing.
    """
    plain = text.lower().translate(_TABLE).replace("<person>", "person")
    return _SPACES.sub(" ", plain).strip()
