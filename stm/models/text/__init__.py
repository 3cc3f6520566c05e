"""Text models: a BERT split in two, its files, its tokenizer, and the answer decoder."""
