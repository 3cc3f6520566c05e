"""Training: the loop, its optimiser and schedule, checkpoints, logs and processes; and pretraining, which
uses them.
"""
