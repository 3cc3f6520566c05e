"""Reads and writes results: files, Parquet tables, tars and their receipts."""
