"""Groups of flags that several kinds of model need."""
