"""The settings of an experiment: sections of frozen values, their text, and the errors that explain them."""
