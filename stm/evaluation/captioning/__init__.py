"""Video captioning: generated captions and their scores."""
