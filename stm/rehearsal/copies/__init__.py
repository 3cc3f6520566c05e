"""A few clips of each dataset, laid out as in its official copy.

The lists of a public dataset have their official length, whether they are the user's own or generated, so that they pass the
check that guards the real run. Only the first few clips of each split have a file: the user's own where there is one, else a
generated one. All other clips are missing, and one file per dataset is broken.
"""
