"""Families of recurrences, one file each: which layers they have, how these are read and cut.

To add a family, add a file: every file of this package is loaded.
"""
