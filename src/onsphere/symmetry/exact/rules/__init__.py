"""What each operation does to units and to axes: one table, and the functions that it names."""
