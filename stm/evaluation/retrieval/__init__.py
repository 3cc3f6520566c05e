"""Text-to-video and video-to-text retrieval."""
