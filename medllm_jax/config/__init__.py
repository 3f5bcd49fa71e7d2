"""Everything that a run can set, and how it is read."""
