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

PRUNED = """\\data\\
ngram 1=5
ngram 2=6
ngram 3=6
ngram 4=1

\\1-grams:
-1.0\t<UNK>
-99\t<s>\t-0.3
-0.5\ta\t-0.2
-0.4\tb\t-0.1
-0.4\t</s>

\\2-grams:
-0.3\t<s> a\t-0.4
-0.2\tb a\t-0.6
-0.7\ta a\t-0.1
-0.8\ta </s>
-0.9\tb </s>
-0.6\tb b\t-0.2

\\3-grams:
-0.15\t<s> a b\t-0.7
-0.25\t<s> a a\t-0.1
-0.35\tb a a
-0.45\tb b b
-0.55\ta a a
-0.65\tb b </s>

\\4-grams:
-0.05\t<s> a b a

\\end\\
"""
