"""The declaration of a stage, and the list of all stages; each is declared once, in the `stage.py` of its folder."""
