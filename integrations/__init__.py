"""Adapters, one file or folder per framework; each imports only the core and, as late as possible, its framework."""
