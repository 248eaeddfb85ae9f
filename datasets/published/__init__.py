"""Published data sets, one file for each kind: their sources, checks and readers."""
