"""From a file of rows to an answer: what is in it, what comparing techniques on it takes, the comparison, the verdict, and what comes next.

Library of `alignscope try` and the commands that follow it (errors, more, deploy, fit).
"""
