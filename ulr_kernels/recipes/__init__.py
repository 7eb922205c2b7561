"""`ulr train` and `ulr demo`: data sets, models, training with checkpoints, and reports."""
