"""Scale symmetries per row, column and channel: families of them, found without numbers."""
