"""Aggregation rules over each client's update, for cohorts in which some may lie: a file a paper."""
