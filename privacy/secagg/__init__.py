"""Secure aggregation: masks that cancel in a sum (Bonawitz et al. 2017; Bell et al. 2020)."""
