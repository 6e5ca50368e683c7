"""What people do with models: classify, translate, compare, begin from word vectors, report; runs of classic models."""
