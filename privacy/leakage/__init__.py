"""What an update tells of the examples behind it, read in milliseconds: words, images, labels.

A client's guard uses it before it sends an update, and attacks use it on updates that were sent.
"""
