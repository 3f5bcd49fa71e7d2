"""What a terminal shows: progress, tables, and the parser of arguments."""
