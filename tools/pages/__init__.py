"""Pages made from the sources: the D-Bus manual, the man pages, the completions of the shells.

Each maker gives names of files, relative to the checkout, and what they must hold; nothing else is written, and what
is written depends on nothing but the sources, so that a test can compare.
"""
