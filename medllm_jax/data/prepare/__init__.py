"""From raw text to packed rows."""
