"""Artefacts of finished cells that answer: alone, many over one base, or exported as a plain model.

In go a cell's folder and requests, out come answers, or a folder that plain transformers loads.
"""
