"""How bytes reach the disk: files, tables, tars and their receipts."""
