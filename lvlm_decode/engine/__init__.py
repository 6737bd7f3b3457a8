"""The engine: attach a method to a model, prepare its views, run them in one stacked forward."""
