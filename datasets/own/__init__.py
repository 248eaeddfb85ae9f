"""Users' files: tables, arrays, folders of images; and the data of a client on its own machine."""
