"""Auditing a run: canaries through the real pipeline, and what their scores prove about the epsilon that it claims."""
