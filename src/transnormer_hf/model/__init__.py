"""The files that ship with every checkpoint, which import each other and nothing else of this package."""
