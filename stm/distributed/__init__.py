"""The processes of one run: how they meet, gather tensors and shard their state."""
