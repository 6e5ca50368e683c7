"""Sentences of few words, for n-grams that can be counted by hand."""

TEXT = """a b a b c
a b a
c a b
b a c a b
a b c c
d a b e
e d a
f a b a c
c c a b
g h
"""
