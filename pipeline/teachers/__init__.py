"""Where rationales come from: base.py has the interface, every other file one teacher. They never import each other."""
