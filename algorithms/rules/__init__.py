"""Byzantine-robust aggregation rules, which see each client's update; one file for each paper."""
