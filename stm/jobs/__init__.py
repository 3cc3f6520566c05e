"""Running jobs: worker processes with deadlines, journals, progress, status codes."""
