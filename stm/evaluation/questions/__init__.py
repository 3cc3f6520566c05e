"""Questions about videos: open-ended answers and multiple choice."""
