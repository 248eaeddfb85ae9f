"""How much a run tells: accountants, the mechanisms of noise and what each guarantees, and what accuracy to expect."""
