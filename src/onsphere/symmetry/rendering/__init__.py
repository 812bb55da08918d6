"""An audit as text, page, table and plain data."""
