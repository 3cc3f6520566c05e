"""Mask quality: how much of the captioned object masks hide, and how well cached maps match maps of the crop."""
