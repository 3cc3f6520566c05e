"""Offline stages that turn videos into training shards; one folder per stage."""
