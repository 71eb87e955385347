"""`uplvp auto`: from images and a few labels to a model, with every decision measured and written down."""
