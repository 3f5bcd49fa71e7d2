"""Which exam questions stand in other text."""
