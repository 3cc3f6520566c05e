"""Parts that the tests of the folders below share lie here."""
