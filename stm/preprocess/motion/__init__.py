"""Stage 5: motion magnitude and mean vector per cell and stored frame."""
