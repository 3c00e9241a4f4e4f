"""Where rationales come from: base.py has the interface, writer.py what asks a language model (its answers in cache.py), every other file one teacher
or writer. Those never import each other."""
