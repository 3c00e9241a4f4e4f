"""What is minimised: base.py has the interface, every other file one objective. They never import each other."""
