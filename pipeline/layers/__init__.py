"""Torch modules that methods add to a model. Files here begin with torch, so they are imported inside functions alone."""
