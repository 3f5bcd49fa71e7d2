"""Files, local and in buckets."""
