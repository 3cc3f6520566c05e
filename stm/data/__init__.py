"""From shard to batch: reading, clip sampling, augmentation of pixels and guides together, loading."""
