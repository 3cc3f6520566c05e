"""Reading and writing results: files, Parquet tables, tars and their receipts."""
