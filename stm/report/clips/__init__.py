"""Pictures of clips, their guides and their masks."""
