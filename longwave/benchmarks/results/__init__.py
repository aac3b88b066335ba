"""What was measured: rows with all that belongs to them, as tables, pictures and kept files that can be compared."""
