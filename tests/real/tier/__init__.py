"""The driver of the real-server tier: one module a server, and what they share."""
