"""Finding the subject of a photo."""
