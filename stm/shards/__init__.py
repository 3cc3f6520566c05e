"""The format of packed shards, shared by writer and readers: arrays, index, reader, check, grid."""
