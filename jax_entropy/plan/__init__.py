"""What a run would need on accelerators that nobody has rented yet."""
