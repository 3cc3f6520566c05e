"""Training: the loop, its optimiser and schedule, checkpoints, logs and processes, and the pretraining built on
them.
"""
