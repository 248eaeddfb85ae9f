"""The in-process engine: a Flower Grid that runs client apps in this process."""
