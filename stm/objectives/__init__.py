"""Losses, one per file: plain functions of predictions and targets."""
