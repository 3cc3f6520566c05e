"""The text side: BERT in two halves, its files, its tokenizer and the decoder of answers."""
