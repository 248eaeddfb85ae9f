"""A server for clients on other machines: who may join, what is ordered, and the runs that go on."""
