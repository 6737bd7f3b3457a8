"""Helpers for tests of methods, drafters and families, those of other packages included."""
