"""What reads finished cells for people: the report's page and tables, the comparison of two result sets, advice.

In go results and predictions, out come report/<experiment>/, tables and sentences; nothing here trains or loads a model.
"""
