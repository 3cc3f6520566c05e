"""Captions in the form that the text towers are trained on. Tokenisation cleans them; the manifest keeps them as written."""

import re

_DROPPED = ",.'!?\"()*#:;~"
_SPACED = "-/"
_TABLE = str.maketrans({**dict.fromkeys(_DROPPED), **dict.fromkeys(_SPACED, " ")})
_SPACES = re.compile(r"\s+")


def clean_text(text: str) -> str:
    """A caption, question or answer in the form that UMT trains and tests on.

    Lower case; punctuation dropped, dashes and slashes made spaces; LSMDC's and Conceptual Captions' `<person>` is
    `person`; single spaces, none at the ends. Cleaning twice changes nothing.
    """
    plain = text.lower().translate(_TABLE).replace("<person>", "person")
    return _SPACES.sub(" ", plain).strip()
