"""A client on a machine of its own: it joins a server, takes its messages, and answers as its owner's policy allows."""
