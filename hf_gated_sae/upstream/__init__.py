"""Private names of other libraries, one file for each library: the only files that may use them.

Each name has its reason, what happens where it is missing, and a test. `tests/upstream/test_private_names.py` fails
for a private name of another library anywhere else.
"""
