"""Similarity of a caption to the taken frames."""

from stm.data.guides.maker import GuideMaker

SIMILARITY = GuideMaker({"similarity": lambda stored: stored.values[stored.taken]})
