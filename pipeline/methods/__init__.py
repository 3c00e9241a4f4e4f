"""What is trained: base.py has the interface, every other file one family of methods. They never import each other."""
