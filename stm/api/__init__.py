"""The library as a notebook uses it; its functions are attributes of `stm` itself."""
