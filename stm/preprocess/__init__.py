"""Offline stages: from videos to training shards; one file a stage."""
