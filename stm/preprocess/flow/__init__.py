"""Stage 5b: optical flow between stored frames."""
