"""What another model, or a word list, writes about a task's rows: answers with their rationales, and whole synthetic rows.

In go prepared rows, out come rationales/<task>/<teacher>/ and synthetic/<task>/<set>/.
"""
