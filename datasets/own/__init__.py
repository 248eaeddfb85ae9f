"""A user's own files: tables, arrays, folders of images; and the data of a client on a machine of its own."""
