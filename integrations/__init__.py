"""Host adapters: one file per host, each imports the core and (lazily) its host only."""
