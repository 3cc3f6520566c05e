"""What a stage is, and the list of them all: each is declared once, in the `stage.py` of the folder that does its work."""
