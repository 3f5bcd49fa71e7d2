"""Commands made of commands."""
