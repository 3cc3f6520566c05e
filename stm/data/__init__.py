"""From shards to batches: reading, clip sampling, joint augmentation of pixels and guides, loading."""
