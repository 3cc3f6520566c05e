"""Action classification: linear probe, fine-tuning, zero-shot."""
