"""What a run leaves: a folder that is readable at every moment, also after the run was killed."""
