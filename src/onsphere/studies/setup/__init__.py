"""Data, networks, training and statistics that claims share."""
