"""What people do with models: runs of classic ones, sets of labelled texts, reports."""
