"""Text: what ships with the package, and what turns raw text into training shards."""
