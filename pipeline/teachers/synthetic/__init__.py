"""Rows that a teacher writes: asked for, filtered, stored as a set, and drawn for a cell."""
