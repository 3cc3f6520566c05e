"""Offline stages, from videos to training shards; one folder per stage."""
