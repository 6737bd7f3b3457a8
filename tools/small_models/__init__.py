"""How the repository makes the small models in ``data/``; run from its root, not in the wheel."""
