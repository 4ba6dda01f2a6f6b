"""One folder per loss family."""
