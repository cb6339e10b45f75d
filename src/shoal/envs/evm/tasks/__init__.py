"""The tasks that come with Shoal, as data."""
