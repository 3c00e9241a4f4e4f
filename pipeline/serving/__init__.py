"""Artefacts of finished cells that answer: alone, many over one base, or exported as a plain model."""
