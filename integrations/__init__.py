"""Adapters: one file per framework, each imports the core and (lazily) its framework only."""
