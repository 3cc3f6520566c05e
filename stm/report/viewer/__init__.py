"""The mask viewer: clips that play under every masking strategy, at any ratio, on the page and for a video of one's own."""
