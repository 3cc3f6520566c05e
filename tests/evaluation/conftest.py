"""Small clips with known answers, for the tests of the folders below, lie here."""
