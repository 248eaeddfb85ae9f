"""Simulations: experiments run in this process, their presets, plots and attacks."""
