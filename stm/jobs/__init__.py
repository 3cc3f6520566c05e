"""How work is done: worker processes with deadlines, journals, progress."""
