"""Measurements on the running machine: what methods and drafters cost, paired with plain ``generate()``."""
