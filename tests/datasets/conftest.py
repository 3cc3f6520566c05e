"""Small copies of benchmarks, laid out like the official ones, lie here."""
