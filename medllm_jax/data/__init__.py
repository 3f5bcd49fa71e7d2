"""Data: documents and preference pairs as packed rows, stored once and read by every kind of run."""
