"""Running experiments: the in-process engine, presets, records and plots."""
