"""Tools for running jobs: worker processes with deadlines, journals, progress, status codes."""
