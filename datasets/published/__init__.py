"""Published data sets, a file each kind: where they are had, how they are checked and read."""
