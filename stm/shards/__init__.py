"""The format of packed shards, for writer and reader alike: arrays, index, reader, check, grid."""
