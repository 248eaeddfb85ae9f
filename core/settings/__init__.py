"""The settings of an experiment: frozen sections, their TOML text, and the errors that explain them."""
