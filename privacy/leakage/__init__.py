"""What an update says of the examples behind it, read in milliseconds: words, images, labels.

For the guard of a client, which looks before it sends, and for the attacks, which look at what was sent.
"""
