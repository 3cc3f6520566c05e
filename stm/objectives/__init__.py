"""Losses, one a file: plain functions of predictions and targets."""
