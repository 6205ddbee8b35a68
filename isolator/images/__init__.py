"""Images: recipes to root filesystems to reproducible images on the engine, and the check of foreign ones."""
